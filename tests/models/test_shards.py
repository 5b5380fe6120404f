import json
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from cycleqd_jax.models import shards
from cycleqd_jax.models.shards import first_not_finite, read_header, write_safetensors

RNG = np.random.default_rng(0)
TENSORS: dict[str, Any] = {
    "a": RNG.standard_normal((7, 3)).astype(np.float32),
    "b": RNG.standard_normal(5).astype(jnp.bfloat16),
    "c": RNG.standard_normal((4, 6)).astype(np.float16),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def with_header(file: Path, change: Any) -> None:
    """Rewrite the header of a file and leave its data."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("piece", [1, 30, 10_000])
def test_pieces_make_up_the_tensors(
    piece: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_PIECE_BYTES", piece)
    entries = read_header(file)
    for name, tensor in TENSORS.items():
        found = np.zeros_like(tensor)
        for at, values in entries[name].rows():
            found[at] = values
        assert found.tobytes() == tensor.tobytes()
        part = [values.copy() for _, values in entries[name].rows(1, 3)]
        np.testing.assert_array_equal(np.concatenate(part), tensor[1:3])


@pytest.mark.parametrize("piece", [1, 10_000])
def test_what_is_written_is_what_the_library_writes(
    piece: int, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    monkeypatch.setattr(shards, "_PIECE_BYTES", piece)
    layout = [(name, tensor.dtype, tensor.shape[::-1]) for name, tensor in TENSORS.items()]
    write_safetensors(tmp_path / "y.safetensors", layout, (t.T for t in TENSORS.values()))
    found = load_file(tmp_path / "y.safetensors")
    assert list(read_header(tmp_path / "y.safetensors")) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].tobytes() == np.ascontiguousarray(tensor.T).tobytes()


@pytest.mark.parametrize("keep", [0, 7, 8, 30, -1, -40])
def test_a_truncated_file_is_refused_from_its_header(keep: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.safetensors: (truncated|not a safetensors file)"):
        read_header(file)


def test_a_file_that_shrinks_under_reading_is_named(file: Path) -> None:
    entry = max(read_header(file).values(), key=lambda entry: entry.offset)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"truncated: tensor {entry.name}: expected 4 more bytes"):
        list(entry.rows())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(shape=[7, 4]), r"tensor a: expected 112 bytes .*found 84"),
        (lambda h: h["a"].update(data_offsets=[0]), "tensor a: expected dtype, shape and two"),
        (lambda h: h.update(b=3), "tensor b: expected dtype, shape and two data_offsets, found 3"),
        (lambda h: h.pop("c"), "corrupt: "),
        (lambda h: h["c"].update(data_offsets=[0, 48]), "tensor .: expected to begin at byte"),
    ],
    ids=["size", "offsets", "no object", "gap", "overlap"],
)
def test_a_corrupt_header_is_refused(change: Any, message: str, file: Path) -> None:
    with_header(file, change)
    with pytest.raises(ValueError, match=rf"x\.safetensors: corrupt: .*{message}|{message}"):
        read_header(file)


def test_what_is_no_safetensors_file_is_refused(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"not tensors at all, but long enough")
    with pytest.raises(ValueError, match=r"not a safetensors file: expected a header of at most"):
        read_header(file)
    file.write_bytes(struct.pack("<Q", 4) + b"oops")
    with pytest.raises(ValueError, match=r"corrupt: its header is not valid JSON"):
        read_header(file)
    file.write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(ValueError, match=r"corrupt: expected an object as header"):
        read_header(file)
    with pytest.raises(ValueError, match=r"gone: expected a safetensors file, found no such file"):
        read_header(tmp_path / "gone")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_the_first_weight_that_is_not_finite_is_found(dtype: Any) -> None:
    values = np.full((3, 4), np.finfo(np.float16).max, dtype)
    values[0, 0] = 0
    values[0, 1] = jnp.finfo(dtype).min
    assert first_not_finite(values) is None
    assert first_not_finite(values[:0]) is None
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        values[1:] = 1
        values[1, 2] = values[2, 0] = bad
        assert first_not_finite(values) == (1, 2)
