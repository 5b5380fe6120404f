"""What the agent reads and how its answers are understood, as in AgentBench v0.2."""

import re
from typing import NamedTuple

from cycleqd_jax.tasks.base import Message

# The benchmark's instruction and example, word for word: scores are comparable only under the same
# prompt. From AgentBench v0.2, src/server/tasks/os_interaction/task.py (Apache-2.0, THUDM).
INSTRUCTION = """You are an assistant that will act like a person, I will play the role of linux(ubuntu) operating system. Your goal is to implement the operations required by me or answer to the question proposed by me. For each of your turn, you should first think what you should do, and then take exact one of the three actions: "bash", "finish" or "answer". 

1. If you think you should execute some bash code, take bash action, and you should print like this:

Think: put your thought here.

Act: bash

```bash
# put your bash code here
```

2. If you think you have finished the task, take finish action, and you should print like this:

Think: put your thought here.

Act: finish

3. If you think you have got the answer to the question, take answer action, and you should print like this:

Think: put your thought here.

Act: answer(Your answer to the question should be put in this pair of parentheses)

If the output is too long, I will truncate it. The truncated output is not complete. You have to deal with the truncating problem by yourself. Attention, your bash code should not contain any input operation. Once again, you should take only exact one of the three actions in each turn.

"""  # noqa: E501, W291

_OUTPUT = "The output of the OS:\n"
_TRUNCATED = "[truncated because the output is too long]"
_EXAMPLE = (
    Message(
        "user",
        f'{INSTRUCTION}Now, my problem is:\n\ntell me how many files are in the directory "/etc"?',
    ),
    Message(
        "assistant",
        "Think: To count the files in /etc, I need to print all the files in it.\n\n"
        "Act: bash\n\n```bash\nls /etc\n```",
    ),
    Message(
        "user",
        f"{_OUTPUT}cpi cron.hourly fuse.conf iproute2 lvm networkd-dispatcher protocols selinux "
        f"tmpfiles.d {_TRUNCATED}",
    ),
    Message(
        "assistant",
        "Think: The output has been truncated because it is too long, so I need to count files by "
        "script directly.\n\nAct: bash\n\n```bash\nls -1 /etc | wc -l\n```",
    ),
    Message("user", f"{_OUTPUT}220"),
    Message("assistant", "Think: Now I get the answer, it is 220.\n\nAct: answer(220)"),
)
_MAX_OUTPUT, _KEPT_OUTPUT = 800, 780  # characters
_ACT = re.compile(r"Act:\s*(.+)")
_CODE = re.compile(r"```bash\n(.*?)\n```", re.DOTALL)


class Bash(NamedTuple):
    """The agent wants code run."""

    code: str


class Commit(NamedTuple):
    """The agent is done; None is "finish", which has no answer."""

    answer: str | None


def opening(description: str) -> tuple[Message, ...]:
    """The conversation before the agent's first turn."""
    question = f"Now, I will start a new problem in a new OS. My problem is:\n\n{description}"
    return (*_EXAMPLE, Message("user", question))


def find_action(text: str) -> Bash | Commit | None:
    """The last action that is one; of code, all blocks together."""
    for action in reversed(_ACT.findall(text)):
        word = action.lower()
        if word.startswith("bash"):
            return Bash("\n\n".join(_CODE.findall(text)))
        if word.startswith("finish"):
            return Commit(None)
        if word.startswith("answer"):
            rest = action[len("answer") :].strip()
            left, right = rest.find("("), rest.rfind(")")
            if left >= 0 and right >= 0:
                return Commit(rest[left + 1 : right])
    return None


def write_bash(code: str) -> str:
    """A turn that `find_action` understands."""
    return f"Act: bash\n\n```bash\n{code}\n```"


def write_commit(answer: str | None) -> str:
    """A turn that `find_action` understands."""
    return "Act: finish" if answer is None else f"Act: answer({answer})"


def write_output(output: str) -> str:
    """What the agent reads of a command's output; the last end of line is the prompt's."""
    output = output.removesuffix("\n")
    if len(output) > _MAX_OUTPUT:
        output = f"{output[:_KEPT_OUTPUT]}\n{_TRUNCATED}"
    return f"{_OUTPUT}\n{output}" if output else "The output of the OS is empty."
