"""Everything that decides the outcome of a run, in one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.qd.presets import DEFAULT, Preset
from cycleqd_jax.tasks.rollout import TimeLimits


@dataclass(frozen=True)
class RunConfig:
    """One CycleQD run: a run is a pure function of this config and of the models it names.

    Attributes:
        base: folder of the base model.
        experts: expert name → folder, at least two.
        tasks: task names, one archive each; a task of one's own is MODULE:CLASS.
        seed: of everything random in the run, a whole number.
        generations: how many batches of children are bred.
        children: children a generation, evaluated together.
        problems: problems of the ``search`` split a child is scored on, per task.
        racing: leave a child out, and play no more of it, once it will not enter any archive; None
            plays everything. 1 goes by what is certain and changes no archive; less is the
            confidence with which a child's chances are given up.
        racing_block: problems a task that are played before one looks again.
        subsets: the numbers of problems a task that a run begins with, growing, before it comes to
            ``problems``; empty: all from the start.
        growth: the generations from which the next number counts, one for each of ``subsets``;
            empty: equal parts of the run.
        final_problems: problems of the ``validation`` split that decide among the finalists, per
            task.
        finalists: elites that compete to be ``cycleqd/best``.
        test_problems: problems of the ``test`` split for the final table, per task.
        difficulty: of all problems, from 1 on; public benchmarks have none.
        rank: directions kept per matrix and expert; None keeps every one above rounding noise.
        preset: crossover, mutation, selection, grid, schedule and aggregation.
        uniform_scales: the λ that are tried for the uniform merge.
        max_new_tokens: the longest answer, in tokens.
        temperature: of the models' words; 0 takes the likeliest.
        repeats: attempts at every problem, for tasks and temperatures that leave room for chance.
        step_seconds: seconds that one program or call of an environment may take.
        episode_seconds: seconds that the environment may take in all of an episode.
        team: members at most of the team of models that complement each other.
        checkpoint_every: generations between two checkpoints.
        checkpoints_kept: the newest checkpoints that stay.
        checkpoint_archive: generations between two checkpoints that stay for good; None: none does.
        sandbox: where the models' programs run: ``auto``, ``bubblewrap`` or ``unshare``.

    Raises:
        ValueError: a number out of range, fewer than two experts, or one named ``base``.
    """

    base: str
    experts: Mapping[str, str]
    tasks: tuple[str, ...]
    seed: int = 0
    generations: int = 60
    children: int = 16
    problems: int = 32
    racing: float | int | None = None
    racing_block: int = 8
    subsets: tuple[int, ...] = ()
    growth: tuple[int, ...] = ()
    final_problems: int = 64
    finalists: int = 16
    test_problems: int = 200
    difficulty: int = 1
    rank: int | None = None
    preset: Preset = DEFAULT
    uniform_scales: tuple[float, ...] = field(
        default=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    )
    max_new_tokens: int = 48
    temperature: float | int = 0.0
    repeats: int = 1
    step_seconds: float | int = 60.0
    episode_seconds: float | int = 600.0
    team: int = 4
    checkpoint_every: int = 10
    checkpoints_kept: int = 2
    checkpoint_archive: int | None = None
    sandbox: str = "auto"

    def __post_init__(self) -> None:
        if len(self.experts) < 2:
            raise ValueError(
                f"expected at least two experts, found {len(self.experts)} "
                f"({', '.join(self.experts) or 'none'}): give --experts NAME=DIR NAME=DIR …"
            )
        if "base" in self.experts:
            raise ValueError("experts: expected other names than 'base', which is the base's")
        for name in [
            "generations",
            "children",
            "problems",
            "racing_block",
            "final_problems",
            "finalists",
            "test_problems",
            "difficulty",
            "max_new_tokens",
            "repeats",
            "team",
            "checkpoint_every",
            "checkpoints_kept",
        ]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.racing is not None and not 0.0 < self.racing <= 1.0:
            raise ValueError(
                f"racing: expected a confidence above 0 and up to 1, or None, found {self.racing}"
            )
        self._check_subsets()
        Sampling(temperature=self.temperature)
        TimeLimits(step=self.step_seconds, episode=self.episode_seconds)
        # The parts check their numbers when they are built, which is hours later for big models.
        for name, least in (("crossover_std", 0), ("mutation_strength", 0), ("bins", 1)):
            found = getattr(self.preset, name)
            if found < least:
                raise ValueError(f"preset: {name}: expected at least {least}, found {found}")
        self.preset.build_selector()
        if not self.uniform_scales:
            raise ValueError("uniform_scales: expected at least one λ to try, found none")

        if self.checkpoint_archive is not None and self.checkpoint_archive < 1:
            raise ValueError(
                f"checkpoint_archive: expected None or at least 1, found {self.checkpoint_archive}"
            )

    def _check_subsets(self) -> None:
        if any(a >= b for a, b in pairwise((0, *self.subsets, self.problems))):
            raise ValueError(
                f"subsets: expected growing numbers between 1 and problems ({self.problems}), "
                f"found {list(self.subsets)}"
            )
        if self.growth and len(self.growth) != len(self.subsets):
            raise ValueError(
                f"growth: expected a generation for each of {len(self.subsets)} subsets, or none, "
                f"found {list(self.growth)}"
            )
        if any(a >= b for a, b in pairwise((1, *self.grows_at, self.generations + 1))):
            raise ValueError(
                f"growth: expected growing numbers between 2 and generations ({self.generations}), "
                f"found {list(self.grows_at)}: the last generations play all problems"
            )

    @property
    def grows_at(self) -> tuple[int, ...]:
        """``growth``, or the generations that make equal parts."""
        parts = len(self.subsets) + 1
        equal = tuple(1 + part * self.generations // parts for part in range(1, parts))
        return self.growth or equal

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: a setting that is missing or unknown, or a value out of range.
        """
        for kind, found in ((cls, data), (Preset, data.get("preset", {}))):
            known = {field.name for field in fields(kind)}
            wrong = [f"no {name!r}" for name in sorted(known - set(found))]
            wrong += [f"an unknown {name!r}" for name in sorted(set(found) - known)]
            if wrong:
                raise ValueError(f"config.json: expected the settings of a run, found {wrong[0]}")
        ranges = data["preset"]["ranges"]
        preset = {**data["preset"], "ranges": ranges and tuple(map(tuple, ranges))}
        lists = {
            name: tuple(data[name]) for name in ("tasks", "uniform_scales", "subsets", "growth")
        }
        experts = {expert["name"]: expert["folder"] for expert in data["experts"]}
        return cls(**{**data, **lists, "experts": experts, "preset": Preset(**preset)})

    def to_json(self) -> dict[str, Any]:
        """The config in JSON's types, for ``config.json``."""
        # A list: the order of the experts is that of their directions, and objects have none.
        experts = [{"name": name, "folder": folder} for name, folder in self.experts.items()]
        return {**asdict(self), "experts": experts}
