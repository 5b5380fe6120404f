"""Merging methods that CycleQD is compared with."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cycleqd_jax.merging.task_vector import apply_task_vector, check_same_tree


def task_arithmetic(base: Any, task_vectors: Sequence[Any], lam: Any) -> Any:
    """Uniform merge ``theta_0 + lam * sum_e tau_e`` (Ilharco et al., arXiv 2212.04089).

    Args:
        base: parameters of the base.
        task_vectors: at least one tree like the base.
        lam: scalar (may be traced).

    Returns:
        Parameters in the base's dtypes, summed in float32.

    Raises:
        ValueError: no task vector, or one that differs from the base; the message names the leaf.
    """
    if not task_vectors:
        raise ValueError("expected at least one task vector, found none")
    for e, tau in enumerate(task_vectors):
        check_same_tree(base, tau, "the base", f"task vector {e}")
    total = jax.tree.map(lambda *t: sum(jnp.asarray(x, jnp.float32) for x in t), *task_vectors)
    return apply_task_vector(base, total, lam)
