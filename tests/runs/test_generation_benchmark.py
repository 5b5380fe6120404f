"""The benchmark of a whole generation: both pipelines do the same work, at tiny shapes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.presets import DEFAULT
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.records.lineage import Birth

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import generation

    return generation


@pytest.mark.slow
def test_both_pipelines_score_the_same_children_alike(
    generation: Any, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(config, rank=4)

    def settings(cache: Path, *, generations: int) -> RunConfig:
        return replace(tiny, generations=generations)

    monkeypatch.setattr(generation, "quickstart_config", settings)
    monkeypatch.setenv("CYCLEQD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        sys, "argv", ["generation.py", "--generations", "2", "--json", str(tmp_path / "rows.json")]
    )
    generation.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["peer_name"] for row in rows] == [generation.LENT, generation.PUBLISHED]
    for row in rows:
        assert row["different_episodes"] == 0
        assert row["ours"] > 0
        assert row["peer"] > 0
        for side in ("ours", "peer"):
            assert set(row["seconds"][side]) == set(generation.PHASES)


def test_the_peers_archives_keep_who_ours_would(generation: Any) -> None:
    # Coarse scores, so that cells are contested and ties happen.
    scores = np.random.default_rng(0).integers(0, 9, (60, 3)).astype(np.float32) / 8
    births = [
        Birth(i, (), None, 0 if i < 3 else 1, dict(zip("abc", map(float, row), strict=True)))
        for i, row in enumerate(scores)
    ]
    preset = replace(DEFAULT, bins=5)
    workspace = SimpleNamespace(config=SimpleNamespace(preset=preset))
    archives = generation.Archives(workspace, births)
    for birth in births:
        archives.add(birth.id, list(birth.scores.values()))
    ours = CyclicRepertoire.init(
        genotypes=jnp.zeros((60, 1)),
        fitnesses=jnp.asarray(scores),
        descriptors=jnp.asarray(scores),
        centroids=preset.build_grid(scores[:3]),
        extra_scores={"id": jnp.arange(60)},
        keys_extra_scores=("id",),
    )
    assert archives.ids() == generation.ids_of(ours)
    assert sum(map(len, archives.ids())) > 10
