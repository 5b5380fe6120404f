"""The report before a run, and runs with LoRA experts."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from cycleqd_jax.models.convert import load_model
from cycleqd_jax.runs.compatibility import compatibility_report, compatibility_tables
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.driver import evolve
from cycleqd_jax.runs.family import Family
from cycleqd_jax.runs.records.files import read_json
from cycleqd_jax.runs.workspace import open_workspace


@pytest.fixture(scope="module")
def mixed(config: RunConfig, family: Family, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The second of three experts is an adapter of rank 2 on one matrix."""
    folder = tmp_path_factory.mktemp("lora")
    width = load_model(family.base)[0].hidden_size
    rng = np.random.default_rng(0)
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    factors = {
        name + "A.weight": rng.standard_normal((2, width)).astype(np.float32),
        name + "B.weight": rng.standard_normal((width, 2)).astype(np.float32),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    names = list(config.experts)
    return replace(config, experts={**config.experts, names[1]: str(folder)})


@pytest.mark.slow
def test_a_basis_mixes_models_and_adapters(mixed: RunConfig, family: Family) -> None:
    workspace = open_workspace(mixed)
    names = list(mixed.experts)
    o = load_model(family.base)[1].layers.o
    a, b = load_file(Path(mixed.experts[names[1]]) / "adapter_model.safetensors").values()
    adapter = workspace.expert_params(names[1])
    np.testing.assert_allclose(adapter.layers[0].o - o[0], (b @ a).T, atol=1e-5)
    assert workspace.basis.layers[0].o.ranks[1] == 2
    assert workspace.basis.layers[0].q.ranks[1] == 0
    full = load_model(mixed.experts[names[2]])[1]
    assert (workspace.expert_params(names[2]).layers[0].q == full.layers.q[0]).all()

    report = compatibility_report(workspace)
    assert [row["kind"] for row in report["experts"].values()] == ["full", "lora", "full"]
    lora = report["experts"][names[1]]
    assert lora["norm"] == pytest.approx(np.linalg.norm(b @ a), rel=1e-5)
    assert lora["rank"] == [0, 2]
    assert lora["retained_energy"] == {"minimum": 1, "mean": 1}
    assert [row["experts"] for row in report["pairs"]] == [names[:2], names[::2], names[1:]]
    assert report["leaves"]["layers/o"]["cosine"].shape == (1, 3)
    assert np.isnan(report["leaves"]["layers/q"]["cosine"][0, 0])
    text = StringIO()
    for table in compatibility_tables(report):
        Console(file=text, width=120).print(table)
    assert f"{names[0]} and {names[1]}" in text.getvalue()


@pytest.mark.slow
def test_a_run_with_an_adapter_goes_through_and_writes_the_report(
    mixed: RunConfig, tmp_path: Path
) -> None:
    result = evolve(replace(mixed, generations=1), tmp_path / "run")
    assert set(result["models"]) > {f"expert/{name}" for name in mixed.experts}
    report = read_json(tmp_path / "run" / "compatibility.json")
    assert list(report["experts"]) == list(mixed.experts)
    for row in report["pairs"]:
        assert -1 <= row["cosine"] <= 1
        assert 0 <= row["sign_agreement"] <= 1
        assert 0 <= row["spectral_similarity"] <= 1 + 1e-6
    assert report["notes"] == []
