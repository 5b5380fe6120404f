"""JSON of run data, written whole or not at all.

JSON has no NaN and no infinity. Run data may hold both (a score that is not finite is recorded),
so they are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which `from_json`
turns back into floats. A real string with one of these spellings is refused on writing.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cycleqd_jax.atomic import write_text_atomic

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any, where: str = "value") -> Any:
    """The value in plain JSON types: arrays as lists, paths and non-finite floats as strings.

    Raises:
        ValueError: for a type JSON cannot hold, a key that is no string, or a string spelled like
            an encoded non-finite float; the message names the entry.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # NumPy and JAX arrays and scalars
        value = np.asarray(value).tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _spell(value)
    if isinstance(value, str):
        if value in _NON_FINITE:
            raise ValueError(
                f"{where}: the string {value!r} is reserved for the float of that name"
            )
        return value
    if isinstance(value, Mapping):
        return {_key(k, where): to_json(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{where}: expected numbers, strings, lists, mappings or arrays, "
        f"found {type(value).__name__}"
    )


def from_json(value: Any) -> Any:
    """The inverse of `to_json` on what JSON gives back (lists stay lists)."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        return {k: from_json(v) for k, v in value.items()}
    return value


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where}: expected string keys, found {key!r} ({type(key).__name__})")
    return key


def write_json_atomic(path: Path, data: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Writes the mapping as indented JSON, atomically; non-finite floats as described above."""
    plain = to_json(data, path.name)
    text = json.dumps(plain, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False)
    write_text_atomic(path, text + "\n")


def read_json(path: Path) -> Any:
    """Reads what `write_json_atomic` wrote.

    Raises:
        ValueError: if the file is not JSON; the message names it.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error})") from error
