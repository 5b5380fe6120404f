"""The mesh: errors before any work, and eight virtual devices against one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.specs import leaf_table
from cycleqd_jax.sharding import (
    MODEL,
    POPULATION,
    RULES,
    check_model,
    check_rows,
    make_mesh,
    mesh_shape,
    weight_sharding,
)
from cycleqd_jax.workload import MODELS

SCRIPT = Path(__file__).parent / "sharded_programs.py"
HIDDEN, LAYERS, RANKS = 32, 2, 12
TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


def abstract(population: int, model: int) -> AbstractMesh:
    kinds = (AxisType.Auto, AxisType.Auto)
    return AbstractMesh((population, model), (POPULATION, MODEL), axis_types=kinds)


def run(folder: Path, *meshes: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *meshes],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def both_axes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("sharded"), "4x2")["4x2"]


def check_equal(found: dict[str, Any]) -> None:
    assert found["load"] == 0.0
    assert found["decompose"] < 1e-6
    assert found["emit"] == 0.0
    assert found["add"] == 0.0
    assert found["materialise"] < 1e-6
    assert found["decode"] == 0
    assert found["texts"] > 10


def check_collectives(found: dict[str, Any], shape: str) -> None:
    population, model = mesh_shape(shape)
    assert found["materialise_text"] == {}
    assert found["attach_text"] == {}
    for program in ("prefill_text", "decode_text"):
        if model == 1:
            assert found[program] == {}
            continue
        rows = 16 // population
        # The sum of a product over a split axis, and of its low-rank part in the same operation:
        # one for the embeddings, two a layer.
        allowed = {
            f"all-reduce (f32[{rows},{time},{HIDDEN}], f32[{rows},{time},{RANKS}])"
            for time in (1, 16)
        }
        assert set(found[program]) <= allowed
        assert sum(found[program].values()) == 1 + 2 * LAYERS


def check_bytes(found: dict[str, Any], shape: str) -> None:
    population, model = mesh_shape(shape)
    share, whole = found["load_bytes"]
    norms = 4 * HIDDEN * (2 * LAYERS + 1)
    assert share - norms == (whole - norms) // model
    share, whole = found["cache_bytes"]
    positions = 4 * 16 * 16
    assert share == (whole - positions) // 8 + positions // population
    share, whole = found["stacked_bytes"]
    vectors = 8 * norms
    assert share - vectors == (whole - vectors) // 8
    assert found["emit_split"]


@pytest.mark.slow
def test_a_mesh_of_both_axes_gives_what_one_device_gives(both_axes: dict[str, Any]) -> None:
    check_equal(both_axes)


@pytest.mark.slow
def test_devices_exchange_only_the_sums_of_tensor_parallelism(both_axes: dict[str, Any]) -> None:
    check_collectives(both_axes, "4x2")


@pytest.mark.slow
def test_a_device_holds_its_share_of_weights_cache_and_children(both_axes: dict[str, Any]) -> None:
    check_bytes(both_axes, "4x2")


@pytest.mark.slow
def test_plans_of_split_programs_are_those_of_the_compiler(both_axes: dict[str, Any]) -> None:
    assert both_axes["plan"].keys() == {"build", "prefill", "decode"}
    assert all(0.9 < share < 1.1 for share in both_axes["plan"].values())


@pytest.mark.slow
def test_meshes_that_are_longer_in_one_axis(tmp_path: Path) -> None:
    for shape, found in run(tmp_path, "8x1", "2x4").items():
        check_equal(found)
        check_collectives(found, shape)
        check_bytes(found, shape)


def test_every_logical_axis_has_a_rule() -> None:
    for config in MODELS.values():
        axes = {axis for spec in jax.tree.leaves(leaf_table(config)) for axis in spec.axes}
        assert axes <= RULES.keys()


def test_outputs_are_split_and_the_axis_back_to_the_residual_stream_is_summed() -> None:
    places = weight_sharding(TINY, abstract(1, 2))
    assert places.layers.q.spec == PartitionSpec(None, None, MODEL)
    assert places.layers.o.spec == PartitionSpec(None, MODEL, None)
    assert places.layers.attn_norm.spec == PartitionSpec(None, None)
    assert places.embed.spec == PartitionSpec(MODEL, None)


def test_head_counts_are_divided_and_not_only_widths() -> None:
    # 16 columns of keys could be cut into four, but two heads cannot.
    with pytest.raises(
        ValueError,
        match=r"layers\.k has 2 key heads along its axis 'kv_heads'.*'model' of 4 .*of 1, 2 and",
    ):
        check_model(TINY, abstract(1, 4))
    check_model(replace(TINY, num_kv_heads=4), abstract(1, 4))


def test_a_vocabulary_that_is_not_divided_is_named() -> None:
    with pytest.raises(ValueError, match=r"leaf embed has 63 tokens along its axis 'vocab'"):
        weight_sharding(replace(TINY, vocab_size=63), abstract(2, 2))


def test_qwen_has_biases_and_four_key_heads() -> None:
    places = weight_sharding(MODELS["qwen2.5-7b"], abstract(2, 4))
    assert places.layers.q_bias.spec == PartitionSpec(None, MODEL)
    with pytest.raises(ValueError, match=r"does not divide; choose a 'model' axis of 1, 2, 4 and"):
        weight_sharding(MODELS["qwen2.5-7b"], abstract(1, 8))


def test_rows_that_the_population_does_not_divide() -> None:
    check_rows(16, abstract(8, 1))
    with pytest.raises(ValueError, match=r"12 rows cannot be split evenly .* of 8; use 16"):
        check_rows(12, abstract(8, 1))


@pytest.mark.parametrize("text", ["8", "x8", "8x0", "2x2x2", "-1x8", "axb"])
def test_mesh_texts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="POPULATIONxMODEL"):
        mesh_shape(text)


def test_a_mesh_of_more_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"mesh of 64x2 .* needs 128 devices, found"):
        make_mesh("64x2")


def test_something_else_in_place_of_a_leaf() -> None:
    table = leaf_table(TINY)
    with pytest.raises(ValueError, match=r"model\.norm\.weight, found tuple"):
        weight_sharding(TINY, abstract(1, 1), table.replace(final_norm=(1, 2)))
