"""What a run needs of a machine, held against what is there: memory of a device, room on disks."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from cycleqd_jax.chips import CHIPS, Chip, chip_of
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.lora import is_adapter
from cycleqd_jax.plan import Plan, make_plan
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.sharding import MODEL, POPULATION
from cycleqd_jax.workload import Workload

# The largest batch of `models.generate.Decoder`.
_BATCH = 256
# `best/` and `aggregate/`.
_EXPORTS = 2


@dataclass(frozen=True)
class Device:
    """What a run computes on.

    Attributes:
        name: for people.
        memory: bytes that may be used.
        chip: its published figures, where they are known.
    """

    name: str
    memory: int
    chip: Chip | None = None


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        plan: one generation.
        besides: part → bytes on the device that the plan leaves out.
        out: bytes below the run folder, at most.
        cache: bytes below the cache, at most.
    """

    plan: Plan
    besides: dict[str, int]
    out: int
    cache: int

    @property
    def memory(self) -> int:
        """Bytes on the device at the busiest moment."""
        return self.plan.total + sum(self.besides.values())


def needs_of(config: RunConfig, architecture: LlamaConfig, prompt: int) -> Needs:
    """Count what a run needs, from shapes alone.

    Args:
        config: what is to run. A full expert is taken at ``rank`` or at full rank, a LoRA expert
            as one: what it needs less is not known before it is read.
        architecture: of base and experts.
        prompt: tokens of the longest conversation that a model is shown.

    Raises:
        ValueError: the conversation and an answer do not fit the model's context.
    """
    widest = max(architecture.hidden_size, architecture.intermediate_size, architecture.vocab_size)
    work = Workload(
        experts=len(config.experts),
        # A run never builds its candidates on an accelerator: full rank is a rank like any other.
        rank=config.rank or widest,
        candidates=config.children,
        prompts=config.problems * config.repeats * len(config.tasks),
        prompt=prompt,
        new=config.max_new_tokens,
        batch=_BATCH,
    )
    kinds = (AxisType.Auto, AxisType.Auto)
    mesh = AbstractMesh((1, 1), (POPULATION, MODEL), axis_types=kinds)
    plan = make_plan(architecture, mesh, work)
    weights = plan.memory["weights"]
    factors = plan.memory["factors"] * 4 // jnp.dtype(architecture.dtype).itemsize
    full = sum(not is_adapter(folder) for folder in config.experts.values())
    # Base and basis are there with stacked layers for the algebra and layer by layer for decoding.
    besides = {
        "experts": full * weights,
        "base again": weights,
        "float32 factors": 2 * factors,
    }
    tasks, bins = len(config.tasks), config.preset.bins
    most = min(
        len(config.experts) + config.generations * config.children, tasks * bins ** (tasks - 1)
    )
    # Those that stay, and one that is being written.
    checkpoints = config.checkpoints_kept + 1
    if config.checkpoint_archive is not None:
        checkpoints += config.generations // config.checkpoint_archive
    gains = plan.memory["gains"] // config.children
    return Needs(
        plan=plan,
        besides=besides,
        out=_EXPORTS * weights + checkpoints * most * gains,
        cache=factors,
    )


def device_here() -> Device:
    """The device that a run takes: JAX's first; a CPU has the memory that the machine has left."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return Device(device.device_kind, stats["bytes_limit"], chip_of(device.device_kind))
    return Device(f"{device.device_kind} (no accelerator)", _free_memory())


def named_device(chip: str) -> Device:
    """A device that is not here.

    Raises:
        ValueError: nobody knows it.
    """
    if chip not in CHIPS:
        raise ValueError(f"--chip: expected one of {', '.join(CHIPS)}, found {chip!r}")
    return Device(chip, int(CHIPS[chip].memory), CHIPS[chip])


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
