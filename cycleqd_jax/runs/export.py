"""A found model as a Hugging Face folder with a card that says where it comes from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cycleqd_jax.merging.layout import GainLayout
from cycleqd_jax.merging.spectral import gain_layout
from cycleqd_jax.models.convert import save_model
from cycleqd_jax.runs.files import write_text_atomic
from cycleqd_jax.runs.report import Scores, with_means


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
class ModelCard:
    """What ``README.md`` of an exported model says.

    Attributes:
        name: the heading (``cycleqd/best``).
        base: the base model's name or folder.
        experts: expert name to its name or folder.
        recipe: expert name to its share in the model; see `expert_coefficients`.
        scores: split (``search``, ``test``) to task to score.
        command: what reproduces the model.
        details: further facts, a line each (``generation``: 12).
    """

    name: str
    base: str
    experts: Mapping[str, str]
    recipe: Mapping[str, Coefficients] = field(default_factory=dict)
    scores: Mapping[str, Scores] = field(default_factory=dict)
    command: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """The card in Markdown, with the metadata block Hugging Face reads."""
        parts = [
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
            "tags:\n- merge\n- cycleqd\n---",
            f"# {self.name}",
            "A language model bred by CycleQD: quality-diversity search over merges of experts "
            "that were fine-tuned from one base ([arXiv 2410.14735](https://arxiv.org/abs/2410.14735)).",
            "## Parents\n\n" + self._parents(),
            self._scores(),
            "\n".join(f"- {key}: {value}" for key, value in self.details.items()),
            f"## Reproduce\n\n```sh\n{self.command}\n```" if self.command else "",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _parents(self) -> str:
        share = bool(self.recipe)
        lines = [
            "| model | from |" + (" coefficient | 5% to 95% of the gains |" if share else ""),
            "|---|---|" + ("---:|---:|" if share else ""),
            f"| base | {_code(self.base)} |" + ("  |  |" if share else ""),
        ]
        for name, source in self.experts.items():
            row = f"| expert {name} | {_code(source)} |"
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

    def _scores(self) -> str:
        if not self.scores:
            return ""
        tasks = list(next(iter(self.scores.values())))
        rows = with_means(self.scores, [task for task in tasks if task != "mean"])
        columns = list(next(iter(rows.values())))
        lines = [
            "## Scores",
            "",
            "| problems | " + " | ".join(columns) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        for split, row in rows.items():
            cells = (f"{row[c]:.3f}" if math.isfinite(row[c]) else "not finite" for c in columns)
            lines.append(f"| {split} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


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
