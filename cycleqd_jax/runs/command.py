"""The command of a run: one tree of dataclasses, from a command line, a YAML file, or both.

The command line overrides the file, the file overrides the program's defaults. What decides the
outcome (`RunConfig`) is written to ``config.json``, which ``--config`` reads back.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cycleqd_jax.cache import default_cache
from cycleqd_jax.qd.presets import PRESETS, Preset
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.console import parse_experts
from cycleqd_jax.runs.settings import (
    Setting,
    convert_settings,
    named_preset,
    read_settings,
    settings_of,
)
from cycleqd_jax.runs.watching.watch import Watch

# Flags from before presets could be changed choice by choice.
_SHORT = {"--bins": "--preset.bins"}


@dataclass(frozen=True)
class Command:
    """A run, where it is written, and what is shown of it.

    Attributes:
        run: what decides the outcome.
        watch: what is shown and logged while it runs.
        out: folder of the run.
        cache: folder that runs share: decompositions, compiled programs.
        data: folder with the files of public benchmarks; by default ``$CYCLEQD_DATA``.
        db: ``mysql://USER:PASSWORD@HOST:PORT`` of a MySQL or MariaDB server for database problems;
            by default ``$CYCLEQD_DB``, or else SQLite in the sandbox.
        mesh: devices as POPULATIONxMODEL, such as 8x1 or 4x2: candidates are split over the first
            axis, weights over the second. By default all devices of this process, as Nx1 where a
            run then fits each of them, with a longer second axis where not. It does not change
            what is found.
        transcripts: write every episode to ``OUT/transcripts``.
        dry_run: check everything, print the plan and stop; nothing is written to ``OUT``.
        architecture: a model of ``python -m cycleqd_jax.plan`` that a dry run plans with while the
            base's folder is not there; None: the folders have to be there.
        chip: a dry run plans for this device instead of the one that is here.
        coordinator: HOST:PORT of process 0, any free port there, for a run of several hosts: start
            the same command on each with another ``--process``. Clusters that JAX recognises
            (SLURM, Open MPI, Kubernetes, TPU pods) need none of the three.
        process: number of this process, from 0; process 0 alone writes ``OUT``.
        processes: how many there are. A run may go on with another number of them.
    """

    run: RunConfig
    watch: Watch = field(default_factory=Watch)
    out: Path = Path("runs/evolve")
    cache: Path = field(default_factory=default_cache)
    data: Path | None = None
    db: str | None = None
    mesh: str | None = None
    transcripts: bool = False
    dry_run: bool = False
    architecture: str | None = None
    chip: str | None = None
    coordinator: str | None = None
    process: int | None = None
    processes: int | None = None


def known_settings() -> dict[str, Setting]:
    """Every setting by name, in the order of the help."""
    own = settings_of(Command)
    parts = {"run": settings_of(RunConfig), "watch": settings_of(Watch)}
    places = {name: setting for name, setting in own.items() if name not in parts}
    return {**parts["run"], **places, **parts["watch"]}


def parse_command(
    arguments: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    description: str = "",
) -> Command:
    """Read a command line; ``--help`` and what is wrong with it end the process, as usual.

    Args:
        arguments: without the program's name; by default the process's.
        defaults: the program's own, as a file would give them.
        description: what the program does, for ``--help``.

    Raises:
        ValueError: a bad file, an unknown name in it, or values that `RunConfig` refuses.
    """
    arguments = _spelled_out(sys.argv[1:] if arguments is None else arguments)
    known = known_settings()
    file, name = _first_look(arguments)
    values = convert_settings(defaults or {}, known, "defaults")
    if file is not None:
        values |= read_settings(file, known)
    if name in PRESETS:  # any other is refused with the rest of the line
        values["preset"] = named_preset(name)
    options: Any = tyro.cli(
        _options(known, values),
        args=arguments,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )
    found: dict[str, Any] = vars(options)
    run = {f.name: found[f.name] for f in dataclasses.fields(RunConfig)}
    run |= {"experts": parse_experts(found["experts"]), "preset": found["preset_choices"]}
    watch = Watch(**{f.name: found[f.name] for f in dataclasses.fields(Watch)})
    places = {f.name: found[f.name] for f in dataclasses.fields(Command) if f.name in found}
    return Command(run=RunConfig(**run), watch=watch, **places)


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with every short flag as the one it stands for."""
    spelled = []
    for argument in arguments:
        flag, sign, value = argument.partition("=")
        spelled.append(f"{_SHORT.get(flag, flag)}{sign}{value}")
    return spelled


def _first_look(arguments: Sequence[str]) -> tuple[Path | None, str | None]:
    """The file and the preset of a command line, whose values are defaults of all the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--preset")
    try:
        found = parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError:  # said again, and in context, by the full parser
        return None, None
    return found.config, found.preset


def _options(known: Mapping[str, Setting], values: Mapping[str, Any]) -> type:
    """All settings as one flat dataclass, as the command line has them."""
    fields: list[Any] = [
        (
            "config",
            Annotated[
                Path | None,
                tyro.conf.arg(help="YAML file of settings, which the command line overrides"),
            ],
            field(default=None),
        )
    ]
    for name, setting in known.items():
        default = values.get(name, setting.default)
        kind: Any = setting.kind
        metavar: str | None = None
        if name == "preset":
            choices = Literal[tuple(PRESETS)]  # type: ignore[valid-type]
            about = f"{setting.help} Names a start for --preset.*; --bins is --preset.bins."
            fields.append(
                (name, Annotated[choices, tyro.conf.arg(help=about)], field(default="default"))
            )
            nested = Annotated[Preset, tyro.conf.arg(name="preset")]
            start = values.get("preset", named_preset("default"))
            fields.append(("preset_choices", nested, field(default=start)))
            continue
        if name == "experts":
            kind, metavar = tuple[str, ...], "NAME=DIR NAME=DIR ..."
            if default is not MISSING:
                default = tuple(f"{name}={folder}" for name, folder in default.items())
        annotated = Annotated[kind, tyro.conf.arg(help=setting.help, metavar=metavar)]
        fields.append(
            (name, annotated) if default is MISSING else (name, annotated, field(default=default))
        )
    return dataclasses.make_dataclass("Options", fields, kw_only=True)
