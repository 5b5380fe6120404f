from cycleqd_jax.tasks.osbench import prompt
from cycleqd_jax.tasks.osbench.prompt import Bash, Commit


def test_the_conversation_opens_as_in_the_original() -> None:
    turns = prompt.opening("Count.")
    assert [t.role for t in turns] == ["user", "assistant"] * 3 + ["user"]
    assert turns[0].content.startswith("You are an assistant that will act like a person, I will")
    assert turns[0].content.endswith(
        "in each turn.\n\nNow, my problem is:\n\n"
        'tell me how many files are in the directory "/etc"?'
    )
    assert turns[5].content == "Think: Now I get the answer, it is 220.\n\nAct: answer(220)"
    assert turns[6].content == (
        "Now, I will start a new problem in a new OS. My problem is:\n\nCount."
    )


ACTIONS = {
    "Think: x\n\nAct: bash\n\n```bash\nls\n```": Bash("ls"),
    "Act: bash\n```bash\na\nb\n```\nand\n```bash\nc\n```": Bash("a\nb\n\nc"),
    "Act: bash": Bash(""),
    "Act: bash\n```bash\nls": Bash(""),
    "Act:BASH\n```sh\nls\n```": Bash(""),
    "Act: finish": Commit(None),
    "Act: finish(3)": Commit(None),
    "Act: answer(220)": Commit("220"),
    "Act: Answer (a (b) c) so": Commit("a (b) c"),
    "Act: answer()": Commit(""),
    "Act: answer( x )": Commit(" x "),
    "Act: answer 3": None,
    "Act: answer(3\n4)": None,
    # The last action counts, but for an answer without brackets.
    "Act: bash\n```bash\nls\n```\nAct: answer(3)": Commit("3"),
    "Act: finish\nAct: answer 3": Commit(None),
    "Act: dance": None,
    "ls": None,
    "": None,
}


def test_actions() -> None:
    assert {text: prompt.find_action(text) for text in ACTIONS} == ACTIONS


def test_what_is_written_is_understood() -> None:
    assert prompt.find_action(prompt.write_bash("ls\npwd")) == Bash("ls\npwd")
    assert prompt.find_action(prompt.write_commit("a (b)")) == Commit("a (b)")
    assert prompt.find_action(prompt.write_commit(None)) == Commit(None)


def test_long_outputs_are_cut() -> None:
    assert prompt.write_output("220\n") == "The output of the OS:\n\n220"
    assert prompt.write_output("") == prompt.write_output("\n") == "The output of the OS is empty."
    assert prompt.write_output("x" * 800).endswith("x" * 800)
    assert prompt.write_output("x" * 801) == (
        "The output of the OS:\n\n" + "x" * 780 + "\n[truncated because the output is too long]"
    )
