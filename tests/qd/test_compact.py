"""A pool without its free slots is the same pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.compact import compact, expand
from cycleqd_jax.qd.evidence import binomial_noise
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.noise import NoisyRepertoire
from cycleqd_jax.qd.repertoire import CyclicRepertoire

GRID = make_grid(np.zeros(3), np.ones(3), 4)


def batch(seed, count=8):
    random = np.random.default_rng(seed)
    genotypes = {
        "g": jnp.asarray(random.normal(size=(count, 5)).astype(np.float32)),
        "untouched": jnp.asarray(np.zeros((count, 2, 0), np.float32)),
    }
    scores = jnp.asarray(random.uniform(size=(count, 3)).astype(np.float32))
    ids = jnp.asarray(np.arange(count, dtype=np.int32) + 100 * seed)
    return genotypes, scores, {"id": ids}


def grown(cls=CyclicRepertoire, **options):
    genotypes, scores, extra = batch(0)
    pool = cls.init(
        genotypes, scores, scores, GRID, extra, capacity=40, keys_extra_scores=("id",), **options
    )
    for seed in (1, 2):
        genotypes, scores, extra = batch(seed)
        pool = pool.add(genotypes, scores, scores, extra)
    return pool


def masked(pool):
    """The pool with zeros in free slots."""
    free = ~np.asarray(pool.occupied)

    def clear(leaf):
        leaf = np.array(leaf)
        leaf[free] = 0
        return leaf

    pools = (pool.genotypes, pool.extra_scores)
    return [*map(clear, jax.tree.leaves(pools)), np.asarray(pool.scores), np.asarray(pool.cells)]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CyclicRepertoire, {}),
        pytest.param(
            NoisyRepertoire,
            {"noise": binomial_noise(16), "confidence": 0.8},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_elite_finds_back_into_its_slot_and_the_search_goes_on_alike(cls, options):
    pool = grown(cls, **options)
    small = compact(pool)
    elites = int(pool.num_elites)
    assert small.repertoire.capacity == elites < pool.capacity
    back = expand(small)
    assert type(back) is cls
    for before, after in zip(masked(pool), masked(back), strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype
    genotypes, scores, extra = batch(3)
    for one, other in zip(
        masked(pool.add(genotypes, scores, scores, extra)),
        masked(back.add(genotypes, scores, scores, extra)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_compact_repertoire_shows_the_same_archives():
    pool, small = grown(), compact(grown()).repertoire
    for k in range(3):
        for name in ("fitnesses", "descriptors"):
            np.testing.assert_array_equal(
                getattr(pool.index_archive(k), name), getattr(small.index_archive(k), name)
            )
        np.testing.assert_array_equal(
            pool.archive(k).genotypes["g"], small.archive(k).genotypes["g"]
        )
