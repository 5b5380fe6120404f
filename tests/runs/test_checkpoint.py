import os
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cycleqd_jax.atomic import NoSpaceError
from cycleqd_jax.qd.emitter import CycleQDState
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.records.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointWarning,
    Restored,
)


class Pool(struct.PyTreeNode):
    genotypes: Any
    scores: Any
    bins: int = struct.field(pytree_node=False)


class State(struct.PyTreeNode):
    pool: Any
    key: Any
    generation: Any


def make(slots, seed=0, bins=15):
    # NumPy draws: JAX would compile for every shape, which takes longer than all the rest.
    random = np.random.default_rng(seed)
    genotypes = {
        "gains": jnp.array(random.normal(size=(slots, 7)).astype(np.float32)),
        "half": jnp.array(random.normal(size=(slots, 2, 3)).astype(jnp.bfloat16)),
        "untouched": jnp.array(np.zeros((slots, 0), np.float32)),
    }
    scores = random.normal(size=(slots, 3))
    scores[0] = [np.nan, -np.inf, -0.0]
    keys = jax.random.split(jax.random.key(seed), 4)
    return State(Pool(genotypes, scores, bins), keys, jnp.int32(seed))


def read(checkpoints, template, generation=None) -> Restored:
    restored = checkpoints.restore(template, generation)
    assert restored is not None
    return restored


def structure(tree) -> Any:
    return jax.tree.structure(tree)


def bits(tree):
    def raw(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = np.asarray(leaf)
        return leaf.dtype, leaf.shape, leaf.tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of generations 1 to 3, the newest two of which are kept."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for generation in (1, 2, 3):
            state = make(4 * generation, generation)
            assert checkpoints.save(generation, state, {"evaluations": 10 * generation})
    return tmp_path / "checkpoints"


def data_files(folder, generation):
    return sorted(p for p in (folder / f"generation_{generation:06d}").rglob("*") if p.is_file())


def test_nothing_saved_restores_to_none(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(make(1)) is None


def test_restore_is_bit_exact_with_the_checkpoints_shapes_and_the_templates_types(saved):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.generations() == [2, 3]
        assert checkpoints.latest() == 3
        restored = read(checkpoints, make(1))
        older = read(checkpoints, make(1), generation=2)
    assert restored.generation == 3
    assert restored.counters == {"evaluations": 30}
    assert type(restored.state) is State
    assert type(restored.state.pool) is Pool
    assert restored.state.pool.bins == 15
    assert restored.state.pool.genotypes["untouched"].shape == (12, 0)
    assert structure(restored.state) == structure(make(1))
    assert bits(restored.state) == bits(make(12, 3))
    assert bits(older.state) == bits(make(8, 2))


def test_restored_random_keys_go_on_as_if_nothing_had_happened(saved):
    with Checkpoints(saved) as checkpoints:
        key = read(checkpoints, make(1)).state.key[0]
    assert jax.random.uniform(key) == jax.random.uniform(make(1, 3).key[0])


def test_counters_hold_any_json_with_non_finite_floats(tmp_path):
    counters = {"best": [0.5, float("-inf")], "nested": {"ids": [1, 2], "done": False}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(0, {"x": jnp.zeros(1)}, counters)
        assert read(checkpoints, {"x": jnp.zeros(1)}).counters == counters


def test_a_state_of_empty_arrays_and_plain_numbers_comes_back(tmp_path):
    state = {"a": jnp.zeros((0, 3)), "n": 5, "f": 0.1, "none": None}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros((0, 3)), "none": None}, {})
        checkpoints.save(2, state, {})
        back = read(checkpoints, {**state, "n": 0, "f": 0.0}).state
        empty = read(checkpoints, {"a": state["a"], "none": None}, generation=1).state
    assert (back["n"], back["f"], back["none"]) == (5, 0.1, None)
    assert empty["a"].shape == (0, 3)


def test_a_generation_is_saved_once_and_never_backwards(saved):
    with Checkpoints(saved) as checkpoints:
        assert not checkpoints.save(3, make(1), {})
        with pytest.raises(ValueError, match="expected a generation after 3, found 1"):
            checkpoints.save(1, make(1), {})
        assert read(checkpoints, make(1)).counters == {"evaluations": 30}


def test_another_structure_is_refused_leaf_by_leaf_and_sets_nothing_aside(saved):
    template = make(1, bins=10)
    template = template.replace(generation=jnp.float32(0))
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(CheckpointError) as caught:
            read(checkpoints, template)
        assert checkpoints.generations() == [2, 3]
    message = str(caught.value)
    assert ".generation: expected jax array, float32, 0 axes, found jax array, int32" in message
    assert ".pool.bins: expected the static value 10, found the static value 15" in message
    assert "generation_000003" in message


def test_a_generation_that_was_not_saved_is_refused(saved):
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(CheckpointError, match=r"expected one of the generations \[2, 3\], found 9"),
    ):
        read(checkpoints, make(1), generation=9)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("index/metadata", flip_a_bit),
        ("index/metadata", lambda p: p.write_bytes(p.read_bytes()[:50])),
        ("state/manifest.ocdbt", lambda p: p.unlink()),
        ("state", shutil.rmtree),
        ("largest", flip_a_bit),
        ("largest", lambda p: p.write_bytes(p.read_bytes()[:50])),
        ("", empty_folder),
    ],
)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(saved, name, damage):
    newest = saved / "generation_000003"
    if name == "largest":
        damage(max(data_files(saved, 3), key=lambda p: p.stat().st_size))
    else:
        damage(newest / name)
    with Checkpoints(saved) as checkpoints:
        with pytest.warns(CheckpointWarning, match=r"generation_000003 is damaged"):
            restored = read(checkpoints, make(1))
        assert restored.generation == 2
        assert bits(restored.state) == bits(make(8, 2))
        assert (saved / "damaged_generation_000003").is_dir()
        assert checkpoints.save(3, make(12, 3), {})  # the run goes on from 2 and saves 3 anew
    with Checkpoints(saved) as checkpoints:
        assert bits(read(checkpoints, make(1)).state) == bits(make(12, 3))


@pytest.mark.parametrize("fault", ["flip", "truncate", "remove", "add"])
def test_damage_to_any_file_is_noticed(saved, fault):
    newest = saved / "generation_000003"
    for path in data_files(saved, 3):
        content = path.read_bytes()
        if fault == "flip":
            flip_a_bit(path)
        elif fault == "truncate":
            path.write_bytes(content[: len(content) // 2])
        elif fault == "add":
            path.with_name(path.name + ".more").touch()
        elif path.name != "files.json":  # without it the other files are trusted
            path.unlink()
        else:
            continue
        damaged = pytest.warns(CheckpointWarning, match="generation_000003 is damaged")
        with Checkpoints(saved) as checkpoints, damaged:
            assert read(checkpoints, make(1)).generation == 2
        (saved / "damaged_generation_000003").rename(newest)
        path.write_bytes(content)
        path.with_name(path.name + ".more").unlink(missing_ok=True)
    with Checkpoints(saved) as checkpoints:
        assert bits(read(checkpoints, make(1)).state) == bits(make(12, 3))


def test_a_save_killed_before_its_manifest_counts_if_it_can_be_read(saved):
    (saved / "generation_000003" / "files.json").unlink()
    with Checkpoints(saved) as checkpoints:
        assert bits(read(checkpoints, make(1)).state) == bits(make(12, 3))
    (saved / "generation_000003" / "index" / "metadata").unlink()
    with Checkpoints(saved) as checkpoints, pytest.warns(CheckpointWarning, match="not found"):
        assert read(checkpoints, make(1)).generation == 2


def test_an_error_that_is_no_damage_sets_nothing_aside(saved, monkeypatch):
    with Checkpoints(saved) as checkpoints:

        def busy(*args, **kwargs):
            raise MemoryError("no memory")

        monkeypatch.setattr(checkpoints._manager, "restore", busy)
        with pytest.raises(MemoryError):
            read(checkpoints, make(1))
        assert checkpoints.generations() == [2, 3]


@pytest.mark.filterwarnings("ignore::cycleqd_jax.runs.records.checkpoint.CheckpointWarning")
def test_when_every_checkpoint_is_damaged_the_run_does_not_start_over_silently(saved):
    for generation in (2, 3):
        (saved / f"generation_{generation:06d}" / "index" / "metadata").unlink()
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be read.*000003.*000002"),
    ):
        read(checkpoints, make(1))


def test_what_a_killed_save_left_is_ignored_and_cleared(saved):
    shutil.copytree(
        saved / "generation_000003", saved / "generation_000004.orbax-checkpoint-tmp" / "state"
    )
    with Checkpoints(saved) as checkpoints:
        assert read(checkpoints, make(1)).generation == 3
        checkpoints.save(4, make(16, 4), {})
        assert read(checkpoints, make(1)).generation == 4
    assert not list(saved.glob("*tmp*"))


def test_a_full_disk_is_said_and_older_checkpoints_stay(saved, monkeypatch):
    with Checkpoints(saved) as checkpoints:

        def full(*args, **kwargs):
            (saved / "generation_000004.orbax-checkpoint-tmp").mkdir()
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._manager, "save", full)
            with pytest.raises(NoSpaceError, match=r"writing .*generation_000004: [\d,]+ bytes"):
                checkpoints.save(4, make(16, 4), {})
        assert sorted(os.listdir(saved)) == ["generation_000002", "generation_000003"]
        assert checkpoints.save(4, make(16, 4), {})
        assert read(checkpoints, make(1)).generation == 4


def test_a_truly_full_disk_leaves_the_run_resumable(small_disk):
    disk = small_disk(1)
    noise = np.random.default_rng(0).normal(size=30_000)  # 240 kB that do not compress
    more = np.random.default_rng(1).normal(size=120_000)
    with Checkpoints(disk / "c") as checkpoints:
        checkpoints.save(1, {"x": noise}, {})
        with pytest.raises(NoSpaceError, match="make room and start the same command again"):
            checkpoints.save(2, {"x": more}, {})
        assert os.listdir(disk / "c") == ["generation_000001"]
        assert checkpoints.save(2, {"x": noise + 1}, {})
        assert (read(checkpoints, {"x": noise}).state["x"] == noise + 1).all()


def test_the_newest_stay_and_every_third_for_good(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2, keep_every=3) as checkpoints:
        for generation in range(1, 9):
            checkpoints.save(generation, {"x": jnp.full(1, generation)}, {})
        assert checkpoints.generations() == [3, 6, 7, 8]
        assert read(checkpoints, {"x": jnp.zeros(1, int)}, generation=3).state["x"] == 3
    with pytest.raises(ValueError, match="keep_every: expected at least 1 generation, found 0"):
        Checkpoints(tmp_path / "c", keep_every=0)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep: expected at least 1 checkpoint, found 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_grown_cyclic_repertoire_and_its_emitter_state_come_back(tmp_path):
    grid = make_grid(jnp.zeros(3), jnp.ones(3), 5)

    def batch(seed):
        random = np.random.default_rng(seed)
        genotypes = {"g": jnp.array(random.normal(size=(8, 4)).astype(np.float32))}
        return genotypes, jnp.array(random.uniform(size=(8, 3)).astype(np.float32))

    genotypes, scores = batch(0)
    start = CyclicRepertoire.init(genotypes, scores, scores, grid, capacity=8)
    state = {"repertoire": start, "emitter": CycleQDState(jnp.int32(0)), "key": jax.random.key(0)}
    genotypes, scores = batch(1)
    grown = start.add(genotypes, scores, scores)
    assert grown.scores.shape[0] > start.scores.shape[0]
    saved = {"repertoire": grown, "emitter": CycleQDState(jnp.int32(9)), "key": jax.random.key(5)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(9, saved, {})
        back = read(checkpoints, state).state
    assert structure(back) == structure(saved)
    assert bits(back) == bits(saved)
    genotypes, scores = batch(2)
    again = back["repertoire"].add(genotypes, scores, scores)
    assert bits(again) == bits(grown.add(genotypes, scores, scores))
