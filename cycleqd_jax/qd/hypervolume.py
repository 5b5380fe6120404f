"""Hypervolume: how much of the space of scores the elites dominate together.

The volume of all points between a reference point and some elite (Zitzler and Thiele, 1998). It is
the one number that rewards both better specialists and better all-rounders. Exact for two and
three tasks; above, where exact algorithms are exponential in the number of tasks, the unbiased
estimate of Karp and Luby (1983) for the volume of a union of boxes, with its standard error.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

EXACT_TASKS = 3
"""Up to this number of tasks the hypervolume is exact."""

_AT_ONCE = 256


class Hypervolume(struct.PyTreeNode):
    """A volume in score^K.

    Attributes:
        value: float32 scalar, the volume.
        standard_error: float32 scalar, 0 where the value is exact.
    """

    value: Any
    standard_error: Any


def hypervolume(
    scores: Any, reference: Any = 0.0, key: jax.Array | None = None, num_samples: int = 2**14
) -> Hypervolume:
    """Hypervolume of rows of scores, higher is better; works under jit.

    Compare only values with the same reference point. A natural one is a score that nobody would
    accept: 0 where scores are shares of problems solved, the base model's scores, or the lower end
    of the grid.

    Args:
        scores: (N, K), such as ``repertoire.scores``. A row that is not finite, as in free slots,
            or not above the reference in every task adds nothing.
        reference: a number for all tasks or (K,).
        key: random key, needed above 3 tasks; the same key and scores give the same estimate.
        num_samples: points drawn above 3 tasks. The relative error falls as its square root and is
            bounded by ``sqrt(N / num_samples)`` however small the volume.

    Raises:
        ValueError: scores that are not (N, K) with K >= 2, another reference, no key above 3
            tasks, or fewer than 2 samples.
    """
    shape = jnp.shape(scores)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"expected scores of shape (rows, at least 2 tasks), found {shape}")
    if jnp.shape(reference) not in ((), (shape[1],)):
        raise ValueError(
            f"reference: expected one number or {shape[1]}, one a task, found shape "
            f"{jnp.shape(reference)}"
        )
    boxes = _boxes(jnp.asarray(scores, jnp.float32), jnp.asarray(reference, jnp.float32))
    if shape[1] <= EXACT_TASKS:
        value = _area(boxes) if shape[1] == 2 else _volume(boxes)
        return Hypervolume(value=value, standard_error=jnp.zeros((), jnp.float32))
    if key is None:
        raise ValueError(
            f"the hypervolume of {shape[1]} tasks is estimated: expected a random key, found none"
        )
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2, found {num_samples}")
    return _estimate(boxes, key, num_samples)


@jax.jit
def _boxes(
    scores: Float[Array, "rows tasks"], reference: Float[Array, ""] | Float[Array, " tasks"]
) -> Float[Array, "rows tasks"]:
    """Sides of the box between the reference and every row; all 0 where it is empty."""
    sides = scores - reference
    counts = (jnp.isfinite(scores) & (sides > 0)).all(axis=1, keepdims=True)
    return jnp.where(counts, sides, 0.0)


def _staircase(
    x: Float[Array, " rows"], y: Float[Array, " rows"], counted: Any = True
) -> Float[Array, ""]:
    """Area under the boxes (x, y), given in falling order of x."""
    height = jax.lax.cummax(jnp.where(counted, y, 0.0))
    return jnp.sum((x - jnp.append(x[1:], 0.0)) * height)


@jax.jit
def _area(boxes: Float[Array, "rows 2"]) -> Float[Array, ""]:
    boxes = boxes[jnp.argsort(-boxes[:, 0])]
    return _staircase(boxes[:, 0], boxes[:, 1])


@jax.jit
def _volume(boxes: Float[Array, "rows 3"]) -> Float[Array, ""]:
    """Sum over slices of the third axis of area times thickness."""
    boxes = boxes[jnp.argsort(-boxes[:, 0])]
    levels = -jnp.sort(-boxes[:, 2])
    thickness = levels - jnp.append(levels[1:], 0.0)

    def slice_of(level: jax.Array) -> jax.Array:
        return _staircase(boxes[:, 0], boxes[:, 1], boxes[:, 2] >= level)

    areas = jax.lax.map(slice_of, levels, batch_size=min(_AT_ONCE, boxes.shape[0]))
    return jnp.sum(areas * thickness)


@partial(jax.jit, static_argnames="num_samples")
def _estimate(boxes: Float[Array, "rows tasks"], key: jax.Array, num_samples: int) -> Hypervolume:
    """Draw points from the boxes and count in how many boxes each lies.

    A point that lies in n boxes is drawn n times as often as its share of the union, so ``1 / n``
    times the sum of all boxes has the union as its mean.
    """
    rows, tasks = boxes.shape
    largest = jnp.max(boxes, axis=0)
    unit = boxes / jnp.where(largest > 0, largest, 1.0)
    at_once = min(_AT_ONCE, rows)

    # Boxes inside another add nothing to the union but much to the variance.
    def is_inside(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        box, index = row
        around = (unit >= box).all(axis=1)
        first = (unit > box).any(axis=1) | (jnp.arange(rows) < index)
        return (around & first).any()

    inside = jax.lax.map(is_inside, (unit, jnp.arange(rows)), batch_size=at_once)
    front = jnp.where(inside[:, None], 0.0, unit)
    sizes = jnp.prod(front, axis=1)
    up_to = jnp.cumsum(sizes)
    total = up_to[-1]
    box_key, point_key = jax.random.split(key)
    # In (0, total], so that a box without volume is never drawn.
    drawn = total * (1.0 - jax.random.uniform(box_key, (num_samples,), jnp.float32))
    corner = front[jnp.minimum(jnp.searchsorted(up_to, drawn), rows - 1)]
    points = corner * jax.random.uniform(point_key, (num_samples, tasks), jnp.float32)

    def boxes_around(point: jax.Array) -> jax.Array:
        # A box without volume contains nothing, not even its corner.
        return jnp.sum((front >= point).all(axis=1) & (sizes > 0), dtype=jnp.float32)

    around = jax.lax.map(boxes_around, points, batch_size=_AT_ONCE)
    share = 1.0 / jnp.maximum(around, 1.0)
    volume = total * jnp.prod(largest)
    spread = jnp.std(share, ddof=1) / np.sqrt(num_samples)
    return Hypervolume(value=volume * jnp.mean(share), standard_error=volume * spread)
