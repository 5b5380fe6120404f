"""The loop of CycleQD's published code, transcribed: plain NumPy in float64, one number at a time.

Written from the published rules (Kuroki et al., ICLR 2025, arXiv 2410.14735, and the authors'
repository), not from this library, and it imports nothing of it. Random numbers are given, so that
it can be fed with those of another implementation. A model is a dictionary of arrays, its task
vector; an archive is a dictionary from a cell (a tuple of bin numbers) to (quality, model).

The rules, in the order of a generation:

1. Archives are worked on in turn, the next one for each child.
2. Parents are two elites of that archive, drawn without replacement. The weight of an elite is the
   product, over its quality and its bin numbers, of ``0.5 + 0.8 (v - min) / (max - min)`` with
   minimum and maximum over the archive; a column without spread counts as 1 for everybody.
3. Crossover: ``(w1 t1 + w2 t2) / (w1 + w2)``, one pair ``w ~ N(1, 0.01)`` (standard deviation) for
   the whole model.
4. Mutation: ``t + U diag(w S) V^T`` with the SVD of the task vector of the archive's expert and
   ``w ~ U[0, 0.1]`` for every direction; norms are skipped, every other parameter is a matrix.
5. The child is scored on all tasks. In the archive of task k the other scores choose the cell. Bins
   are equal in size and ``(lower, upper]``; what lies outside belongs to the end bins.
6. It enters every archive where its cell is empty or holds a strictly lower quality.
"""

import numpy as np

ALPHA_LOW, ALPHA_HIGH = 0.5, 0.8


def bin_number(score, lower, upper, bins):
    edges = np.linspace(lower, upper, bins + 1)
    for number in range(bins):
        if edges[number] < score <= edges[number + 1]:
            return number
    return 0 if score <= lower else bins - 1


def cell_of(scores, k, ranges, bins):
    cell = []
    for task, (lower, upper) in enumerate(ranges):
        if task != k:
            cell.append(bin_number(scores[task], lower, upper, bins))
    return tuple(cell)


def factors(column):
    column = np.asarray(column, np.float64)
    low, high = column.min(), column.max()
    if low == high:
        return np.ones(len(column))
    return ALPHA_LOW + (column - low) * ALPHA_HIGH / (high - low)


def parent_probabilities(archive):
    """Cell -> probability of being drawn first."""
    cells = list(archive)
    weight = factors([archive[cell][0] for cell in cells])
    for axis in range(len(cells[0])):
        weight = weight * factors([cell[axis] for cell in cells])
    return dict(zip(cells, weight / weight.sum(), strict=True))


def crossover(first, second, standard_normals, std=0.01):
    omega = 1.0 + std * np.asarray(standard_normals, np.float64)
    return {
        name: (omega[0] * first[name] + omega[1] * second[name]) / (omega[0] + omega[1])
        for name in first
    }


def mutate(child, expert, uniforms, strength=0.1):
    """Uniforms: name -> (..., r) in [0, 1), r = min(m, n), for the largest direction first."""
    mutated = {}
    for name, value in child.items():
        if "norm" in name:
            mutated[name] = value
            continue
        mutated[name] = value.copy()
        for layer in np.ndindex(value.shape[:-2]):
            u, s, vt = np.linalg.svd(expert[name][layer], full_matrices=False)
            scales = strength * np.asarray(uniforms[name][layer], np.float64)
            mutated[name][layer] += u @ np.diag(scales * s) @ vt
    return mutated


def offer(archives, scores, model, ranges, bins):
    """Offer a model to all archives; what happened in each: 'new', 'better' or 'no'."""
    events = []
    for k, archive in enumerate(archives):
        cell, quality = cell_of(scores, k, ranges, bins), scores[k]
        if cell not in archive:
            events.append("new")
        elif archive[cell][0] < quality:
            events.append("better")
        else:
            events.append("no")
            continue
        archive[cell] = (quality, model)
    return events
