from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire
from qdax.core.emitters.repertoire_selectors.uniform_selector import UniformSelector
from qdax.utils.metrics import default_qd_metrics

from cycleqd_jax.qd import insertion, pool
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire

GRID = make_grid([0.0, 0.0], [1.0, 1.0], 4)
SCORES = jnp.asarray([[0.1, 0.9], [0.9, 0.1], [0.6, 0.6]])


def numbered(count, start=0):
    ids = jnp.arange(start, start + count)
    wide = jnp.broadcast_to(ids[:, None, None], (count, 2, 3)).astype(jnp.bfloat16)
    return {"id": ids.astype(jnp.int32), "w": wide}


def make(scores=SCORES, **options):
    return CyclicRepertoire.init(numbered(len(scores)), scores, scores, GRID, **options)


def test_pool_keeps_shapes_and_dtypes():
    repertoire = make(capacity=5)
    assert repertoire.genotypes["w"].shape == (5, 2, 3)
    assert repertoire.genotypes["w"].dtype == jnp.bfloat16
    assert repertoire.genotypes["id"].dtype == jnp.int32
    assert (repertoire.num_archives, repertoire.capacity) == (2, 5)
    assert int(repertoire.num_elites) == 3


def test_extra_scores_are_accepted_positionally_and_filtered():
    extra = {"length": jnp.asarray([7, 8, 9]), "noise": jnp.zeros(3)}
    repertoire = CyclicRepertoire.init(
        numbered(3), SCORES, SCORES, GRID, extra, keys_extra_scores=("length",)
    )
    assert set(repertoire.extra_scores) == {"length"}
    archive = repertoire.archive(0)
    occupied = np.asarray(archive.fitnesses[:, 0] > -np.inf)
    ids = np.asarray(archive.genotypes["id"])[occupied]
    np.testing.assert_array_equal(np.asarray(archive.extra_scores["length"])[occupied], ids + 7)


def test_archive_is_a_qdax_repertoire_with_its_metrics():
    archive = make().archive(1)
    assert isinstance(archive, MapElitesRepertoire)
    assert archive.genotypes["w"].shape == (4, 2, 3)
    assert archive.centroids.shape == (4, 1)
    metrics = default_qd_metrics(archive, qd_offset=0.0)
    assert float(metrics["coverage"]) == 75.0
    assert float(metrics["qd_score"]) == pytest.approx(0.9 + 0.6 + 0.1)
    # Cell 0 holds x = 0.1: quality is task 1, the descriptor task 0.
    np.testing.assert_allclose(archive.fitnesses[0], [0.9])
    np.testing.assert_allclose(archive.descriptors[0], [0.1])
    empty = np.asarray(archive.fitnesses[:, 0] == -np.inf)
    assert not np.asarray(archive.genotypes["id"])[empty].any()


@pytest.mark.parametrize("k", [0, 1])
def test_index_view_and_full_view_agree_for_a_traced_archive(k):
    repertoire = make()
    index = jax.jit(lambda r, k: r.index_archive(k))(repertoire, jnp.int32(k))
    full = repertoire.archive(k)
    np.testing.assert_array_equal(index.fitnesses, full.fitnesses)
    np.testing.assert_array_equal(index.descriptors, full.descriptors)
    np.testing.assert_array_equal(index.centroids, full.centroids)
    np.testing.assert_array_equal(index.genotypes, repertoire.cells[k])


def test_qdax_uniform_selector_works_on_archive_views():
    archive = make().archive(0)
    chosen = archive.select(jax.random.key(0), 200, UniformSelector())
    assert set(np.asarray(chosen.genotypes["id"])) == {0, 1, 2}


def test_select_draws_from_all_archives():
    scores = jnp.asarray([[0.9, 0.5], [0.1, 0.9]])
    one_cell = make_grid([0.0] * 2, [0.0] * 2, 1)
    repertoire = CyclicRepertoire.init(numbered(2), scores, scores, one_cell)
    drawn = [
        int(repertoire.select(key, 1).genotypes["id"][0])
        for key in jax.random.split(jax.random.key(0), 16)
    ]
    assert set(drawn) == {0, 1}
    assert repertoire.select(jax.random.key(0), 7).genotypes["w"].shape == (7, 2, 3)


def test_the_pool_doubles_when_it_must_and_loses_nothing():
    repertoire = make(jnp.asarray([[0.5, 0.5]]), capacity=1)
    rows = jnp.asarray([[0.1, 0.1], [0.9, 0.9], [0.7, 0.7]])
    grown = repertoire.add(numbered(3, 1), rows, rows)
    assert repertoire.capacity == 1
    assert grown.capacity == 4
    ids = np.asarray(grown.genotypes["id"])[np.asarray(grown.occupied)]
    assert set(ids) == {0, 1, 2, 3}


def test_default_capacity_covers_the_worst_case_when_it_is_small(monkeypatch):
    assert make().capacity == 8
    monkeypatch.setattr(pool, "FULL_POOL_BYTES", 0)
    assert make().capacity == 8
    wide = make_grid([0.0] * 3, [1.0] * 3, 15)
    scores = jnp.full((2, 3), 0.5)
    assert CyclicRepertoire.init(numbered(2), scores, scores, wide).capacity == 64


def test_compiled_code_refuses_a_pool_that_may_overflow():
    repertoire = make(capacity=3)
    with pytest.raises(ValueError, match=r"capacity 3 cannot grow.*capacity=8"):
        jax.jit(lambda r: r.add(numbered(3), SCORES, SCORES))(repertoire)


def test_adding_an_empty_batch_changes_nothing():
    repertoire = make()
    none = jax.tree.map(lambda x: x[:0], numbered(1))
    after = repertoire.add(none, SCORES[:0], SCORES[:0])
    jax.tree.map(np.testing.assert_array_equal, after, repertoire)


def test_the_old_repertoire_is_unchanged():
    repertoire = make()
    before = jax.tree.map(np.array, repertoire)
    repertoire.add(numbered(3, 50), SCORES + 0.05, SCORES + 0.05)
    jax.tree.map(np.testing.assert_array_equal, repertoire, before)


def test_in_place_the_pool_keeps_its_memory_and_the_old_repertoire_is_spent():
    copied, owned = make(capacity=8), make(capacity=8, in_place=True)
    grid = owned.tessellation
    memory = owned.genotypes["w"].unsafe_buffer_pointer()
    batch = numbered(3, 50), SCORES + 0.05, SCORES + 0.05
    after = owned.add(*batch)
    assert after.in_place
    assert after.genotypes["w"].unsafe_buffer_pointer() == memory
    assert owned.genotypes["w"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, after.replace(in_place=False), copied.add(*batch))
    assert not grid.edges.is_deleted()


def test_equal_shapes_compile_once():
    repertoire = make(capacity=8)
    decide: Any = insertion.decide
    write: Any = pool._write
    decide.clear_cache()
    write.clear_cache()
    for seed in range(5):
        scores = jax.random.uniform(jax.random.key(seed), (3, 2))
        repertoire = repertoire.add(numbered(3, seed), scores, scores)
    assert decide._cache_size() == 1
    assert write._cache_size() == 1


class TestBadInput:
    def test_wrong_number_of_scores(self):
        with pytest.raises(ValueError, match=r"fitnesses: expected.*\(3, 2\).*found \(3, 3\)"):
            make().add(numbered(3), SCORES, jnp.ones((3, 3)))

    def test_wrong_number_of_rows(self):
        with pytest.raises(ValueError, match=r"descriptors: expected.*\(2, 2\).*found \(3, 2\)"):
            make().add(numbered(2), SCORES, SCORES[:2])

    def test_a_leaf_of_another_shape(self):
        wrong = {**numbered(3), "w": jnp.ones((3, 2, 4), jnp.bfloat16)}
        with pytest.raises(ValueError, match=r"leaf 'w': expected shape \(2, 3\).*found \(2, 4\)"):
            make().add(wrong, SCORES, SCORES)

    def test_a_leaf_of_another_dtype(self):
        wrong = {**numbered(3), "w": jnp.ones((3, 2, 3))}
        with pytest.raises(ValueError, match=r"leaf 'w': expected dtype bfloat16.*float32"):
            make().add(wrong, SCORES, SCORES)

    def test_a_missing_leaf(self):
        with pytest.raises(ValueError, match=r"leaf 'w' of the pool is missing"):
            make().add({"id": numbered(3)["id"]}, SCORES, SCORES)

    def test_leaves_with_different_numbers_of_rows(self):
        wrong = {**numbered(3), "w": numbered(2)["w"]}
        with pytest.raises(ValueError, match=r"leaf 'w': expected 3 rows, found 2"):
            make().add(wrong, SCORES, SCORES)

    def test_a_missing_extra_score(self):
        with pytest.raises(ValueError, match=r"extra score 'length'.*found \[\]"):
            make(keys_extra_scores=("length",))

    def test_an_empty_start(self):
        with pytest.raises(ValueError, match="at least one evaluated genotype, found an empty"):
            make(SCORES[:0])

    def test_a_start_without_finite_scores(self):
        with pytest.raises(ValueError, match="found none among 3"):
            make(SCORES.at[:, 0].set(jnp.nan))

    def test_centroids_that_are_no_grid(self):
        centres: Any = jnp.ones((4, 1))
        with pytest.raises(ValueError, match=r"expected cells such as make_grid.*found ArrayImpl"):
            CyclicRepertoire.init(numbered(3), SCORES, SCORES, centres)

    def test_a_capacity_of_zero(self):
        with pytest.raises(ValueError, match="at least 1, found 0"):
            make(capacity=0)
