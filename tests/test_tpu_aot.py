"""Llama-3-8B with three experts, compiled for TPUs that are not there.

Rank 256 an expert, factors in bfloat16, 32 candidates x 8 rows of 512 + 256 tokens. On `v5e:2x4`
the weights are split over all eight chips (mesh 1x8), on `v5p:2x2x1` over two, with the rows in two
halves (mesh 2x2). Three full-rank experts fit `v5p:2x2x1` with the weights over all four chips.
"""

import os
import re

import pytest

from cycleqd_jax.chips import CHIPS
from cycleqd_jax.lowering import lower_programs, needed_bytes
from cycleqd_jax.plan import MODELS, Workload, make_plan
from cycleqd_jax.sharding import make_mesh

pytest.importorskip("libtpu", reason="needs the package libtpu: pip install -e '.[tpu-aot]'")

pytestmark = pytest.mark.slow

CONFIG = MODELS["llama3-8b"]
COLLECTIVES = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
PER_LAYER = 2


def devices(topology: str) -> list:
    from jax.experimental import topologies

    # There is no metadata server to ask which TPU this machine has.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@pytest.mark.parametrize(
    ("topology", "shape", "rank", "programs"),
    [
        ("v5e:2x4", "1x8", 256, ("build", "prefill", "decode")),
        ("v5p:2x2x1", "2x2", 256, ("build", "prefill", "decode")),
        ("v5p:2x2x1", "1x4", None, ("build",)),
    ],
)
def test_programs_fit_the_chip_as_planned(
    topology: str, shape: str, rank: int | None, programs: tuple[str, ...]
) -> None:
    chip = CHIPS[topology.split(":", maxsplit=1)[0]]
    mesh = make_mesh(shape, devices(topology))
    work = Workload(experts=3, rank=rank)
    plan = make_plan(CONFIG, mesh, work)
    assert plan.total <= chip.memory
    lowered = lower_programs(CONFIG, mesh, work)
    for name in programs:
        compiled = lowered[name].compile()
        needed = needed_bytes(compiled)
        assert needed <= chip.memory
        assert abs(plan.programs[name] / needed - 1) < 0.1, (name, plan.programs[name], needed)
        found = re.findall(COLLECTIVES, compiled.as_text() or "")
        assert {kind for _, kind in found} == (set() if name == "build" else {"all-reduce"})
        sums = [what for what, _ in found if "4096]" in what]
        if name == "decode":
            # The embeddings, and after attention and MLP of every layer.
            assert len(sums) == 1 + PER_LAYER * CONFIG.num_layers
