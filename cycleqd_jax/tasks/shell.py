"""The shell skill: one bash command over a file tree made for the problem.

Questions are judged by what the command prints, changes by the tree it leaves behind. The command
must succeed, and a question must leave the tree as it was.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cycleqd_jax.sandbox.base import Job, Outcome
from cycleqd_jax.tasks.base import Ask, Episode, Message, Problem, Run, Split, draw_problems
from cycleqd_jax.tasks.coding import strip_fence

Tree = dict[str, str]

FOLDERS = tuple(["docs", "logs", "src", "data", "tmp", "web", "mail", "img", "backup", "home"])
STEMS = tuple(
    [
        "notes",
        "report",
        "main",
        "todo",
        "users",
        "index",
        "plan",
        "draft",
        "error",
        "list",
        "draw",
        "music",
    ]
)
ENDINGS = tuple(["txt", "log", "py", "csv", "md"])
WORDS = tuple(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "omega",
        "sigma",
        "kappa",
        "zeta",
        "error",
        "warning",
        "ok",
        "failed",
    ]
)


@dataclass(frozen=True)
class Goal:
    """What a command should achieve: its request, the command, what it prints or leaves."""

    kind: str
    request: str
    command: str
    prints: Callable[[Tree], str] | None = None
    leaves: Callable[[Tree], Tree] | None = None


@dataclass(frozen=True, kw_only=True)
class ShellProblem(Problem):
    """A command to write.

    Attributes:
        tree: what is there before the command: path → text, and "folder/" → "" for every folder.
        prints: the expected output (stripped), or None for a change, which may print anything.
        leaves: the expected tree afterwards; the same tree for a question.
    """

    tree: Tree
    prints: str | None
    leaves: Tree


@dataclass(frozen=True)
class ShellTask:
    """Bash one-liners over small file trees."""

    name: Literal["shell"] = "shell"

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> list[ShellProblem]:
        """Draw ``count`` distinct problems of one split."""
        return draw_problems(make_problem, split, count, seed, difficulty)

    def episode(self, problem: Problem) -> Episode:
        """Ask for the command once, run it, score what it printed and left."""
        assert isinstance(problem, ShellProblem)
        text = yield Ask((Message("user", problem.prompt),))
        source = strip_fence(str(text))
        outcome = yield Run(Job(kind="bash", source=source, files=problem.tree, snapshot=True))
        assert isinstance(outcome, Outcome)
        said = problem.prints in (None, outcome.stdout.strip())
        return float(outcome.status == "ok" and said and outcome.files == problem.leaves)


def make_problem(rng: random.Random, difficulty: int) -> ShellProblem:
    """Draw one problem; difficulty 2 and more chains that many goals with ``&&``."""
    while True:
        goals = [_draw_goal(rng, query=difficulty == 1)]
        goals += [_draw_goal(rng, query=False) for _ in range(difficulty - 1)]
        prompt = " Then: ".join(goal.request for goal in goals)
        tree = _make_tree(random.Random(prompt), goals)
        try:
            prints, leaves = _achieve(goals, tree)
            break
        except KeyError:
            continue  # a goal has nothing to do, or an earlier one took its file away: draw again
    command = " && ".join(goal.command for goal in goals)
    return ShellProblem(
        prompt=prompt,
        answers=(command,),
        solution=command,
        document=f"# {prompt}\n$ {command}",
        kind=goals[-1].kind,
        tree=tree,
        prints=prints,
        leaves=leaves,
    )


def _draw_goal(rng: random.Random, *, query: bool) -> Goal:
    makers = (*_QUERIES, *_CHANGES) if query else _CHANGES
    return rng.choice(makers)(rng, rng.choice(FOLDERS))


def _achieve(goals: list[Goal], tree: Tree) -> tuple[str | None, Tree]:
    """Work out what a right command prints, or leaves.

    Raises KeyError if a goal needs a file that is gone, or changes nothing: its command would fail
    and end the chain, or doing nothing would be right.
    """
    if goals[-1].prints is not None:
        return goals[-1].prints(tree), tree
    leaves = dict(tree)
    for goal in goals:
        assert goal.leaves is not None
        before, leaves = leaves, goal.leaves(leaves)
        if leaves in (before, tree):
            raise KeyError(goal.request)
    return None, leaves


def _draw_file(rng: random.Random, folder: str) -> str:
    return f"{folder}/{rng.choice(STEMS)}.{rng.choice(ENDINGS)}"


def _lines(tree: Tree, path: str) -> list[str]:
    return tree[path].splitlines()


def _inside(tree: Tree, folder: str, ending: str) -> list[str]:
    return sorted(p for p in tree if p.startswith(f"{folder}/") and p.endswith(f".{ending}"))


def _without(tree: Tree, paths: list[str]) -> Tree:
    return {path: text for path, text in tree.items() if path not in paths}


def _count_word(rng: random.Random, folder: str) -> Goal:
    path, word = _draw_file(rng, folder), rng.choice(WORDS)
    request = rng.choice(("How many lines of {p} contain {w}?", "Count the lines with {w} in {p}."))
    return Goal(
        "count word",
        request.format(p=path, w=word),
        f"grep -c {word} {path}",
        prints=lambda tree: str(sum(word in line for line in _lines(tree, path))),
    )


def _show_word(rng: random.Random, folder: str) -> Goal:
    path, word = _draw_file(rng, folder), rng.choice(WORDS)
    request = rng.choice(("Show the lines of {p} that contain {w}.", "Find {w} in {p}."))
    return Goal(
        "show word",
        request.format(p=path, w=word),
        f"grep {word} {path}",
        prints=lambda tree: "\n".join(line for line in _lines(tree, path) if word in line),
    )


def _count_lines(rng: random.Random, folder: str) -> Goal:
    path = _draw_file(rng, folder)
    request = rng.choice(("How many lines does {p} have?", "Count the lines of {p}."))
    return Goal(
        "count lines",
        request.format(p=path),
        f"wc -l < {path}",
        prints=lambda tree: str(len(_lines(tree, path))),
    )


def _count_files(rng: random.Random, folder: str) -> Goal:
    ending = rng.choice(ENDINGS)
    request = rng.choice(("How many {e} files are in {f}?", "Count the {e} files of {f}."))
    return Goal(
        "count files",
        request.format(e=ending, f=folder),
        f"ls {folder}/*.{ending} | wc -l",
        prints=lambda tree: str(len(_inside(tree, folder, ending))),
    )


def _list_files(rng: random.Random, folder: str) -> Goal:
    ending = rng.choice(ENDINGS)
    request = rng.choice(("List the {e} files of {f}.", "Which {e} files are in {f}?"))
    return Goal(
        "list files",
        request.format(e=ending, f=folder),
        f"ls {folder}/*.{ending}",
        prints=lambda tree: "\n".join(_inside(tree, folder, ending)),
    )


def _find_word(rng: random.Random, folder: str) -> Goal:
    word = rng.choice(WORDS)
    request = rng.choice(("Which files of {f} contain {w}?", "List the files in {f} with {w}."))
    return Goal(
        "find word",
        request.format(f=folder, w=word),
        f"grep -l {word} {folder}/*",
        prints=lambda tree: "\n".join(
            sorted(p for p, t in tree.items() if p.startswith(f"{folder}/") and word in t)
        ),
    )


def _show_line(rng: random.Random, folder: str) -> Goal:
    path, number = _draw_file(rng, folder), rng.randint(2, 4)
    words, command, index = rng.choice(
        (
            ("first line", f"head -n 1 {path}", 0),
            ("last line", f"tail -n 1 {path}", -1),
            (f"line {number}", f"sed -n {number}p {path}", number - 1),
        )
    )
    request = rng.choice(("Print the {w} of {p}.", "What is the {w} of {p}?"))
    return Goal(
        "show line",
        request.format(w=words, p=path),
        command,
        prints=lambda tree: _lines(tree, path)[index],
    )


def _sort_lines(rng: random.Random, folder: str) -> Goal:
    path = _draw_file(rng, folder)
    words, option, arrange = rng.choice(
        (
            ("sorted", "", sorted),
            ("sorted without repeats", " -u", lambda lines: sorted(set(lines))),
            ("sorted backwards", " -r", lambda lines: sorted(lines, reverse=True)),
        )
    )
    return Goal(
        "sort lines",
        f"Print the lines of {path} {words}.",
        f"sort{option} {path}",
        prints=lambda tree: "\n".join(arrange(_lines(tree, path))),
    )


def _make_folder(rng: random.Random, folder: str) -> Goal:
    path = f"{folder}/{rng.choice(WORDS)}"
    request = rng.choice(("Make a folder {p}.", "Create the folder {p}."))
    return Goal(
        "make folder",
        request.format(p=path),
        f"mkdir {path}",
        leaves=lambda tree: {**tree, f"{path}/": ""},
    )


def _delete_files(rng: random.Random, folder: str) -> Goal:
    ending = rng.choice(ENDINGS)
    request = rng.choice(("Delete all {e} files in {f}.", "Remove every {e} file from {f}."))
    return Goal(
        "delete files",
        request.format(e=ending, f=folder),
        f"rm {folder}/*.{ending}",
        leaves=lambda tree: _without(tree, _inside(tree, folder, ending)),
    )


def _move_files(rng: random.Random, folder: str) -> Goal:
    ending = rng.choice(ENDINGS)
    target = rng.choice([other for other in FOLDERS if other != folder])

    def leaves(tree: Tree) -> Tree:
        moved = _inside(tree, folder, ending)
        return _without(tree, moved) | {f"{target}/{p.split('/')[-1]}": tree[p] for p in moved}

    return Goal(
        "move files",
        f"Move the {ending} files of {folder} to {target}.",
        f"mv {folder}/*.{ending} {target}/",
        leaves=leaves,
    )


def _copy_file(rng: random.Random, folder: str) -> Goal:
    path, target = _draw_file(rng, folder), rng.choice([o for o in FOLDERS if o != folder])
    return Goal(
        "copy file",
        f"Copy {path} to {target}.",
        f"cp {path} {target}/",
        leaves=lambda tree: {**tree, f"{target}/{path.split('/')[-1]}": tree[path]},
    )


def _rename_file(rng: random.Random, folder: str) -> Goal:
    path = _draw_file(rng, folder)
    stem, ending = path.split("/")[-1].split(".")
    name = f"{rng.choice([s for s in STEMS if s != stem])}.{ending}"
    request = rng.choice(("Rename {p} to {n}.", "Give {p} the new name {n}."))
    return Goal(
        "rename file",
        request.format(p=path, n=name),
        f"mv {path} {folder}/{name}",
        leaves=lambda tree: {**_without(tree, [path]), f"{folder}/{name}": tree[path]},
    )


def _write_word(rng: random.Random, folder: str) -> Goal:
    path, word = _draw_file(rng, folder), rng.choice(WORDS)
    if rng.random() < 0.5:
        return Goal(
            "write file",
            f"Write {word} to {path}.",
            f"echo {word} > {path}",
            leaves=lambda tree: {**tree, path: f"{word}\n"},
        )
    return Goal(
        "append line",
        f"Append a line {word} to {path}.",
        f"echo {word} >> {path}",
        leaves=lambda tree: {**tree, path: f"{tree.get(path, '')}{word}\n"},
    )


def _replace_word(rng: random.Random, folder: str) -> Goal:
    path, (old, new) = _draw_file(rng, folder), rng.sample(WORDS, 2)
    request = rng.choice(("Replace {o} by {n} in {p}.", "Change every {o} in {p} to {n}."))
    return Goal(
        "replace word",
        request.format(o=old, n=new, p=path),
        f"sed -i s/{old}/{new}/g {path}",
        leaves=lambda tree: {**tree, path: tree[path].replace(old, new)},
    )


_QUERIES = (
    _count_word, _show_word, _count_lines, _count_files,
    _list_files, _find_word, _show_line, _sort_lines,
)  # fmt: skip
_CHANGES = (
    _make_folder, _delete_files, _move_files, _copy_file,
    _rename_file, _write_word, _replace_word,
)  # fmt: skip


def _make_tree(rng: random.Random, goals: list[Goal]) -> Tree:
    """Make the files around the goals: every path and folder they mention, and some neighbours."""
    mentioned = [word.strip("?.,") for goal in goals for word in goal.request.split()]
    folders = [
        f for f in FOLDERS if f in mentioned or any(w.startswith(f"{f}/") for w in mentioned)
    ]
    paths = {w for w in mentioned if "/" in w and "." in w}
    endings = [word for word in mentioned if word in ENDINGS]
    words = [word for word in mentioned if word in WORDS]
    tree: Tree = {f"{folder}/": "" for folder in folders}
    for folder in folders:
        paths.update(f"{folder}/{stem}.{rng.choice(ENDINGS)}" for stem in rng.sample(STEMS, 3))
        for ending in endings:
            paths.update(
                f"{folder}/{stem}.{ending}" for stem in rng.sample(STEMS, rng.randint(1, 3))
            )
    for index, path in enumerate(sorted(paths)):
        lines = [rng.choice(WORDS) for _ in range(rng.randint(4, 7))]
        for word in words:
            if index == 0 or path in mentioned or rng.random() < 0.5:
                lines[rng.randrange(len(lines))] = word
        tree[path] = "".join(f"{line}\n" for line in lines)
    return tree
