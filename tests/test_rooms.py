"""The rooms of the house: who may import whom."""

import ast
from pathlib import Path

import cycleqd_jax

ROOT = Path(cycleqd_jax.__file__).parent

MAY_USE = {
    "merging": set(),
    "qd": {"merging"},
    "models": {"merging"},
    "training": {"models", "merging"},
    "sandbox": set(),
    "tasks": {"sandbox"},
    "runs": {"merging", "qd", "models", "training", "sandbox", "tasks"},
}

# Inside `runs`: the rooms that know of no other part of a run, or only of these.
SELF_CONTAINED = {"records": set(), "watching": {"records"}}


def _rooms_used(file: Path) -> set[str]:
    used = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cycleqd_jax."):
            used.add((node.module or "").split(".")[1])
        if isinstance(node, ast.Import):
            used |= {n.name.split(".")[1] for n in node.names if n.name.startswith("cycleqd_jax.")}
    return used & MAY_USE.keys()


def test_imports_go_downwards_only() -> None:
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 40
    wrong = {
        f"{file.relative_to(ROOT)} imports {room}"
        for file in files
        if (own := file.relative_to(ROOT).parts[0]) in MAY_USE
        for room in _rooms_used(file) - MAY_USE[own] - {own}
    }
    assert wrong == set()


def test_every_room_is_known() -> None:
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(MAY_USE)


def test_rooms_of_a_run_that_stand_alone() -> None:
    wrong = set()
    for room, allowed in SELF_CONTAINED.items():
        for file in (ROOT / "runs" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.ImportFrom):
                    continue
                for name in node.names:
                    path = f"{node.module}.{name.name}".split(".")
                    if path[:2] == ["cycleqd_jax", "runs"] and path[2] not in {room, *allowed}:
                        wrong.add(f"{file.relative_to(ROOT)} imports {'.'.join(path)}")
    assert wrong == set()
