import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.utils.metrics import default_qd_metrics

from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.metrics import acceptance, qd_metrics
from cycleqd_jax.qd.repertoire import CyclicRepertoire


@pytest.mark.parametrize("tasks", [2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_agrees_with_qdax_on_every_archive(tasks, offset):
    scores = jax.random.normal(jax.random.key(tasks), (40, tasks))
    grid = make_grid([-1.0] * tasks, [1.0] * tasks, 4)
    repertoire = CyclicRepertoire.init(jnp.arange(40), scores, scores, grid)
    ours = qd_metrics(repertoire, offset)
    for k in range(tasks):
        theirs = default_qd_metrics(repertoire.archive(k), offset)
        assert float(ours["coverage"][k]) == pytest.approx(float(theirs["coverage"]) / 100)
        assert float(ours["qd_score"][k]) == pytest.approx(float(theirs["qd_score"]), rel=1e-5)
        assert float(ours["best"][k]) == float(theirs["max_fitness"])
    distinct = np.unique(np.asarray(repertoire.cells))
    assert int(ours["num_elites"]) == (distinct >= 0).sum()


def test_an_empty_archive_has_no_best_and_no_score():
    scores = jnp.ones((1, 2))
    repertoire = CyclicRepertoire.init(
        jnp.arange(1), scores, scores, make_grid([0.0] * 2, [1.0] * 2, 3)
    )
    metrics = qd_metrics(repertoire.replace(cells=jnp.full((2, 3), -1)), 5.0)
    np.testing.assert_array_equal(metrics["coverage"], [0.0, 0.0])
    np.testing.assert_array_equal(metrics["qd_score"], [0.0, 0.0])
    np.testing.assert_array_equal(metrics["best"], [-np.inf, -np.inf])
    assert int(metrics["num_elites"]) == 0


def bred(rows, **options):
    """Two tasks, one parent (number 0) with scores (1, 1), and a batch with numbers from 1."""
    grid = make_grid([0.0] * 2, [3.0] * 2, 3)
    one = jnp.ones((1, 2))
    options = {"keys_extra_scores": ("id",), "capacity": 2, **options}
    start = CyclicRepertoire.init(
        jnp.zeros(1), one, one, grid, {"id": jnp.zeros(1, jnp.int32)}, **options
    )
    scores = jnp.asarray(rows)
    ids = jnp.arange(1, len(rows) + 1, dtype=jnp.int32)
    return start.add(jnp.ones(len(rows)), scores, scores, {"id": ids}), ids


# Beats the parent in both archives; better nowhere; new cell in archive 0 and best in 1; no number.
ROWS = [(1.5, 1.0), (0.5, 0.5), (0.5, 2.5), (np.nan, 9.0)]


def test_acceptance_by_archive_and_by_operator():
    repertoire, ids = bred(ROWS)
    # (1.5, 1): in archive 0 it beats the parent; in archive 1 it opens the cell of task 0 above 1.
    by_archive = acceptance(repertoire, ids, jnp.asarray([0, 0, 1, 1]), 2)
    np.testing.assert_array_equal(by_archive.offered, [2, 2])
    np.testing.assert_array_equal(by_archive.accepted, [1, 1])
    np.testing.assert_array_equal(by_archive.entries, [[1, 1], [1, 1]])
    np.testing.assert_array_equal(by_archive.rate, [0.5, 0.5])
    by_operator = acceptance(repertoire, ids, jnp.asarray([2, 0, 2, -1]), 4)
    np.testing.assert_array_equal(by_operator.offered, [1, 0, 2, 0])
    np.testing.assert_array_equal(by_operator.accepted, [0, 0, 2, 0])
    np.testing.assert_array_equal(by_operator.rate, [0.0, np.nan, 1.0, np.nan])


def test_acceptance_is_what_the_decision_says():
    rng = np.random.default_rng(0)
    repertoire, _ = bred([(0.1, 0.1)], capacity=None)
    add = jax.jit(lambda r, s, i: r.add(jnp.zeros(6), s, s, {"id": i}))
    accepted = np.zeros(3)
    for t in range(6):
        scores = jnp.asarray(rng.uniform(0, 3, size=(6, 2)), jnp.float32)
        ids = jnp.arange(6, dtype=jnp.int32) + 10 * (t + 1)
        groups = jnp.asarray(rng.integers(0, 3, size=6))
        decision = repertoire.decide(scores)
        repertoire = add(repertoire, scores, ids)
        found = acceptance(repertoire, ids, groups, 3)
        entered = np.stack([[row in e for row in range(6)] for e in np.asarray(decision.entrant)])
        for g in range(3):
            member = np.asarray(groups) == g
            assert int(found.offered[g]) == member.sum()
            assert int(found.accepted[g]) == (member & np.asarray(decision.accepted)).sum()
            np.testing.assert_array_equal(found.entries[g], (entered & member).sum(axis=1))
        accepted += np.asarray(found.accepted)
    assert accepted.sum() > 6


def test_a_number_left_in_a_free_slot_is_not_an_elite():
    repertoire, _ = bred([(2.5, 2.5), (2.9, 2.9)])
    freed = repertoire.replace(cells=jnp.full((2, 3), -1))
    assert 2 in np.asarray(freed.extra_scores["id"])
    found = acceptance(freed, jnp.asarray([2], jnp.int32), jnp.asarray([0]), 1)
    assert (int(found.offered[0]), int(found.accepted[0])) == (1, 0)


def test_number_zero_is_not_mistaken_for_a_slot_that_was_never_used():
    repertoire, _ = bred([(2.5, 2.5)])
    held = repertoire.replace(
        cells=jnp.full((2, 3), 1), extra_scores={"id": jnp.zeros(2, jnp.int32)}
    )
    found = acceptance(held, jnp.asarray([0], jnp.int32), jnp.asarray([0]), 1)
    assert int(found.accepted[0]) == 1


class TestBadInput:
    def test_no_numbers_kept(self):
        repertoire, ids = bred(ROWS, keys_extra_scores=())
        with pytest.raises(ValueError, match=r"keeps the extra score 'id'.*found \[\]"):
            acceptance(repertoire, ids, ids, 2)

    def test_groups_of_some_children_only(self):
        repertoire, ids = bred(ROWS)
        # As from a MultiEmitter, whose info has rows for one emitter's children alone.
        with pytest.raises(ValueError, match=r"a group for each of 4 children .*, found 3"):
            acceptance(repertoire, ids, jnp.zeros(3, jnp.int32), 2)
