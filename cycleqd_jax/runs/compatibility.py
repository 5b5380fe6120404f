"""The report before a run: how the experts relate to the base and to each other."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from cycleqd_jax.merging.comparison import (
    LeafComparison,
    compare_task_vectors,
    spectral_similarity,
    total,
)
from cycleqd_jax.merging.spectral import is_factors
from cycleqd_jax.models.cache import rows_of_layers
from cycleqd_jax.models.lora import is_adapter
from cycleqd_jax.runs.stored import StoredLeaf
from cycleqd_jax.runs.workspace import Workspace


def compatibility_report(workspace: Workspace) -> dict[str, Any]:
    """What ``compatibility.json`` holds, in JSON's types and NumPy arrays.

    ``experts`` and ``pairs`` are figures of whole models, ``leaves`` those of every leaf, with a
    value (or one an expert, one a pair) for each of its layers. Norms are Frobenius norms; see
    `compare_task_vectors` and `spectral_similarity` for the figures of a pair. NaN stands where an
    expert did not change a matrix.
    """
    names = list(workspace.config.experts)
    pairs = list(itertools.combinations(range(len(names)), 2))
    compared: dict[str, LeafComparison] = {}
    spectra: dict[str, np.ndarray] = {}
    for leaf, factors in zip(workspace.stored.leaves(), _factors(workspace.basis), strict=True):
        compared |= _compare(leaf)
        spectra |= spectral_similarity({leaf.path: _stacked(factors)})
    energy = workspace.report.energy
    whole = total(compared)
    ranks = [
        [leaf.ranks[e] for leaf in workspace.layout.leaves if leaf.role == "matrix"]
        for e in range(len(names))
    ]
    experts = {}
    for e, (name, folder) in enumerate(workspace.config.experts.items()):
        kept = np.concatenate([values[..., e].ravel() for values in energy.values()])
        experts[name] = {
            "folder": str(folder),
            "kind": "lora" if is_adapter(Path(folder)) else "full",
            "norm": whole.norm[e],
            "relative_norm": whole.norm[e] / np.sqrt(whole.base_square),
            "rank": [min(ranks[e]), max(ranks[e])],
            "retained_energy": {"minimum": kept.min(), "mean": kept.mean()},
        }
    return {
        "base": {
            "folder": workspace.config.base,
            "architecture": workspace.architecture.architecture,
            "dtype": workspace.architecture.dtype,
            "norm": np.sqrt(whole.base_square),
        },
        "experts": experts,
        "pairs": [
            {
                "experts": [names[i], names[j]],
                "cosine": whole.cosine[i, j],
                "sign_agreement": whole.sign_agreement[i, j],
                "spectral_similarity": _mean([s[..., i, j] for s in spectra.values()]),
            }
            for i, j in pairs
        ],
        "notes": list(workspace.notes),
        "leaves": {
            path: {
                "norm": leaf.norm,
                "cosine": _of_pairs(leaf.cosine, pairs),
                "sign_agreement": _of_pairs(leaf.sign_agreement, pairs),
                **(
                    {
                        "spectral_similarity": _of_pairs(spectra[path], pairs),
                        "retained_energy": energy[path],
                    }
                    if path in spectra
                    else {}
                ),
            }
            for path, leaf in compared.items()
        },
    }


def compatibility_tables(report: Mapping[str, Any]) -> tuple[Table, Table]:
    """The experts and their pairs as tables; the report may come back from its JSON."""
    experts = Table(title="experts")
    for column in ("expert", "kind", "|τ| / |θ0|", "rank", "retained energy (lowest)"):
        experts.add_column(column, justify="left" if column in ("expert", "kind") else "right")
    for name, row in report["experts"].items():
        low, high = row["rank"]
        kept = row["retained_energy"]
        experts.add_row(
            name,
            row["kind"],
            f"{float(row['relative_norm']):.4f}",
            f"{low}" if low == high else f"{low} to {high}",
            f"{float(kept['mean']):.4f} ({float(kept['minimum']):.4f})",
        )
    pairs = Table(title="pairs of experts")
    for column in ("pair", "cosine", "same sign", "spectra"):
        pairs.add_column(column, justify="left" if column == "pair" else "right")
    for row in report["pairs"]:
        figures = (row["cosine"], row["sign_agreement"], row["spectral_similarity"])
        pairs.add_row(" and ".join(row["experts"]), *(f"{float(x):.3f}" for x in figures))
    return experts, pairs


def _compare(leaf: StoredLeaf) -> dict[str, LeafComparison]:
    """One leaf of all experts; it is in memory until this returns."""
    base = leaf.base()
    # An adapter changes no vector.
    experts = [
        {leaf.path: base if adapter and leaf.role == "vector" else read()}
        for adapter, read in zip(leaf.adapters, leaf.experts, strict=True)
    ]
    return compare_task_vectors({leaf.path: base}, experts, {leaf.path: leaf.role})


def _factors(basis: Any) -> list[Any]:
    """A basis by leaf: factors, or those of every layer."""
    rows = rows_of_layers(basis, is_factors)
    return jax.tree.leaves(rows, is_leaf=lambda node: is_factors(node) or isinstance(node, tuple))


def _stacked(factors: Any) -> Any:
    if not isinstance(factors, tuple):
        return factors
    return jax.tree.map(lambda *rows: jnp.stack(rows), *factors)


def _of_pairs(values: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """(..., E, E) to (..., pairs)."""
    return np.stack([values[..., i, j] for i, j in pairs], axis=-1)


def _mean(values: Sequence[np.ndarray]) -> float:
    """Mean over the matrices that both experts changed."""
    every = np.concatenate([value.ravel() for value in values])
    every = every[np.isfinite(every)]
    return float(every.mean()) if every.size else float("nan")
