"""What repeated evaluations say of an elite: counts, means, variances, and who is likely better.

A score is one draw from a distribution. Several draws are kept as their count, mean and sum of
squared deviations; a *noise model* turns these into a `Belief` about the true mean, and
`probability_better` compares two beliefs. A noise model is any pytree that can be called,
``Evidence -> Belief``: `sample_noise`, `binomial_noise`, or a ``jax.tree_util.Partial`` of yours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import ndtr
from jaxtyping import Array, Float


class Evidence(struct.PyTreeNode):
    """The evaluations of B genotypes on K tasks, summed up.

    Attributes:
        count: (B,) int32, evaluations with K finite scores; the others never enter.
        mean: (B, K) float32, 0 where the count is 0.
        m2: (B, K) float32, sum of the squared deviations from the mean.
    """

    count: Any
    mean: Any
    m2: Any

    @classmethod
    def of(cls, samples: Any) -> "Evidence":
        """Evidence of n evaluations each.

        An evaluation with a score that is not finite is left out as a whole. Equal evaluations
        give exactly their value as the mean and exactly 0 as the variance.

        Args:
            samples: (n, B, K) scores, n >= 1.

        Raises:
            ValueError: another number of axes, or no evaluation.
        """
        if jnp.ndim(samples) != 3 or jnp.shape(samples)[0] < 1:
            raise ValueError(
                "samples: expected scores of shape (evaluations, genotypes, tasks) with at least "
                f"one evaluation, found {jnp.shape(samples)}"
            )
        return _summarise(jnp.asarray(samples, jnp.float32))

    @property
    def scores(self) -> Float[Array, "batch tasks"]:
        """The means; NaN where there is no evaluation, so such a row never enters an archive."""
        return jnp.where((self.count > 0)[:, None], self.mean, jnp.nan)

    @property
    def variance(self) -> Float[Array, "batch tasks"]:
        """Unbiased sample variance of one evaluation; NaN below two evaluations."""
        freedom = (self.count - 1)[:, None]
        return jnp.where(freedom > 0, self.m2 / jnp.maximum(freedom, 1), jnp.nan)

    def merge(self, other: "Evidence") -> "Evidence":
        """Evidence of both sets of evaluations, row by row.

        The pairwise update of Chan, Golub and LeVeque (The American Statistician 37, 1983): no
        difference of large sums is taken, so float32 suffices.

        Args:
            other: (B,) and (B, K) of the same shapes.

        Raises:
            ValueError: the shapes differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"evidence: expected {self.mean.shape} (genotypes, tasks) to merge with, found "
                f"{other.mean.shape}"
            )
        return _merge(self, other)


@jax.jit
def _summarise(samples: Float[Array, "evaluations batch tasks"]) -> Evidence:
    valid = jnp.isfinite(samples).all(axis=2)
    count = jnp.sum(valid, axis=0, dtype=jnp.int32)
    mask = valid[:, :, None]
    # Deviations are taken from the first valid evaluation: sums stay small, and equal evaluations
    # leave no rounding behind.
    first = jnp.argmax(valid, axis=0)[None, :, None]
    origin = jnp.where(count[:, None] > 0, jnp.take_along_axis(samples, first, axis=0)[0], 0.0)
    deviation = jnp.where(mask, samples - origin, 0.0)
    shift = jnp.sum(deviation, axis=0) / jnp.maximum(count, 1)[:, None]
    m2 = jnp.sum(jnp.where(mask, (deviation - shift) ** 2, 0.0), axis=0)
    return Evidence(count=count, mean=origin + shift, m2=m2)


@jax.jit
def _merge(a: Evidence, b: Evidence) -> Evidence:
    count = a.count + b.count
    size = jnp.maximum(count, 1)[:, None]
    delta = b.mean - a.mean
    # Divided last, a mean that float32 holds exactly comes out exactly; so does what is merged
    # into nothing.
    alone = (a.count == 0)[:, None]
    shift = jnp.where(alone, delta, delta * b.count[:, None] / size)
    return Evidence(
        count=count, mean=a.mean + shift, m2=a.m2 + b.m2 + delta * a.count[:, None] * shift
    )


class Belief(NamedTuple):
    """What is believed of the true mean of every genotype's score on every task.

    Attributes:
        mean: (B, K) its centre.
        variance: (B, K) its squared standard error.
        freedom: (B, K) degrees of freedom of that error: Student's t; infinite: normal.
    """

    mean: Float[Array, "..."]
    variance: Float[Array, "..."]
    freedom: Float[Array, "..."]


NoiseModel = Callable[[Evidence], Belief]


class SampleNoise(struct.PyTreeNode):
    """Noise of unknown size, learnt from the evaluations; make one with `sample_noise`.

    Attributes:
        prior_variance: float32, () or (K,).
        prior_count: float32 scalar.
    """

    prior_variance: Any
    prior_count: Any

    def __call__(self, evidence: Evidence) -> Belief:
        """Belief with the moderated variance of `sample_noise`."""
        count = jnp.maximum(evidence.count, 1).astype(jnp.float32)[:, None]
        freedom = self.prior_count + count - 1
        variance = (self.prior_count * self.prior_variance + evidence.m2) / freedom
        return Belief(
            evidence.mean, variance / count, jnp.broadcast_to(freedom, evidence.mean.shape)
        )


def sample_noise(prior_variance: Any, prior_count: float = 4.0) -> SampleNoise:
    """Noise model for any stochastic score: the sample variance, steadied by a prior.

    With n evaluations of sum of squared deviations M2, the variance of one evaluation is taken as
    ``(d0 s0^2 + M2) / (d0 + n - 1)`` with ``d0 + n - 1`` degrees of freedom, where ``s0^2`` is
    the prior variance and ``d0`` the prior count (Smyth, Statistical Applications in Genetics and
    Molecular Biology 3, 2004: the moderated t). So one evaluation, whose variance is unknown, has
    exactly the prior variance, and two equal ones do not claim certainty.

    Args:
        prior_variance: the variance of one evaluation expected beforehand, in squared units of
            the score, one number or one a task (K,). 0: scores are exact until evaluations of one
            genotype differ.
        prior_count: how many degrees of freedom the prior is worth.

    Raises:
        ValueError: a variance that is negative or not finite, or a count that is not positive
            and finite.
    """
    variance = np.asarray(prior_variance, np.float32)
    if variance.ndim > 1 or not np.isfinite(variance).all() or (variance < 0).any():
        raise ValueError(
            "prior_variance: expected one finite number or one a task, not negative, found "
            f"{prior_variance}"
        )
    if not 0 < prior_count < np.inf:
        raise ValueError(f"prior_count: expected a positive number, found {prior_count}")
    return SampleNoise(jnp.asarray(variance), jnp.asarray(prior_count, jnp.float32))


class BinomialNoise(struct.PyTreeNode):
    """Noise of a share of solved problems; make one with `binomial_noise`.

    Attributes:
        problems: float32, () or (K,).
    """

    problems: Any

    def __call__(self, evidence: Evidence) -> Belief:
        """Belief of `binomial_noise`."""
        trials = evidence.count.astype(jnp.float32)[:, None] * self.problems
        mean = (evidence.mean * trials + 1) / (trials + 2)
        variance = mean * (1 - mean) / (trials + 3)
        return Belief(mean, variance, jnp.full_like(mean, jnp.inf))


def binomial_noise(problems: Any) -> BinomialNoise:
    """Noise model for scores that are the share of n problems solved: no prior to guess.

    Of N problems tried in all, s were solved; the true share has mean ``p = (s + 1) / (N + 2)``
    and variance ``p (1 - p) / (N + 3)``, the posterior under a uniform prior. As in Agresti and
    Caffo (The American Statistician 54, 2000) the added success and failure keep a single lucky
    evaluation, 1 of 1, from claiming certainty. When every evaluation uses the same problems the
    true variance is smaller, so the model errs on the careful side.

    Args:
        problems: problems n of one evaluation, one number or one a task (K,); scores must lie in
            [0, 1].

    Raises:
        ValueError: fewer than one problem.
    """
    number = np.asarray(problems, np.float32)
    if number.ndim > 1 or not np.isfinite(number).all() or (number < 1).any():
        raise ValueError(
            f"problems: expected at least 1 problem an evaluation, one number or one a task, "
            f"found {problems}"
        )
    return BinomialNoise(jnp.asarray(number))


def probability_better(a: Belief, b: Belief) -> Float[Array, "..."]:
    """Probability that the true mean of ``a`` is above that of ``b``: a one-sided Welch test.

    ``t = (mean_a - mean_b) / sqrt(v_a + v_b)`` is referred to Student's distribution with the
    degrees of freedom of Welch (Biometrika 34, 1947), ``(v_a + v_b)^2 / (v_a^2 / d_a + v_b^2 /
    d_b)``. The distribution function is Wallace's normal approximation (Annals of Mathematical
    Statistics 30, 1959), off by less than 0.008 for one degree of freedom and 0.001 from three
    on. Without any variance the answer is 1, 0, or one half for equal means.

    Args:
        a: belief with arrays of any one shape.
        b: belief of the same shape.

    Returns:
        Probabilities of that shape.
    """
    difference, variance = a.mean - b.mean, a.variance + b.variance
    exact = variance == 0
    share = a.variance / jnp.where(exact, 1.0, variance)
    # Shares, not squared variances: those would underflow.
    inverse = share**2 / a.freedom + (1 - share) ** 2 / b.freedom
    t = difference / jnp.sqrt(jnp.where(exact, 1.0, variance))
    probability = ndtr(_student_to_normal(t, inverse))
    return jnp.where(exact, 0.5 * (1 + jnp.sign(difference)), probability)


def _student_to_normal(
    t: Float[Array, "..."], inverse_freedom: Float[Array, "..."]
) -> Float[Array, "..."]:
    normal = inverse_freedom < 1e-6
    freedom = 1 / jnp.where(normal, 1.0, inverse_freedom)
    size = jnp.sqrt(freedom * jnp.log1p(t**2 / freedom))
    z = jnp.sign(t) * size * (8 * freedom + 1) / (8 * freedom + 3)
    return jnp.where(normal, t, z)
