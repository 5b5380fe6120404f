"""The noisy archives against a slow transcription of their rules, and against the plain ones."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.qd import noise as module
from cycleqd_jax.qd.cvt import make_cvt
from cycleqd_jax.qd.evidence import Evidence, binomial_noise, sample_noise
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.noise import NoisyRepertoire
from cycleqd_jax.qd.repertoire import CyclicRepertoire

BINS, BATCH, TASKS = 3, 6, 2
GRID = make_grid([0.0] * TASKS, [3.0] * TASKS, BINS)
PRIOR_VARIANCE, PRIOR_COUNT = 0.1, 4.0
NOISE = sample_noise(PRIOR_VARIANCE, PRIOR_COUNT)
VALUES = [-5.0, 0.25, 1.0, 1.25, 1.5, 2.0, 2.25, 2.75, 9.0, math.nan]
CAPACITY = TASKS * BINS


def ids(numbers):
    return {"id": jnp.asarray(numbers, jnp.int32)}


def start(rows, tessellation=GRID, *, noise=NOISE, confidence=0.8, kind=NoisyRepertoire, **options):
    scores = jnp.asarray(rows, jnp.float32)
    if kind is NoisyRepertoire:
        options |= {"noise": noise, "confidence": confidence}
    return kind.init(
        ids(range(len(rows))), scores, scores, tessellation, capacity=CAPACITY, **options
    )


def offer(repertoire, numbers, samples):
    evidence = Evidence.of(jnp.asarray(samples, jnp.float32))
    return repertoire.add(ids(numbers), evidence.scores, evidence.scores, {"evidence": evidence})


def holders(repertoire):
    """Number of the elite in every cell, None if empty."""
    numbers = np.asarray(repertoire.genotypes["id"])
    return [[int(numbers[i]) if i >= 0 else None for i in row] for row in repertoire.cells]


@dataclasses.dataclass
class SlowArchives:
    """``samples[number]`` are all evaluations of an elite, ``cells[k][bin]`` a number or None."""

    samples: dict[int, list[tuple[float, ...]]]
    cells: list[list[int | None]]
    confidence: float

    def mean(self, number):
        return np.mean(np.asarray(self.samples[number], np.float64), axis=0)

    def cell(self, number, k):
        return int(np.clip(np.ceil(self.mean(number)[1 - k]) - 1, 0, BINS - 1))

    def beats(self, number, rival, k):
        means, errors, freedoms = [], [], []
        for rows in (np.asarray(self.samples[n], np.float64)[:, k] for n in (number, rival)):
            freedoms.append(PRIOR_COUNT + len(rows) - 1)
            spread = PRIOR_COUNT * PRIOR_VARIANCE + ((rows - rows.mean()) ** 2).sum()
            errors.append(spread / freedoms[-1] / len(rows))
            means.append(rows.mean())
        welch = sum(errors) ** 2 / sum(e**2 / f for e, f in zip(errors, freedoms, strict=True))
        t = (means[0] - means[1]) / np.sqrt(sum(errors))
        return scipy.stats.t.cdf(t, welch) >= self.confidence

    def offer(self, numbers):
        for k, row in enumerate(self.cells):
            winners: dict[int, int] = {}
            for number in numbers:
                c = self.cell(number, k)
                if row[c] is not None and not self.beats(number, row[c], k):
                    continue
                if c not in winners or self.mean(number)[k] > self.mean(winners[c])[k]:
                    winners[c] = number
            for c, number in winners.items():
                row[c] = number
        kept = {number for row in self.cells for number in row if number is not None}
        self.samples = {n: rows for n, rows in self.samples.items() if n in kept}

    def add(self, batch):
        whole = {n: [r for r in rows if np.isfinite(r).all()] for n, rows in batch.items()}
        self.samples |= {n: rows for n, rows in whole.items() if rows}
        self.offer([n for n in batch if whole[n]])

    def reassess(self, batch, order):
        for number, rows in batch.items():
            self.samples[number] += [row for row in rows if np.isfinite(row).all()]
        for k, row in enumerate(self.cells):
            for c, number in enumerate(row):
                if number is not None and self.cell(number, k) != c:
                    row[c] = None
        self.offer(order)


def noisy_scores(rng, shape):
    """Scores without ties, in and outside the grid, a few of them bad."""
    scores = rng.normal(1.5, 1.2, shape)
    return np.where(rng.random(shape) < 0.05, np.nan, scores).astype(np.float32)


@pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_any_history_gives_the_slow_models_archives(examples):
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 2**32 - 1), generations=st.integers(1, 6))
    def check(seed, generations):
        rng = np.random.default_rng(seed)
        repertoire = start([(0.5, 0.5)])
        slow = SlowArchives({0: [(0.5, 0.5)]}, [[None] * BINS for _ in range(TASKS)], 0.8)
        slow.offer([0])
        for t in range(generations):
            samples, again = noisy_scores(rng, (2, BATCH, TASKS)), noisy_scores(rng, (1, 3, TASKS))
            # The first pool slots that hold an elite are evaluated again, then a batch is offered.
            slots = np.flatnonzero(np.asarray(repertoire.occupied))
            chosen = np.full(3, -1)
            chosen[: len(slots[:3])] = slots[:3]
            by_slot = np.asarray(repertoire.genotypes["id"])
            slow.reassess(
                {int(by_slot[s]): [tuple(again[0, i])] for i, s in enumerate(chosen) if s >= 0},
                [int(by_slot[s]) for s in slots],
            )
            repertoire = repertoire.reassess(chosen, Evidence.of(again))
            assert holders(repertoire) == slow.cells
            numbers = list(range(1 + t * BATCH, 1 + (t + 1) * BATCH))
            slow.add({n: [tuple(r) for r in samples[:, i]] for i, n in enumerate(numbers)})
            repertoire = offer(repertoire, numbers, samples)
            assert holders(repertoire) == slow.cells
            by_slot = np.asarray(repertoire.genotypes["id"])
            occupied = np.asarray(repertoire.occupied)
            assert {int(n) for n in by_slot[occupied]} == slow.samples.keys()
            for slot in np.flatnonzero(occupied):
                rows = slow.samples[int(by_slot[slot])]
                assert int(repertoire.evidence.count[slot]) == len(rows)
                np.testing.assert_allclose(repertoire.scores[slot], np.mean(rows, 0), atol=1e-6)
            assert np.isneginf(np.asarray(repertoire.scores)[~occupied]).all()

    check()


@pytest.mark.parametrize("cells", ["grid", pytest.param("cvt", marks=pytest.mark.slow)])
def test_without_variance_the_archives_are_the_plain_ones(cells):
    rng = np.random.default_rng(0)
    first = [(0.5, 0.5), (2.5, 0.1)]
    cvt = make_cvt([0.0, 0.0], [3.0, 3.0], BINS, jax.random.key(0), num_samples=100)
    tessellation = GRID if cells == "grid" else cvt
    noisy = start(first, tessellation, noise=sample_noise(0.0), confidence=0.99)
    plain = start(first, tessellation, kind=CyclicRepertoire)
    for t in range(25):
        rows = np.where(rng.random((BATCH, TASKS)) < 0.5, rng.choice(VALUES, (BATCH, TASKS)), 0)
        rows = (rows + rng.random((BATCH, TASKS))).astype(np.float32)
        numbers = range(10 + t * BATCH, 10 + (t + 1) * BATCH)
        indices = rng.choice(np.flatnonzero(noisy.occupied), 2, replace=False)
        again = np.asarray(noisy.scores)[indices]
        noisy = noisy.reassess(indices, Evidence.of(np.stack([again] * 3)))
        noisy = offer(noisy, numbers, rows[None])
        plain = plain.add(ids(numbers), jnp.asarray(rows), jnp.asarray(rows))
        for field in ("cells", "scores", "genotypes"):
            jax.tree.map(
                np.testing.assert_array_equal, getattr(noisy, field), getattr(plain, field)
            )
    assert int(noisy.evidence.count.max()) > 10


def test_a_lucky_evaluation_does_not_replace_but_a_proven_mean_does():
    repertoire = start([(1.0, 0.5)])
    assert holders(offer(repertoire, [1], [[(1.2, 0.5)]]))[0] == [0, None, None]
    assert holders(offer(repertoire, [1], [[(1.2, 0.5)]] * 40))[0] == [0, None, None]
    proven = repertoire.reassess([0], Evidence.of(np.asarray([[(1.0, 0.5)]] * 40)))
    assert holders(offer(proven, [1], [[(1.2, 0.5)]] * 40))[0] == [1, None, None]


def test_a_row_that_fails_the_test_blocks_no_rival():
    repertoire = start([(1.0, 0.5)]).reassess([0], Evidence.of(np.full((40, 1, 2), (1.0, 0.5))))
    samples = np.full((40, 2, 2), np.nan)
    samples[0, 0], samples[:, 1] = (1.25, 0.5), (1.2, 0.5)
    assert holders(offer(repertoire, [1, 2], samples))[0][0] == 2


def test_the_lucky_are_challenged_and_the_proven_are_not():
    repertoire = start([(2.0, 0.5), (2.0, 1.5)], noise=sample_noise(0.25), confidence=0.9)
    slot = {int(n): i for i, n in enumerate(repertoire.genotypes["id"][:2])}
    proven = repertoire.reassess([slot[0]], Evidence.of(np.full((50, 1, 2), (2.0, 0.5))))
    rows = Evidence.of(np.asarray([[(1.5, 0.5), (1.5, 1.5)]]))
    assert slot[1] in np.asarray(repertoire.challenged(rows, 4))
    assert slot[0] in np.asarray(repertoire.challenged(rows, 4))
    weak = Evidence.of(np.asarray([[(0.9, 0.5), (1.5, 1.5)]]))
    np.testing.assert_array_equal(proven.challenged(weak, 4), [slot[1], -1, -1, -1])


def test_those_most_likely_to_lose_are_challenged_first():
    repertoire = start([(1.0, 0.5), (1.0, 1.5), (1.0, 2.5)], noise=sample_noise(1.0))
    slot = {int(n): i for i, n in enumerate(repertoire.genotypes["id"][:3])}
    rows = Evidence.of(np.asarray([[(1.0, 0.5), (1.9, 1.5), (1.4, 2.5), (1.0, np.nan)]]))
    np.testing.assert_array_equal(repertoire.challenged(rows, 2), [slot[1], slot[2]])
    found = np.asarray(repertoire.challenged(rows, 10))
    assert found.shape == (10,)
    assert set(found[:3]) == set(slot.values())
    assert (found[3:] == -1).all()
    nobody = Evidence.of(np.full((1, 2, TASKS), np.nan))
    assert (np.asarray(repertoire.challenged(nobody, 2)) == -1).all()


def test_an_elite_whose_mean_moved_moves_and_is_kept_where_the_rules_keep_it():
    repertoire = start([(2.9, 0.5), (1.5, 0.9)], noise=sample_noise(0.01), confidence=0.9)
    # Archive 0 has one row, cell 0: elite 0. Archive 1: elite 1 in cell 1, elite 0 in cell 2.
    assert holders(repertoire) == [[0, None, None], [None, 1, 0]]
    slot = {int(n): i for i, n in enumerate(repertoire.genotypes["id"][:2])}
    fell = repertoire.reassess([slot[0]], Evidence.of(np.full((29, 1, 2), (1.2, 0.5))))
    # Its quality fell to 1.26: elite 1 takes its cell in archive 0, and it drifts into elite 1's
    # cell in archive 1, where it is worse: displaced everywhere, so its slot is free.
    assert holders(fell) == [[1, None, None], [None, 1, None]]
    assert int(fell.num_elites) == 1
    assert np.isneginf(np.asarray(fell.scores[slot[0]])).all()
    rose = repertoire.reassess([slot[0]], Evidence.of(np.full((29, 1, 2), (2.9, 1.5))))
    # It left cell 0 of archive 0 to elite 1, which was in the pool for archive 1's sake.
    assert holders(rose) == [[1, 0, None], [None, 1, 0]]


def test_bad_evaluations_change_nothing():
    repertoire = start([(1.0, 0.5), (0.5, 2.5)])
    after = repertoire.reassess([0, 1], Evidence.of(np.full((2, 2, 2), (np.nan, 0.3))))
    jax.tree.map(np.testing.assert_array_equal, after, repertoire)
    jax.tree.map(
        np.testing.assert_array_equal,
        repertoire.reassess([-1, -1], Evidence.of(np.full((1, 2, 2), 2.0))),
        repertoire,
    )


def test_scores_alone_count_as_one_evaluation_and_other_extra_scores_are_kept():
    rows = jnp.asarray([(1.0, 0.5), (0.5, 2.5)])
    repertoire = NoisyRepertoire.init(
        ids([0, 1]), rows, rows, GRID, {"note": jnp.asarray([7, 8])}, noise=binomial_noise([5, 9]),
        keys_extra_scores=("note",),
    )  # fmt: skip
    assert set(repertoire.extra_scores) == {"note", "evidence"}
    occupied = np.asarray(repertoire.occupied)
    np.testing.assert_array_equal(repertoire.evidence.count[occupied], 1)
    np.testing.assert_array_equal(repertoire.evidence.mean[occupied], rows)
    view = repertoire.archive(0)
    assert view.extra_scores["evidence"].mean.shape == (BINS, TASKS)


def test_compiled_and_eager_agree_and_equal_shapes_compile_once():
    repertoire = start([(1.0, 0.5), (0.5, 2.5), (2.5, 1.5)])
    functions: list[Any] = [module._reassess, module._challenged, module._decide_by_test]
    for function in functions:
        function.clear_cache()

    def generation(repertoire, samples, again):
        evidence = Evidence.of(samples)
        indices = repertoire.challenged(evidence, 3)
        repertoire = repertoire.reassess(indices, Evidence.of(again))
        scores = evidence.scores
        return repertoire.add(ids(range(BATCH)), scores, scores, {"evidence": evidence})

    compiled: Any = jax.jit(generation)
    other = repertoire
    rng = np.random.default_rng(5)
    for _ in range(5):
        samples = jnp.asarray(rng.random((1, BATCH, TASKS)) * 3, jnp.float32)
        again = jnp.asarray(rng.random((1, 3, TASKS)) * 3, jnp.float32)
        repertoire, other = (
            generation(repertoire, samples, again),
            compiled(other, samples, again),
        )
        np.testing.assert_array_equal(repertoire.cells, other.cells)
        np.testing.assert_allclose(repertoire.scores, other.scores, rtol=1e-6)
    assert [function._cache_size() for function in functions] == [1, 1, 1]
    assert compiled._cache_size() == 1


def test_compiled_code_skips_an_index_where_no_elite_is():
    repertoire = start([(1.0, 0.5)])
    free = CAPACITY - 1
    reassess: Any = jax.jit(lambda r, i, e: r.reassess(i, e))
    after = reassess(repertoire, jnp.asarray([free]), Evidence.of(np.full((1, 1, 2), 2.0)))
    jax.tree.map(np.testing.assert_array_equal, after, repertoire)


class TestBadInput:
    @pytest.mark.parametrize("confidence", [0.4, 1.0, -1.0, math.nan])
    def test_confidence(self, confidence):
        with pytest.raises(ValueError, match=r"probability in \[0\.5, 1\)"):
            start([(1.0, 1.0)], confidence=confidence)

    def test_a_noise_model_of_other_tasks(self):
        with pytest.raises(ValueError, match="expected a model of 2 tasks"):
            start([(1.0, 1.0)], noise=sample_noise([0.1, 0.2, 0.3]))

    def test_a_noise_model_that_returns_something_else(self):
        wrong: Any = jax.tree_util.Partial(lambda evidence: (evidence.mean, evidence.count))
        with pytest.raises(ValueError, match="expected a Belief of three arrays"):
            start([(1.0, 1.0)], noise=wrong)

    def test_scores_that_are_not_the_evidences(self):
        evidence, scores = Evidence.of(np.ones((1, 1, 2))), jnp.full((1, 2), 0.5)
        with pytest.raises(ValueError, match=r"expected the means of the evidence"):
            start([(1.0, 1.0)]).add(ids([1]), scores, scores, {"evidence": evidence})

    def test_evidence_that_is_none(self):
        scores = jnp.ones((1, 2))
        with pytest.raises(ValueError, match=r"expected an Evidence.*found ArrayImpl"):
            start([(1.0, 1.0)]).add(ids([1]), scores, scores, {"evidence": scores})

    def test_evidence_of_other_tasks(self):
        evidence = Evidence.of(np.ones((1, 1, 3)))
        with pytest.raises(ValueError, match="expected 2 tasks, found 3"):
            start([(1.0, 1.0)]).challenged(evidence, 1)
        with pytest.raises(ValueError, match="expected 2 tasks, found 3"):
            start([(1.0, 1.0)]).reassess([0], evidence)

    def test_a_limit_of_zero(self):
        with pytest.raises(ValueError, match="limit: expected at least 1"):
            start([(1.0, 1.0)]).challenged(Evidence.of(np.ones((1, 1, 2))), 0)

    @pytest.mark.parametrize("index", [3, 99, -2])
    def test_an_index_that_is_no_elites(self, index):
        with pytest.raises(ValueError, match=f"found {index}, where none is stored"):
            start([(1.0, 1.0)]).reassess([index], Evidence.of(np.ones((1, 1, 2))))

    def test_an_elite_given_twice(self):
        with pytest.raises(ValueError, match="every elite once"):
            start([(1.0, 1.0)]).reassess([0, 0], Evidence.of(np.ones((1, 2, 2))))

    def test_not_one_row_an_index(self):
        with pytest.raises(ValueError, match="one for each of 2 rows"):
            start([(1.0, 1.0)]).reassess([0], Evidence.of(np.ones((1, 2, 2))))

    def test_another_number_of_scores(self):
        with pytest.raises(ValueError, match=r"fitnesses: expected.*\(1, 2\).*found \(1, 3\)"):
            start([(1.0, 1.0)]).add(ids([1]), jnp.ones((1, 3)), jnp.ones((1, 3)))
