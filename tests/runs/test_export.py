import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors
from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.models.llama import init_params
from cycleqd_jax.models.specs import LlamaConfig
from cycleqd_jax.runs.results.export import (
    Coefficients,
    Measured,
    ModelCard,
    expert_coefficients,
    export_model,
)

CARD = ModelCard(
    name="cycleqd/best",
    base="family/base",
    experts={"coding": "family/coding", "shell": "family/shell"},
    recipe={"coding": Coefficients(0.912, 0.5, 1.25)},
    licences={"base": "apache-2.0", "coding": "apache-2.0", "shell": "unknown"},
    scores={
        "search": Measured({"coding": 0.5, "shell": 1.0}, 8),
        "test": Measured({"coding": 0.25, "shell": float("nan")}, 200),
    },
    command="python experiments/quickstart.py --seed 3",
    details={"generation": 12},
)


def test_the_card_tells_parents_shares_scores_and_the_command():
    text = CARD.render()
    assert text.startswith("---\nlibrary_name: transformers\n")
    lines = text.splitlines()
    assert "| base | `family/base` | apache-2.0 |  |  |" in lines
    assert "| expert coding | `family/coding` | apache-2.0 | 0.912 | 0.500 to 1.250 |" in lines
    assert "| expert shell | `family/shell` | unknown |  |  |" in lines
    assert "| split | problems a task | coding | shell | mean |" in lines
    # Wilson's intervals as statsmodels' proportion_confint(method="wilson") gives them.
    search = "| search | 8 | 0.500 (0.215 to 0.785) | 1.000 (0.676 to 1.000) | "
    assert any(line.startswith(search) for line in lines)
    assert "| test | 200 | 0.250 (0.195 to 0.314) | not finite | not finite |" in lines
    assert "license:" not in text  # the parents' licences differ
    assert "search scores, which are therefore too high" in text
    assert "- generation: 12" in lines
    assert "python experiments/quickstart.py --seed 3" in lines


def test_a_card_without_recipe_scores_or_command_has_no_empty_parts():
    text = ModelCard("m", "b", {"coding": "c"}).render()
    assert "| expert coding | `c` | unknown |" in text.splitlines()
    assert "coefficient" not in text
    assert "## Scores" not in text
    assert "## Reproduce" not in text
    assert "\n\n\n" not in text


def test_coefficients_average_each_experts_block_over_matrices_only():
    zeros = jnp.zeros
    basis = {
        "w": MatrixFactors(zeros((2, 4, 3)), zeros((2, 4, 3)), ranks=(1, 2, 0)),
        "v": MatrixFactors(zeros((4, 1)), zeros((4, 1)), ranks=(0, 1, 0)),
        "norm": VectorFactors(zeros((2, 3, 4))),
    }
    gains = {
        "w": jnp.array([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]]),
        "v": jnp.array([1.0]),
        "norm": jnp.full((2, 3), 100.0),
    }
    shares = expert_coefficients(gains, basis, ["coding", "shell", "web"])
    coding = shares["coding"]  # the gains 1 and 3
    assert (coding.mean, coding.low, coding.high) == pytest.approx((2.0, 1.1, 2.9))
    assert shares["shell"].mean == 1.0  # of 0, 2, 0, 2 and 1
    assert "web" not in shares  # it changed no matrix
    with pytest.raises(ValueError, match=r"names: expected 3 experts, found \['coding'\]"):
        expert_coefficients(gains, basis, ["coding"])


def test_an_export_loads_back_has_the_tokenizer_and_replaces_an_older_one(tmp_path):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        eos_ids=(1,),
    )
    # Zeros of the right shapes: real initialisation would compile for each of them.
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    base = save_model(tmp_path / "base", config, params)
    (base / "tokenizer.json").write_text("{}")
    (base / "tokenizer_config.json").write_text("{}")
    for _ in range(2):
        params = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(1), params)
        export_model(tmp_path / "best", config, params, like=base, card=CARD)
    loaded_config, loaded = load_model(tmp_path / "best")
    assert loaded_config == config
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    assert json.loads((tmp_path / "best" / "tokenizer.json").read_text()) == {}
    assert (tmp_path / "best" / "README.md").read_text() == CARD.render()
