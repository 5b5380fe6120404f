"""What the agent reads and how its answers are understood, as in AgentBench v0.2."""

from cycleqd_jax.tasks.base import Message

# The benchmark's instruction, word for word: scores are comparable only under the same prompt.
# From AgentBench v0.2, src/server/tasks/dbbench/__init__.py (Apache-2.0, THUDM).
INSTRUCTION = """
I will ask you a question, then you should help me operate a MySQL database with SQL to answer the question.
You have to explain the problem and your solution to me and write down your thoughts.
After thinking and explaining thoroughly, every round you can choose to operate or to answer.
your operation should be like this:
Action: Operation
```sql
SELECT * FROM table WHERE condition;
```
You MUST put SQL in markdown format without any other comments. Your SQL should be in one line.
Every time you can only execute one SQL statement. I will only execute the statement in the first SQL code block. Every time you write a SQL, I will execute it for you and give you the output.
If you are done operating, and you want to commit your final answer, then write down:
Action: Answer
Final Answer: ["ANSWER1", "ANSWER2", ...]
DO NOT write this pattern unless you are sure about your answer. I expect an accurate and correct answer.
Your answer should be accurate. Your answer must be exactly the same as the correct answer.
If the question is about modifying the database, then after done operation, your answer field can be anything.
If your response cannot match any pattern I mentioned earlier, you will be judged as FAIL immediately.
Your input will be raw MySQL response, you have to deal with it by yourself.
"""  # noqa: E501

_ACTION, _SQL, _END, _ANSWER = "Action: ", "```sql\n", "\n```", "\nFinal Answer:"
_MAX_REPLY = 800  # characters


def opening(question: str) -> tuple[Message, ...]:
    """The conversation before the agent's first turn."""
    return (
        Message("user", INSTRUCTION),
        Message("assistant", "Ok."),
        Message("user", question),
    )


def wants_operation(text: str) -> bool:
    """Whether the first line that names an action names an operation."""
    _, found, rest = text.partition(_ACTION)
    action, newline, _ = rest.partition("\n")
    return bool(found and newline) and action == "Operation"


def find_statement(text: str) -> str | None:
    """The statement of the first SQL code block, on one line; None without a whole block."""
    _, _, rest = text.partition(_SQL)
    statement, closed, _ = rest.partition(_END)
    return statement.strip().replace("\n", " ") if closed else None


def find_answer(text: str) -> str | None:
    """The rest of the first line, but the text's first, that starts with "Final Answer:"."""
    _, found, rest = text.partition(_ANSWER)
    return rest.partition("\n")[0] if found else None


def write_operation(statement: str) -> str:
    """A turn that `find_statement` understands."""
    return f"{_ACTION}Operation\n{_SQL}{statement}{_END}"


def write_answer(answers: tuple[str, ...]) -> str:
    """A turn that `find_answer` understands."""
    return f"{_ACTION}Answer{_ANSWER} {list(answers)!r}"


def cut_reply(reply: str) -> str:
    """As much of the database's reply as the agent is shown."""
    return reply if len(reply) <= _MAX_REPLY else reply[:_MAX_REPLY] + "[TRUNCATED]"
