"""The safetensors format: a length, a JSON header and raw bytes, read and written in pieces.

Headers are checked completely before a weight is read, so a truncated or corrupt file is refused
at once. Weights come through small buffers and never through a memory map: what was read does not
stay in the process, and pages of a model twice as large as the memory are never mapped.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPE_OF_CODE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CODE_OF_DTYPE = {name: code for code, name in DTYPE_OF_CODE.items()}
# Bytes per element of every code of the format, for the check of a header.
_ITEM_SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8},
}
# The bits of a float without its sign, and the bits of infinity: what is not below is not finite.
_FINITE_BITS = {
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
}
_MAX_HEADER = 100_000_000
# Small enough that a piece stays in the cache while it is checked and transposed: 2 GB/s on one
# core, and a quarter of that with pieces of 16 MB.
_PIECE_BYTES = 500_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, dtype code, shape, and the offset of its first byte."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the stored weights."""
        return np.dtype(jnp.dtype(DTYPE_OF_CODE[self.code]))

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows `start` to `stop` (of axis 0) in pieces: their slice and values (rows, ...).

        A piece is valid until the next one is read. Raises ValueError for a file that ends early.
        """
        stop = self.shape[0] if stop is None else stop
        width = math.prod(self.shape[1:])
        row_bytes = width * self.dtype.itemsize
        step = _rows_per_piece(row_bytes)
        buffer = np.empty((min(step, stop - start), *self.shape[1:]), self.dtype)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row_bytes)
            for first in range(start, stop, step):
                piece = buffer[: min(step, stop - first)]
                _read_into(file, piece, self)
                yield slice(first, first + len(piece)), piece


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, in the order of its header.

    Raises ValueError, naming file and tensor, for a file that is missing, truncated or corrupt.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, found no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path}: not a safetensors file: expected 8 bytes, found {size}")
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER:
            raise ValueError(
                f"{path}: not a safetensors file: expected a header of at most {_MAX_HEADER:,} "
                f"bytes, found a length of {length:,}"
            )
        text = file.read(length)
    if len(text) < length:
        raise ValueError(_truncated(path, 8 + length, size))
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path}: corrupt: its header is not valid JSON ({error}); get the file again"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: corrupt: expected an object as header; get the file again")
    data.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in data.items()}
    _check_extent(path, list(entries.values()), 8 + length, size)
    return entries


def first_not_finite(values: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first weight that is NaN or infinite, or None."""
    bits, mask, infinity = _FINITE_BITS[str(values.dtype)]
    magnitude = values.view(bits) & bits(mask)
    if magnitude.size == 0 or magnitude.max() < infinity:
        return None
    where = np.unravel_index(int(np.argmax(magnitude >= infinity)), values.shape)
    return tuple(int(i) for i in where)


def write_safetensors(
    path: Path,
    layout: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
    tensors: Iterator[np.ndarray],
) -> None:
    """Write one file of the tensors that `layout` announces (name, dtype, shape).

    `tensors` gives them in that order, one in memory at a time: the library's writer wants all at
    once, which would be a second, transposed copy of the model.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in layout:
        end = offset + math.prod(shape) * dtype.itemsize
        code = CODE_OF_DTYPE[str(dtype)]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, shape in layout:
            tensor = next(tensors)
            step = _rows_per_piece(tensor[:1].nbytes)
            for first in range(0, shape[0], step):
                piece = np.ascontiguousarray(tensor[first : first + step])
                file.write(piece.view(np.uint8).data)


def _rows_per_piece(row_bytes: int) -> int:
    return max(1, _PIECE_BYTES // max(row_bytes, 1))


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    try:
        code, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
        start, end = (int(n) for n in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: corrupt: tensor {name}: expected dtype, shape and two data_offsets, "
            f"found {value!r}; get the file again"
        ) from error
    item = _ITEM_SIZES.get(code)
    # A code that nobody here knows may have any size; the leaf table refuses it by name.
    if item is not None and end - start != math.prod(shape) * item:
        raise ValueError(
            f"{path}: corrupt: tensor {name}: expected {math.prod(shape) * item} bytes for "
            f"{code} of shape {shape}, found {end - start}; get the file again"
        )
    return TensorEntry(name, path, code, shape, base + start)


def _check_extent(path: Path, entries: Sequence[TensorEntry], base: int, size: int) -> None:
    """Hold the tensors against each other and the file: no gap, no overlap, no byte left over."""
    end = base
    for entry in sorted(entries, key=lambda entry: (entry.offset, math.prod(entry.shape))):
        item = _ITEM_SIZES.get(entry.code)
        if item is None:
            return
        if entry.offset != end:
            raise ValueError(
                f"{path}: corrupt: tensor {entry.name}: expected to begin at byte {end}, "
                f"found {entry.offset}; get the file again"
            )
        end += math.prod(entry.shape) * item
    if size < end:
        raise ValueError(_truncated(path, end, size))
    if size > end:
        raise ValueError(
            f"{path}: corrupt: expected {end:,} bytes, found {size:,}; get the file again"
        )


def _truncated(path: Path, expected: int, found: int) -> str:
    return f"{path}: truncated: expected {expected:,} bytes, found {found:,}; get the file again"


def _read_into(file: Any, piece: np.ndarray, entry: TensorEntry) -> None:
    view = piece.view(np.uint8).reshape(-1).data
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(
                f"{entry.file}: truncated: tensor {entry.name}: expected {len(view) - done} more "
                "bytes, found the end of the file; get the file again"
            )
        done += count


class Checkpoint:
    """The tensors of a folder, in one file or in shards that an index names.

    Args:
        folder: the model's folder.
        single: name of the file where all weights are in one.
        index: name of the index where they are in shards, or None where there is no such form.

    `source` is the file that lists the tensors, `entries` maps their names to where they lie.
    Raises ValueError for a folder without weights, a shard that is missing, a tensor that is not
    where the index puts it, and files that are truncated or corrupt.
    """

    def __init__(self, folder: Path, single: str, index: str | None) -> None:
        self.entries: Mapping[str, TensorEntry]
        if index is not None and (folder / index).is_file():
            self.source = folder / index
            self.entries = _read_index(self.source)
        elif (folder / single).is_file():
            self.source = folder / single
            self.entries = read_header(self.source)
        else:
            names = single if index is None else f"{single} or {index}"
            neither = "none" if index is None else "neither"
            raise ValueError(f"{folder}: expected weights in {names}, found {neither}")


def _read_index(path: Path) -> dict[str, TensorEntry]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8")).get("weight_map")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a valid JSON object: {error}") from error
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: expected a 'weight_map' of tensor names, found none")
    headers: dict[str, dict[str, TensorEntry]] = {}
    entries = {}
    for name, file in weight_map.items():
        shard = path.parent / str(file)
        if file not in headers:
            if not shard.is_file():
                raise ValueError(
                    f"{shard}: expected a shard that {path.name} names, found no such file"
                )
            headers[file] = read_header(shard)
        if name not in headers[file]:
            raise ValueError(
                f"{shard}: expected tensor {name}, which the index puts here; not found"
            )
        entries[name] = headers[file][name]
    return entries
