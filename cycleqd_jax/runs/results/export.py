"""A found model as a Hugging Face folder with a card that says where it comes from."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cycleqd_jax.atomic import write_text_atomic
from cycleqd_jax.merging.layout import GainLayout
from cycleqd_jax.merging.spectral import gain_layout
from cycleqd_jax.models.convert import save_model
from cycleqd_jax.runs.results.intervals import wilson_of_mean
from cycleqd_jax.runs.results.report import Scores, with_means


@dataclass(frozen=True)
class Coefficients:
    """How much of one expert is in a merged model, over all gains of its matrices.

    1 everywhere is the expert itself, 0 the base; a matrix the expert did not change has no gains.

    Attributes:
        mean: mean gain.
        low: 5th percentile of the gains.
        high: 95th percentile of the gains.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """Scores of a model on problems of one split.

    Attributes:
        scores: task to score, in [0, 1] as the rollout sees to it, or NaN where it was not finite.
        problems: problems of each task.
    """

    scores: Scores
    problems: int


@dataclass(frozen=True)
class ModelCard:
    """What ``README.md`` of an exported model says.

    Attributes:
        name: the heading (``cycleqd/best``).
        base: the base model's name or folder.
        experts: expert name to its name or folder.
        licences: ``base`` and expert names to the licence their folders state.
        recipe: expert name to its share in the model; see `expert_coefficients`.
        scores: split (``search``, ``validation``, ``test``) to what was measured there.
        command: what reproduces the model.
        details: further facts, a line each (``generation``: 12).
        usage: how the folder is loaded, in Markdown, where `transformers` does not load it.
    """

    name: str
    base: str
    experts: Mapping[str, str]
    licences: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Coefficients] = field(default_factory=dict)
    scores: Mapping[str, Measured] = field(default_factory=dict)
    command: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    usage: str = ""

    def render(self) -> str:
        """The card in Markdown, with the metadata block Hugging Face reads."""
        library = "cycleqd_jax" if self.usage else "transformers"
        stated = set(self.licences.values())
        # One licence for all parents can be said to a machine; anything else is for a human.
        licence = f"license: {stated.pop()}\n" if len(stated) == 1 and _is_tag(*stated) else ""
        parts = [
            f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n"
            f"{licence}tags:\n- merge\n- cycleqd\n---",
            f"# {self.name}",
            "A language model bred by CycleQD: quality-diversity search over merges of experts "
            "that were fine-tuned from one base ([arXiv 2410.14735](https://arxiv.org/abs/2410.14735)).",
            "## Parents\n\n" + self._parents(),
            self._scores(),
            "\n".join(f"- {key}: {value}" for key, value in self.details.items()),
            f"## Use\n\n{self.usage}" if self.usage else "",
            f"## Reproduce\n\n```sh\n{self.command}\n```" if self.command else "",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _parents(self) -> str:
        share = bool(self.recipe)
        lines = [
            "| model | from | licence |"
            + (" coefficient | 5% to 95% of the gains |" if share else ""),
            "|---|---|---|" + ("---:|---:|" if share else ""),
            f"| base | {_code(self.base)} | {self._licence('base')} |"
            + ("  |  |" if share else ""),
        ]
        for name, source in self.experts.items():
            row = f"| expert {name} | {_code(source)} | {self._licence(name)} |"
            if share and name in self.recipe:
                c = self.recipe[name]
                row += f" {c.mean:.3f} | {c.low:.3f} to {c.high:.3f} |"
            elif share:
                row += "  |  |"
            lines.append(row)
        text = "\n".join(lines)
        if share:
            text += (
                "\n\nThe coefficient is the mean gain on the expert's singular directions: 1 is "
                "the whole expert, 0 none of it."
            )
        return text

    def _licence(self, name: str) -> str:
        return self.licences.get(name, "unknown").replace("|", "\\|")

    def _scores(self) -> str:
        if not self.scores:
            return ""
        tasks = list(next(iter(self.scores.values())).scores)
        lines = [
            "## Scores",
            "",
            "| split | problems a task | " + " | ".join([*tasks, "mean"]) + " |",
            "|---|---:|" + "---:|" * (len(tasks) + 1),
        ]
        for split, measured in self.scores.items():
            row = with_means({split: measured.scores}, tasks)[split]
            count, values = measured.problems, [row[task] for task in tasks]
            cells = [_score(value, [value], count) for value in values]
            cells.append(_score(row["mean"], values, count))
            lines.append(f"| {split} | {count} | " + " | ".join(cells) + " |")
        text = "\n".join(lines)
        text += (
            "\n\nIn brackets: 95% Wilson intervals over the problems, those of the tasks added in "
            "squares for the mean."
        )
        if "search" in self.scores:
            text += (
                " The search chose this model by its search scores, which are therefore too high; "
                "their interval does not know it."
            )
        return text


def _score(value: float, parts: Sequence[float], problems: int) -> str:
    if not math.isfinite(value):
        return "not finite"
    low, high = wilson_of_mean(parts, [problems] * len(parts))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _is_tag(licence: str) -> bool:
    """Whether it reads like a licence's identifier, which is what the metadata block may hold."""
    return licence != "unknown" and re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", licence) is not None


def export_model(folder: Path, config: Any, params: Any, *, like: Path, card: ModelCard) -> Path:
    """Writes a folder that `transformers` loads, with ``README.md``; replaces an older export.

    Args:
        folder: where to.
        config: the model's config.
        params: the model's parameters.
        like: the folder whose tokenizer files are copied (the base model's).
        card: what the README says.

    Raises:
        ValueError: if the parameters do not fit the config.
        OSError: if the disk is full.
    """
    save_model(folder, config, params, like=like, overwrite=True)
    write_text_atomic(folder / "README.md", card.render())
    return folder


def expert_coefficients(
    gains: Any, basis: Any | GainLayout, names: Sequence[str]
) -> dict[str, Coefficients]:
    """Each expert's share in a genotype of the spectral space; an expert without gains is left out.

    Args:
        gains: one genotype.
        basis: the basis the gains refer to, or its layout.
        names: names of the E experts, in the order of the basis.

    Raises:
        ValueError: if the number of names is not the number of experts.
    """
    layout = gain_layout(basis)
    parts: list[list[np.ndarray]] = [[] for _ in names]
    for leaf, values in zip(layout.leaves, jax.tree.leaves(gains), strict=True):
        if len(leaf.ranks) != len(names):
            raise ValueError(f"names: expected {len(leaf.ranks)} experts, found {list(names)}")
        if leaf.role == "matrix":
            blocks = np.split(np.asarray(values), np.cumsum(leaf.ranks)[:-1], axis=-1)
            for part, block in zip(parts, blocks, strict=True):
                part.append(block.ravel())
    shares = {}
    for name, part in zip(names, parts, strict=True):
        every = np.concatenate(part) if part else np.zeros(0)
        if every.size:
            low, high = np.percentile(every, [5, 95])
            shares[name] = Coefficients(float(every.mean()), float(low), float(high))
    return shares


def _code(text: str) -> str:
    return f"`{text}`"
