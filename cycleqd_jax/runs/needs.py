"""What a run needs of a machine, held against what is there: memory of a device, room on disks."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from cycleqd_jax.chips import CHIPS, Chip, chip_of
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import check_weights
from cycleqd_jax.models.generate import MAX_ROWS
from cycleqd_jax.models.lora import is_adapter
from cycleqd_jax.models.schedule import round_up
from cycleqd_jax.models.specs import leaf_table
from cycleqd_jax.plan import Plan, make_plan
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.sharding import abstract_mesh
from cycleqd_jax.workload import Workload

# `best/` and `aggregate/`.
_EXPORTS = 2


@dataclass(frozen=True)
class Device:
    """What a run computes on.

    Attributes:
        name: for people.
        memory: bytes that may be used, of each.
        chip: its published figures, where they are known.
        count: how many of them.
    """

    name: str
    memory: int
    chip: Chip | None = None
    count: int = 1


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        plan: one generation.
        phases: phase of a run → part → bytes on each device.
        out: bytes below the run folder, at most.
        cache: bytes below the cache, at most.
    """

    plan: Plan
    phases: Mapping[str, Mapping[str, int]]
    out: int
    cache: int

    @property
    def busiest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def memory(self) -> int:
        """Bytes on each device at the busiest moment."""
        return sum(self.phases[self.busiest].values())


def needs_of(
    config: RunConfig, architecture: LlamaConfig, prompt: int, mesh: tuple[int, int] = (1, 1)
) -> Needs:
    """Count what a run needs, from shapes alone.

    Args:
        config: what is to run. A full expert is taken at ``rank`` or at full rank, a LoRA expert
            as one: what it needs less is not known before it is read.
        architecture: of base and experts.
        prompt: tokens of the longest conversation that a model is shown.
        mesh: sizes of ``population`` and ``model``.

    Raises:
        ValueError: the conversation and an answer do not fit the model's context, or the mesh does
            not divide the model.
    """
    widest = max(architecture.hidden_size, architecture.intermediate_size, architecture.vocab_size)
    population = mesh[0]
    prompts = config.problems * config.repeats * len(config.tasks)
    work = Workload(
        experts=len(config.experts),
        # A run never builds its candidates on an accelerator: full rank is a rank like any other.
        rank=config.rank or widest,
        candidates=config.children,
        # The decoder fills up a batch that the mesh does not divide.
        prompts=round_up(prompts, population // math.gcd(population, config.children)),
        prompt=prompt,
        new=config.max_new_tokens,
        batch=MAX_ROWS * population,
    )
    plan = make_plan(architecture, abstract_mesh(mesh), work)
    weights, factors = _sizes(architecture, work)
    tasks, bins = len(config.tasks), config.preset.bins
    most = min(
        len(config.experts) + config.generations * config.children, tasks * bins ** (tasks - 1)
    )
    # Those that stay, and one that is being written.
    checkpoints = config.checkpoints_kept + 1
    if config.checkpoint_archive is not None:
        checkpoints += config.generations // config.checkpoint_archive
    gains = plan.memory["gains"] // config.children
    full = sum(not is_adapter(folder) for folder in config.experts.values())
    return Needs(
        plan=plan,
        phases=_phases(plan, full),
        out=_EXPORTS * weights + checkpoints * most * gains,
        cache=factors,
    )


def _sizes(config: LlamaConfig, work: Workload) -> tuple[int, int]:
    """Bytes of a model, and of the factors in float32."""
    numbers = directions = 0
    for spec in jax.tree.leaves(leaf_table(config)):
        numbers += math.prod(spec.full_shape(config.num_layers))
        rank = min(*spec.shape, work.rank or max(spec.shape)) if spec.role == "matrix" else 1
        layers = config.num_layers if spec.stacked else 1
        directions += layers * sum(spec.shape) * work.experts * rank
    return numbers * jnp.dtype(config.dtype).itemsize, 4 * directions


def _phases(plan: Plan, full: int) -> dict[str, dict[str, int]]:
    """Bytes on each device while a run decomposes, compares its experts, searches, and tests.

    Args:
        plan: of a generation.
        full: experts that are no adapters.
    """
    config, parts, split = plan.config, plan.memory, plan.mesh[1]
    item = jnp.dtype(config.dtype).itemsize
    specs = [spec for spec in jax.tree.leaves(leaf_table(config)) if spec.role == "matrix"]
    leaf = max(math.prod(spec.full_shape(config.num_layers)) for spec in specs) // split
    matrix = max(math.prod(spec.shape) for spec in specs)
    # A mesh splits the layers of a leaf for its decomposition.
    layers = -(-config.num_layers // math.prod(plan.mesh))
    directions = max(
        (layers if spec.stacked else 1) * sum(spec.shape) * min(*spec.shape, plan.work.rank or leaf)
        for spec in specs
    )
    weights, wide = parts["weights"], {"float32 factors": parts["factors"] * 4 // item}
    # Directions of float32 weights are the factors themselves.
    kept = wide if item < 4 else {}
    return {
        "decomposition": {
            "a leaf and its task vector": leaf * (2 * item + 4) if full else 0,
            "a matrix in float64": 16 * matrix if full else 0,
            # Of each expert, and then of all together.
            "factors of a leaf": 8 * plan.work.experts * directions,
        },
        "report": {"weights": weights, **wide, "a leaf of all models": leaf * item * (full + 1)},
        "search": {**parts, **kept},
        "test": {
            "weights": weights,
            "factors": parts["factors"],
            **kept,
            "the model that is tested": weights,
            "cache": parts["cache"],
            "activations": parts["activations"],
        },
    }


def default_mesh(
    config: RunConfig,
    architecture: LlamaConfig | None = None,
    device: Device | None = None,
    prompt: int = Workload.prompt,
) -> tuple[int, int]:
    """All devices, for candidates if a run fits each of them, or else with the weights split.

    Args:
        config: what is to run.
        architecture: of base and experts; by default as the base's folder says.
        device: how many there are and what each holds; by default this process's.
        prompt: as of `needs_of`.

    Returns:
        The sizes of ``population`` and ``model``: of the meshes that divide the model the one with
        the smallest ``model`` axis that fits, or with the largest if none does.

    Raises:
        ValueError: the base's folder is no model.
    """
    device = device or device_here()
    shape = (device.count, 1)
    if device.count == 1:
        return shape
    architecture = architecture or check_weights(config.base)
    for split in (n for n in range(1, device.count + 1) if device.count % n == 0):
        wider = (device.count // split, split)
        try:
            needs = needs_of(config, architecture, prompt, wider)
        except ValueError:  # said by who asks for this mesh
            continue
        shape = wider
        if needs.memory <= device.memory:
            break
    return shape


def device_here() -> Device:
    """The devices of this process; those of a CPU share the memory that the machine has left."""
    device, *others = jax.local_devices()
    count = 1 + len(others)
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return Device(device.device_kind, stats["bytes_limit"], chip_of(device.device_kind), count)
    return Device(f"{device.device_kind} (no accelerator)", _free_memory() // count, count=count)


def named_device(chip: str, count: int = 1) -> Device:
    """Devices that are not here.

    Raises:
        ValueError: nobody knows it.
    """
    if chip not in CHIPS:
        raise ValueError(f"--chip: expected one of {', '.join(CHIPS)}, found {chip!r}")
    return Device(chip, int(CHIPS[chip].memory), CHIPS[chip], count)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is or would be made."""
    return shutil.disk_usage(_existing(folder)).free


def short_disks(wanted: Sequence[tuple[Path, int]]) -> list[tuple[Path, int, int]]:
    """Folders whose file systems have too little room, what is needed there, what is free.

    Args:
        wanted: folder and bytes; folders of one file system share its room.
    """
    disks: dict[int, list[tuple[Path, int]]] = {}
    for folder, size in wanted:
        disks.setdefault(os.stat(_existing(folder)).st_dev, []).append((folder, size))
    found = []
    for folders in disks.values():
        total, free = sum(size for _, size in folders), free_disk(folders[0][0])
        if total > free:
            found.append((folders[0][0], total, free))
    return found


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _free_memory() -> int:
    """Bytes that a new process can have without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, size = line.partition(":")
        if name == "MemAvailable":
            return int(size.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
