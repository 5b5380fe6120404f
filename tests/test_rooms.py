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
