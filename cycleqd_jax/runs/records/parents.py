"""The models a run starts from: whether they are still the same, and under which licence.

A run and everything rebuilt from its log are functions of the base's and the experts' weights. A
folder that was trained on since, or replaced, would silently give other models under the old
numbers; so the run keeps a digest of each.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from cycleqd_jax.runs.records.files import read_json, write_json_atomic

BASE = "base"


class ParentsError(ValueError):
    """A model is not the one the run began with."""


def record_parents(record: Path, folders: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """Write down which models a run begins with; arguments as of `check_parents`."""
    rows = {name: {"folder": folders[name], "digest": digests[name]} for name in folders}
    write_json_atomic(record, rows)


def check_parents(record: Path, folders: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """Hold the models against the run's record.

    Args:
        record: the run's file.
        folders: model to folder, ``base`` and the experts.
        digests: model to the digest of its weights and config.

    Raises:
        ParentsError: a model has changed since the run began, or there is no record.
    """
    if not record.exists():
        raise ParentsError(
            f"{record}: no such file, so nobody knows which models the run began with; restore it"
        )
    written = read_json(record)
    changed = [
        name for name, digest in digests.items() if written.get(name, {}).get("digest") != digest
    ]
    if changed:
        lines = "".join(f"  {name}: {folders[name]}\n" for name in changed)
        raise ParentsError(
            f"{record.parent}: these models are not those the run began with (other weights or "
            f"another config):\n{lines}Restore them, or start in another folder"
        )


def licence_of(folder: Path) -> str:
    """The licence a model's folder states, or ``unknown``.

    The ``license`` of the README's metadata block (with ``license_name`` where it is ``other``), or
    else the first line of a ``LICENSE`` file.
    """
    readme = folder / "README.md"
    if readme.is_file():
        block = re.match(r"---\r?\n(.*?)\r?\n---", _text(readme), re.DOTALL)
        stated = (
            dict(re.findall(r"(?m)^(license(?:_name)?):[ \t]*(\S.*?)\s*$", block[1]))
            if block
            else {}
        )
        name = stated.get("license", "").strip("\"'")
        if name == "other":
            name = stated.get("license_name", name).strip("\"'")
        if name:
            return name
    for path in sorted(folder.glob("LICEN[SC]E*")):
        lines = [line.strip(" #*") for line in _text(path).splitlines()]
        first = next((line for line in lines if line), "")
        if first:
            return f"{first[:80]} ({path.name})"
    return "unknown"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
