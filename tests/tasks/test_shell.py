"""The shell skill's judge: by what is printed or by what is left, never by what is claimed."""

import dataclasses
import random
from typing import Any

import pytest

from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.tasks.shell import ShellProblem, ShellTask, make_problem

TASK = ShellTask()
TREE = {
    "docs/": "",
    "logs/": "",
    "docs/a.txt": "alpha\nbeta\nalpha\n",
    "docs/b.txt": "beta\n",
    "docs/c.md": "gamma\n",
}
QUESTION = ShellProblem(
    prompt="Count the lines with alpha in docs/a.txt.",
    answers=("grep -c alpha docs/a.txt",),
    solution="",
    document="",
    kind="count word",
    tree=TREE,
    prints="2",
    leaves=TREE,
)
CHANGE = dataclasses.replace(
    QUESTION,
    prompt="Move the txt files of docs to logs.",
    answers=("mv docs/*.txt logs/",),
    kind="move files",
    prints=None,
    leaves={
        "docs/": "",
        "logs/": "",
        "docs/c.md": TREE["docs/c.md"],
        "logs/a.txt": TREE["docs/a.txt"],
        "logs/b.txt": TREE["docs/b.txt"],
    },
)

RIGHT_OUTPUT = {
    "the demonstration": QUESTION.answers[0],
    "in a fence": "```bash\ngrep -c alpha docs/a.txt\n```",
    "in a fence of one line": "```grep -c alpha docs/a.txt```",
    "another way": "cd docs && grep alpha a.txt | wc -l",
    "space around": "echo; echo '  2  '",
    "noise on standard error": "echo careful >&2; grep -c alpha docs/a.txt",
}
WRONG_OUTPUT = {
    "nothing": "",
    "off by one": "echo 3",
    "other file": "grep -c alpha docs/b.txt || true",
    "on standard error": "grep -c alpha docs/a.txt >&2",
    "more than asked": "grep -c alpha docs/*",
    "twice": "echo 2; echo 2",
    "fails afterwards": "grep -c alpha docs/a.txt; exit 1",
    "fails at the end": "echo 2; false",
    "into a file": "grep -c alpha docs/a.txt > answer",
    "words": "The answer is 2.",
    "only a comment": "# 2",
    "floods": "echo 2; yes",
    "deletes what it read": "grep -c alpha docs/a.txt; rm docs/a.txt",
    "leaves a file behind": "grep -c alpha docs/a.txt; touch docs/x",
    "sorts in place": "grep -c alpha docs/a.txt; sort -o docs/a.txt docs/a.txt",
}
RIGHT_TREES = {
    "the demonstration": CHANGE.answers[0],
    "one by one": "mv docs/a.txt logs/a.txt; mv docs/b.txt logs/",
    "copies and deletes": "cp docs/*.txt logs && rm docs/*.txt",
    "prints as well": "mv -v docs/*.txt logs/",
    "private temporary files": "echo x > /tmp/x; mv docs/*.txt logs/",
}
WRONG_TREES = {
    "nothing": "",
    "says so": "echo 'mv docs/*.txt logs/'",
    "prints the tree": "echo done; ls -R",
    "copies": "cp docs/*.txt logs/",
    "deletes": "rm docs/*.txt",
    "moves too much": "mv docs/* logs/",
    "moves too little": "mv docs/a.txt logs/",
    "moves back": "mv docs/*.txt logs/; mv logs/*.txt docs/",
    "leaves a file": "mv docs/*.txt logs/; touch x",
    "leaves a hidden file": "mv docs/*.txt logs/; touch logs/.x",
    "leaves a folder": "mv docs/*.txt logs/; mkdir docs/new",
    "removes the rest": "mv docs/*.txt logs/; rm docs/c.md",
    "removes the folder": "mv docs/*.txt logs/; rm -r docs",
    "changes a text": "mv docs/*.txt logs/; echo >> logs/a.txt",
    "empties a text": "mv docs/*.txt logs/; : > logs/b.txt",
    "links": "rm docs/*.txt; ln -s ../docs/a.txt logs/a.txt; ln -s ../docs/b.txt logs/b.txt",
    "names with a newline": "mv docs/*.txt logs/; touch $'logs/a\\nb'",
    "elsewhere": "cp -r docs logs /tmp && cd /tmp && mv docs/*.txt logs/",
    "too late": "(sleep 5; mv docs/*.txt logs/) > /dev/null 2>&1 &",
    "fails at the end": "mv docs/*.txt logs/; false",
    "floods": "mv docs/*.txt logs/; yes",
    "hides the tree": "mv docs/*.txt logs/; chmod 000 docs; touch x",
}


@pytest.mark.parametrize("name", RIGHT_OUTPUT)
def test_right_output_scores_one(name, score):
    assert score(TASK, QUESTION, [(RIGHT_OUTPUT[name],)]) == [1.0]


@pytest.mark.parametrize("name", WRONG_OUTPUT)
def test_wrong_output_scores_zero(name, score):
    assert score(TASK, QUESTION, [(WRONG_OUTPUT[name],)]) == [0.0]


@pytest.mark.parametrize("name", RIGHT_TREES)
def test_right_trees_score_one(name, score):
    assert score(TASK, CHANGE, [(RIGHT_TREES[name],)]) == [1.0]


@pytest.mark.parametrize("name", WRONG_TREES)
def test_wrong_trees_score_zero(name, score):
    assert score(TASK, CHANGE, [(WRONG_TREES[name],)]) == [0.0]


@pytest.mark.parametrize(
    "command",
    [
        "while :; do :; done",
        "mv docs/*.txt logs/; sleep 9",
        pytest.param("echo 2; sleep 9", marks=pytest.mark.slow),
        pytest.param("read -t 9 < /dev/zero", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("problem", [QUESTION, CHANGE], ids=["question", "change"])
def test_endless_commands_score_zero(
    command: str, problem: ShellProblem, score: Any, hasty: Sandbox
) -> None:
    assert score(TASK, problem, [(command,)], hasty) == [0.0]


def test_every_attempt_has_its_own_tree(score):
    attempts = [("rm -r *",), (CHANGE.answers[0],), ("mv docs/a.txt logs/",)] * 4
    assert score(TASK, CHANGE, attempts) == [0.0, 1.0, 0.0] * 4


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_difficulty_is_the_number_of_chained_goals(difficulty: int) -> None:
    problems = [make_problem(random.Random(seed), difficulty) for seed in range(60)]
    assert {p.prompt.count(" Then: ") for p in problems} == {difficulty - 1}
    assert {p.answers[0].count(" && ") for p in problems} == {difficulty - 1}
    assert all((p.prints is None) == (p.leaves != p.tree) for p in problems)


def test_the_tree_holds_the_folder_of_every_file() -> None:
    for seed in range(200):
        tree = make_problem(random.Random(seed), 2).tree
        assert {path.split("/")[0] + "/" for path in tree} == {p for p in tree if p.endswith("/")}
