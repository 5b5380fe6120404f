"""Decompositions kept on disk, keyed by the content of the checkpoints they were made from.

An entry is one safetensors file, ``KEY.safetensors``, whose header holds the report, the ranks and
a checksum over all of it. The key is a hash of the checkpoints' bytes, of the settings and of the
format, never of paths or times: a folder that was moved is found again, one that was trained on is
not.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cycleqd_jax.atomic import NoSpaceError, atomic_file
from cycleqd_jax.merging.decomposition import DecompositionReport
from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors, is_factors
from cycleqd_jax.merging.task_vector import leaf_paths

FORMAT = 1
"""Raise it when a decomposition of equal settings means something else than before."""

_SETTINGS_FILES = ("config.json", "adapter_config.json")

Decomposition = tuple[Any, DecompositionReport]


def cached_decomposition(
    cache: Path | None,
    checkpoints: Sequence[str],
    settings: Mapping[str, Any],
    roles: Any,
    compute: Callable[[], Decomposition],
    say: Callable[[str], None] | None = None,
) -> Decomposition:
    """The decomposition of these checkpoints, from disk where it is there and whole.

    What comes from disk is NumPy arrays.

    A damaged entry is reported, made again and replaced. An entry that cannot be kept (no space, no
    permission) costs a line and nothing else.

    Args:
        cache: folder of the entries, under which ``bases/`` is used; None computes and keeps
            nothing.
        checkpoints: digests of the base and of every expert, in order, see `checkpoint_digest`.
        settings: what else the result depends on: rank, noise, method; plain JSON values.
        roles: tree of the parameters' structure of "matrix" | "vector".
        compute: makes the decomposition.
        say: takes a line for the user; the terminal's standard error by default.
    """
    if cache is None:
        return jax.block_until_ready(compute())
    say = say or _to_stderr
    path = cache / "bases" / f"{decomposition_key(checkpoints, settings)}.safetensors"
    if path.exists():
        try:
            return read_basis(path, roles)
        except (ValueError, OSError, SafetensorError) as error:
            say(f"warning: {path} is damaged ({error}); the decomposition is made again")
    found = jax.block_until_ready(compute())
    try:
        size = _keep(path, *found)
        say(f"the decomposition is kept in {path} ({size / 1e6:,.1f} MB)")
    except OSError as error:
        say(f"warning: the decomposition is not kept for later runs: {error}")
    return found


def decomposition_key(checkpoints: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Hash of the checkpoints' digests in order, the settings and the format."""
    parts = {
        "format": FORMAT,
        "settings": dict(settings),
        "checkpoints": list(checkpoints),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def checkpoint_digest(folder: Path) -> str:
    """Hash of a checkpoint's weights (headers and bytes) and of its config.

    Files are read side by side, at the speed of the disk or of about 2 GB/s a core.

    Raises:
        ValueError: a folder without safetensors files.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder}: expected safetensors files, found none")
    files = [*weights, *(folder / name for name in _SETTINGS_FILES if (folder / name).exists())]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digests = list(pool.map(_file_digest, files))
    named = [[file.name, digest] for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_stderr(line: str) -> None:
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def _keep(path: Path, basis: Any, report: DecompositionReport) -> int:
    """Write an entry where there is ample room, and return its size in bytes.

    Raises:
        OSError: it does not fit, or the folder is not writable.
    """
    size = basis_size(basis, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < 2 * size:  # a cache must not be what fills the disk
        raise NoSpaceError(
            f"it takes {size / 1e6:,.1f} MB and {path.parent} has {free / 1e6:,.1f} MB free; "
            "it is kept where at least twice its size is free"
        )
    write_basis(path, basis, report)
    return size


def basis_size(basis: Any, report: DecompositionReport) -> int:
    """Bytes of the arrays that `write_basis` writes."""
    return sum(array.nbytes for array in (*jax.tree.leaves(basis), *report.error.values()))


def write_basis(path: Path, basis: Any, report: DecompositionReport) -> None:
    """Write a basis and its report, whole or not at all.

    Raises:
        OSError: it does not fit, or the folder is not writable.
    """
    nodes = jax.tree.leaves(basis, is_leaf=is_factors)
    paths = leaf_paths(jax.tree.map(lambda _: 0, basis, is_leaf=is_factors))
    arrays: dict[str, np.ndarray] = {}
    for name, node in zip(paths, nodes, strict=True):
        for field in _fields(node):
            arrays[f"{name}.{field}"] = np.ascontiguousarray(getattr(node, field))
    arrays |= {f"{name}.error": np.ascontiguousarray(e) for name, e in report.error.items()}
    ranks = json.dumps(report.ranks, sort_keys=True)
    metadata = {"ranks": ranks, "sha256": _checksum(ranks, arrays)}
    with atomic_file(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)


def read_basis(path: Path, roles: Any) -> Decomposition:
    """Read back what `write_basis` wrote, as NumPy arrays; ``roles`` as of `cached_decomposition`.

    Raises:
        ValueError: it is not what was written, or was written for other parameters.
        OSError, SafetensorError: it cannot be read at all.
    """
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ranks_text = metadata.get("ranks", "")
    expected, found = metadata.get("sha256"), _checksum(ranks_text, arrays)
    if expected != found:
        raise ValueError(f"expected the checksum {(expected or 'none')[:12]}, found {found[:12]}")
    ranks = {name: tuple(blocks) for name, blocks in json.loads(ranks_text).items()}
    treedef: Any = jax.tree.structure(roles)
    nodes: list[Any] = []
    try:
        for name, role in zip(leaf_paths(roles), jax.tree.leaves(roles), strict=True):
            if role == "vector":
                nodes.append(VectorFactors(delta=arrays.pop(f"{name}.delta")))
                continue
            u, v = (arrays.pop(f"{name}.{field}") for field in ("u", "v"))
            nodes.append(MatrixFactors(u=u, v=v, ranks=ranks[name]))
        errors = {name: arrays[f"{name}.error"] for name in ranks}
    except KeyError as error:
        raise ValueError(
            f"expected the entry {error}, found none: it belongs to other parameters"
        ) from error
    return treedef.unflatten(nodes), DecompositionReport(ranks=ranks, error=errors)


def _fields(node: Any) -> tuple[str, ...]:
    return ("u", "v") if isinstance(node, MatrixFactors) else ("delta",)


def _checksum(ranks: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Hash of names, shapes, bits and ranks."""

    def one(name: str) -> str:
        array = arrays[name]
        head = f"{name} {array.dtype.name} {array.shape}".encode()
        digest = hashlib.sha256(head)
        digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digests = list(pool.map(one, sorted(arrays)))
    return hashlib.sha256("\n".join([ranks, *digests]).encode()).hexdigest()
