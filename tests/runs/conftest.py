"""A family of models so small that making it takes seconds; what they say is gibberish."""

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from cycleqd_jax.qd.presets import DEFAULT
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.family import Family, FamilyConfig, make_family
from cycleqd_jax.tasks.registry import make_tasks
from cycleqd_jax.training.sft import TrainConfig

TASKS = ("coding", "database", "shell")

TINY = FamilyConfig(
    tasks=TASKS,
    vocab_size=320,
    width=32,
    layers=1,
    heads=2,
    problems=40,
    chats=0.2,
    base=TrainConfig(3, 8, 1e-2),
    expert=TrainConfig(0, 8, 1e-2),
    expert_steps=(2, 2, 2),
)


@pytest.fixture(scope="session")
def tiny() -> FamilyConfig:
    return TINY


@contextmanager
def _one_at_a_time(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder of all worker processes, for the one that is first."""
    own = factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield shared / name


def _nudged(
    params: Any, architecture: Any, corpora: Any, settings: TrainConfig, on_progress: Any
) -> Any:
    """As far as two updates would go, without the half minute of compiling them."""
    rng = np.random.default_rng(sum(int(corpus.tokens.sum()) for corpus in corpora))
    step = settings.steps * settings.learning_rate
    return jax.tree.map(
        lambda leaf: leaf + step * rng.uniform(-1, 1, leaf.shape).astype(leaf.dtype), params
    )


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Made once for all worker processes; `tests.runs.test_family` makes one by training."""
    with (
        _one_at_a_time(tmp_path_factory, "family") as folder,
        mock.patch("cycleqd_jax.runs.family.train", _nudged),
    ):
        return make_family(folder, TINY, make_tasks(TASKS))


@pytest.fixture(scope="session")
def config(family: Family) -> RunConfig:
    return RunConfig(
        base=str(family.base),
        experts={name: str(folder) for name, folder in family.experts.items()},
        tasks=TASKS,
        generations=4,
        children=4,
        problems=2,
        final_problems=2,
        finalists=2,
        test_problems=2,
        uniform_scales=(0.5, 1.0),
        max_new_tokens=8,
        preset=replace(DEFAULT, bins=5),
        checkpoint_every=2,
    )


@pytest.fixture(scope="session")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through without a break, one for all worker processes."""
    from cycleqd_jax.runs.driver import evolve  # here: collecting tests should not load Orbax

    with _one_at_a_time(tmp_path_factory, "finished") as out:
        if not (out / "summary.json").exists():
            evolve(config, out)
    return out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(megabytes)`` is an empty file system; skips where one may not be mounted."""
    path = tmp_path / "disk"
    mounted = []

    def mount(megabytes: int) -> Path:
        path.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path)]
        try:
            subprocess.run(["mount", *options], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("cannot mount a small file system here")
        mounted.append(path)
        return path

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)
