"""Entries of the decomposition cache: found again, made again, never believed when damaged."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cycleqd_jax.merging.spectral import decompose, gain_layout
from cycleqd_jax.runs.basis_cache import (
    cached_decomposition,
    checkpoint_digest,
    decomposition_key,
)

ROLES = {"norm": "vector", "untouched": "matrix", "w": "matrix"}
SETTINGS = {"rank": None, "noise": 1e-7, "method": "gram"}
RNG = np.random.default_rng(0)


def expert(rank: int) -> dict[str, np.ndarray]:
    return {
        "norm": RNG.normal(size=(2, 5)).astype(np.float32),
        "untouched": np.zeros((4, 3), np.float32),
        "w": (RNG.normal(size=(2, 6, rank)) @ RNG.normal(size=(2, rank, 5))).astype(np.float32),
    }


EXPERTS = [expert(2), expert(3)]


class Maker:
    """Counts how often it had to decompose."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Any:
        self.calls += 1
        return decompose(EXPERTS, ROLES)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = []
    for name in ("base", "one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": RNG.normal(size=(3, 4)).astype(np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        made.append(folder)
    return made


def content(folders: list[Path]) -> list[str]:
    return [checkpoint_digest(folder) for folder in folders]


def entry(cache: Path) -> Path:
    (path,) = (cache / "bases").iterdir()
    return path


def test_a_second_start_finds_the_same_decomposition(tmp_path: Path, folders: list[Path]) -> None:
    cache, make = tmp_path / "cache", Maker()
    lines: list[str] = []
    first = cached_decomposition(cache, content(folders), SETTINGS, ROLES, make, lines.append)
    second = cached_decomposition(cache, content(folders), SETTINGS, ROLES, make, lines.append)
    assert make.calls == 1
    assert gain_layout(second[0]) == gain_layout(first[0])
    assert second[0]["untouched"].ranks == (0, 0)
    jax.tree.map(np.testing.assert_array_equal, second[0], first[0])
    assert second[1].ranks == first[1].ranks
    for path, error in first[1].error.items():
        np.testing.assert_array_equal(second[1].error[path], error)
    (line,) = lines
    assert str(entry(cache)) in line
    assert line.endswith("MB)")


def test_without_a_cache_nothing_is_written(tmp_path: Path, folders: list[Path]) -> None:
    before = sorted(tmp_path.rglob("*"))
    cached_decomposition(None, content(folders), SETTINGS, ROLES, Maker())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("change", [{"rank": 2}, {"noise": 1e-3}, {"method": "svd"}])
def test_other_settings_are_another_entry(folders: list[Path], change: dict[str, Any]) -> None:
    key = decomposition_key(content(folders), SETTINGS)
    assert decomposition_key(content(folders), {**SETTINGS}) == key
    assert decomposition_key(content(folders), {**SETTINGS, **change}) != key


def test_the_key_follows_content_and_order_not_place_or_time(folders: list[Path]) -> None:
    key = decomposition_key(content(folders), SETTINGS)
    base, one, two = folders
    moved = shutil.copytree(one, one.with_name("moved"))
    assert decomposition_key(content([base, moved, two]), SETTINGS) == key
    assert decomposition_key(content([base, two, one]), SETTINGS) != key
    weights = one / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit of one weight; size, names and shapes stay
    weights.write_bytes(data)
    assert decomposition_key(content(folders), SETTINGS) != key


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected safetensors files, found none"):
        checkpoint_digest(tmp_path)


def flip_weight(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_rank(data: bytes) -> bytes:
    place = data.index(b"sha256") - 12
    return data.replace(b"[2, 3]", b"[3, 2]", 1) if b"[2, 3]" in data else data[:place]


@pytest.mark.parametrize("damage", [flip_weight, flip_rank, lambda data: data[:-40], lambda _: b""])
def test_a_damaged_entry_is_reported_and_replaced(
    tmp_path: Path, folders: list[Path], damage: Any
) -> None:
    cache, make = tmp_path / "cache", Maker()
    lines: list[str] = []
    whole = cached_decomposition(cache, content(folders), SETTINGS, ROLES, make, lines.append)
    path = entry(cache)
    good = path.read_bytes()
    assert damage(good) != good
    path.write_bytes(damage(good))
    again = cached_decomposition(cache, content(folders), SETTINGS, ROLES, make, lines.append)
    assert make.calls == 2
    assert f"warning: {path} is damaged" in lines[1]
    jax.tree.map(np.testing.assert_array_equal, again[0], whole[0])
    cached_decomposition(cache, content(folders), SETTINGS, ROLES, make, lines.append)
    assert make.calls == 2


@pytest.mark.parametrize("other", [{"bias": "vector"}, {"head": "matrix"}])
def test_an_entry_of_other_parameters_is_made_again(
    tmp_path: Path, folders: list[Path], other: dict[str, str]
) -> None:
    cache, make = tmp_path / "cache", Maker()
    lines: list[str] = []
    cached_decomposition(cache, content(folders), SETTINGS, ROLES, make, lines.append)
    roles = {**ROLES, **other}
    cached_decomposition(cache, content(folders), SETTINGS, roles, make, lines.append)
    assert make.calls == 2
    assert "is damaged (expected the entry" in lines[1]


def test_a_run_goes_on_where_nothing_can_be_kept(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    lines: list[str] = []
    cache = tmp_path / "cache"
    cached_decomposition(cache, content(folders), SETTINGS, ROLES, Maker(), lines.append)
    (line,) = lines
    assert line.startswith("warning: the decomposition is not kept")
    assert list((cache / "bases").iterdir()) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    cached_decomposition(blocked, content(folders), SETTINGS, ROLES, Maker(), lines.append)
    assert lines[1].startswith("warning: the decomposition is not kept")
