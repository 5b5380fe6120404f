"""What a run holds in memory, and what it reads when it is wanted."""

import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cycleqd_jax.merging.spectral import materialise
from cycleqd_jax.models.cache import stack_layers, unstack_layers
from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.runs.breeding import first_parents
from cycleqd_jax.runs.compatibility import compatibility_report
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.workspace import open_workspace
from cycleqd_jax.sandbox.base import Sandbox


def held(since: set[int]) -> int:
    """Bytes of arrays on the device that were not there before."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays() if id(array) not in since)


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_a_run_holds_base_and_factors_once_and_no_expert(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    workspace = open_workspace(config, tmp_path)
    evaluator = Evaluator(workspace, Sandbox)  # type: ignore[arg-type]
    compatibility_report(workspace)
    both = size(workspace.base) + size(workspace.basis)
    # Beside them a table of stop tokens, and numbers that JAX keeps.
    small = 0.02 * size(workspace.base)
    assert both <= held(before) <= both + small

    gains = first_parents(workspace)
    population = workspace.population(gains)
    own = size(population) - size(workspace.base) - size(workspace.basis)
    # Gains and norm vectors of the candidates are all that is new.
    assert held(before) <= both + 2 * size(gains) + max(own, 0) + size(population.final_norm) * 4
    assert population.layers[0].q.base is workspace.base.layers[0].q
    assert population.layers[0].q.u is workspace.basis.layers[0].q.u
    del population, evaluator, gains
    assert held(before) <= both + small


def test_a_decomposition_from_the_cache_is_the_one_that_was_made(
    config: RunConfig, tmp_path: Path
) -> None:
    made, found = (open_workspace(config, tmp_path) for _ in range(2))
    assert made.layout == found.layout
    jax.tree.map(np.testing.assert_array_equal, made.basis, found.basis)


@pytest.mark.slow
def test_models_with_their_layers_apart_are_the_stacked_ones(
    config: RunConfig, tmp_path: Path
) -> None:
    workspace = open_workspace(config)
    architecture, base = load_model(config.base)
    jax.tree.map(np.testing.assert_array_equal, workspace.base, unstack_layers(base))
    gains = jax.tree.map(lambda leaf: 0.7 * leaf[1], first_parents(workspace))
    expected = jax.jit(materialise)(base, stack_layers(workspace.basis), gains)
    built = workspace.model(gains)
    jax.tree.map(np.testing.assert_array_equal, built, unstack_layers(expected))
    for name, params in {"apart": built, "stacked": expected}.items():
        save_model(tmp_path / name, architecture, params, like=config.base)
    one, other = (tmp_path / name / "model.safetensors" for name in ("apart", "stacked"))
    assert one.read_bytes() == other.read_bytes()
