"""Plans against the compiler, against arithmetic by hand, and as a command."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from cycleqd_jax.chips import CHIPS, chip_of
from cycleqd_jax.lowering import lower_programs, needed_bytes
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.specs import leaf_table
from cycleqd_jax.plan import main, make_plan
from cycleqd_jax.sharding import make_mesh
from cycleqd_jax.workload import MODELS, Workload

SMALL = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_positions=512,
)


@pytest.mark.parametrize(
    "work",
    [
        Workload(rank=32, candidates=8, prompts=4, prompt=64, new=64),
        pytest.param(
            Workload(rank=None, candidates=8, prompts=8, prompt=64, new=64), marks=pytest.mark.slow
        ),
    ],
    ids=["rows", "built"],
)
def test_bytes_are_those_of_the_compiler(work: Workload) -> None:
    mesh = make_mesh("1x1", jax.devices()[:1])
    plan = make_plan(SMALL, mesh, work)
    for name, lowered in lower_programs(SMALL, mesh, work).items():
        needed = needed_bytes(lowered.compile())
        assert abs(plan.programs[name] / needed - 1) < 0.1, (name, plan.programs[name], needed)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As the models' cards count them.
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_known_models_have_their_size(name: str, parameters: int) -> None:
    config = MODELS[name]
    specs = jax.tree.leaves(leaf_table(config))
    assert sum(int(np.prod(s.full_shape(config.num_layers))) for s in specs) == parameters


def test_a_decoding_step_reads_weights_factors_and_half_of_what_is_generated() -> None:
    config = MODELS["llama3-8b"]
    work = Workload(rank=256, candidates=32, prompts=8, prompt=512, new=256)
    plan = make_plan(config, make_mesh("1x1", jax.devices()[:1]), work)
    sides = 32 * (2 * 8192 + 2 * 5120 + 3 * 18_432) + 128_256 + 4096
    weights = 8_030_261_248 - 128_256 * 4096
    gains = 32 * (32 * 7 + 1) * 768 * 4
    norms = 32 * 65 * 4096 * 2 - 65 * 4096 * 2
    cache = 256 * (512 + 128) * 2 * 32 * 8 * 128 * 2
    expected = 2 * weights + 2 * 768 * sides + gains + norms + cache
    assert plan.bytes_read["decode"] / work.new == pytest.approx(expected, rel=1e-3)


def test_operations_of_a_built_child_are_two_m_n_r() -> None:
    work = Workload(rank=None, candidates=2, prompts=1, prompt=16, new=16)
    plan = make_plan(SMALL, make_mesh("1x1", jax.devices()[:1]), work)
    layer = 2 * 256 * 256 * 256 + 2 * 256 * 128 * 128 + 3 * 256 * 704 * 256
    expected = 2 * 3 * (2 * layer + 2 * 4096 * 256 * 256)
    assert plan.flops["build"] == work.candidates * expected


def test_a_batch_bounds_the_cache_and_reads_the_weights_more_often() -> None:
    mesh = make_mesh("1x1", jax.devices()[:1])
    whole = make_plan(SMALL, mesh, Workload(candidates=8, prompt=64, new=64))
    parts = make_plan(SMALL, mesh, Workload(candidates=8, prompt=64, new=64, batch=16))
    assert parts.memory["cache"] * 4 == whole.memory["cache"]
    assert 1 < parts.bytes_read["decode"] / whole.bytes_read["decode"] < 4
    assert parts.flops["decode"] == pytest.approx(whole.flops["decode"])


def test_chips_are_recognised() -> None:
    wanted = {
        "NVIDIA H200": CHIPS["h200"],
        "NVIDIA H100 80GB HBM3": CHIPS["h100"],
        "NVIDIA A100-SXM4-80GB": CHIPS["a100"],
        "TPU v5 lite": CHIPS["v5e"],
        "TPU v5": CHIPS["v5p"],
        # Relatives with other figures.
        "NVIDIA GH200 480GB": None,
        "NVIDIA H100 PCIe": None,
        "NVIDIA A100-SXM4-40GB": None,
        "cpu": None,
    }
    assert {kind: chip_of(kind) for kind in wanted} == wanted


COMMAND = "--model llama3-8b --experts 3 --rank 256 --candidates 32"


@pytest.mark.slow
def test_the_command_prints_bytes_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{COMMAND} --mesh 8x1".split()) == 0
    out = capsys.readouterr().out
    for part in ("weights           16.06", "factors            4.44", "of 141 GB: fits"):
        assert part in out
    assert main(f"{COMMAND} --mesh 8x1 --chip v5e".split()) == 1
    assert "of 16 GB: DOES NOT FIT" in capsys.readouterr().out
    assert main(f"{COMMAND} --mesh 1x8 --chip v5e".split()) == 0


def test_a_folder_is_planned_from_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    assert main(["--model", str(tmp_path), "--prompt", "64", "--new", "64", "--rank", "full"]) == 0
    assert "full rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh 1x16", "layers.k has 8 key heads"),
        ("--mesh 3x1", "256 rows cannot be split evenly"),
        ("--mesh 8", "POPULATIONxMODEL"),
        ("--rank many", "expected a number or 'full'"),
        ("--candidates 0", "candidates must be at least 1"),
        ("--prompt 9000", "do not fit the context"),
        ("--model nowhere", "expected a model folder"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
