"""A team of models as one folder: every member as its gains over one base and one basis.

    team.json            members, digests, where they come from
    base/                the base as an ordinary Hugging Face folder, with tokenizer and template
    basis.safetensors    the experts' directions, float32, with a checksum
    members/NAME.safetensors   a member's gains
    README.md            the model card

A member costs its gains (4 bytes a singular direction: a few MB for the biggest models); base and
basis are there once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cycleqd_jax.atomic import write_text_atomic
from cycleqd_jax.merging.spectral import gain_layout, materialise
from cycleqd_jax.merging.task_vector import leaf_paths
from cycleqd_jax.models.cache import stack_layers
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.models.folder import replaced_folder
from cycleqd_jax.models.kernels import attach
from cycleqd_jax.models.specs import roles
from cycleqd_jax.runs.basis_cache import basis_size, read_basis, write_basis
from cycleqd_jax.runs.rebuild import digests
from cycleqd_jax.runs.records.files import read_json, write_json_atomic
from cycleqd_jax.runs.results.export import ModelCard
from cycleqd_jax.runs.workspace import Workspace

FORMAT = 1


class TeamError(ValueError):
    """The folder holds no team that can be read; the message names the file."""


@dataclass(frozen=True)
class LoadedTeam:
    """A team read back.

    Attributes:
        folder: where it lies; its ``base`` has the tokenizer.
        architecture: of base and members.
        base: the base's parameters.
        basis: the experts' directions.
        members: names of the T members.
        gains: their genotypes, leaves (T, ...).
    """

    folder: Path
    architecture: LlamaConfig
    base: Any
    basis: Any
    members: tuple[str, ...]
    gains: Any

    def model(self, member: str) -> Any:
        """The parameters of one member, in the base's dtype."""
        if member not in self.members:
            raise ValueError(f"expected one of {', '.join(self.members)}, found {member!r}")
        row = self.members.index(member)
        one = jax.tree.map(lambda leaf: leaf[row], self.gains)
        return jax.jit(materialise)(self.base, self.basis, one)

    def population(self) -> Any:
        """All members as one population, for a `Decoder`: candidate i is member i."""
        return attach(self.base, self.basis, self.gains)


def export_team(
    folder: Path,
    workspace: Workspace,
    members: Mapping[str, Any],
    *,
    card: ModelCard,
    facts: Mapping[str, Any],
) -> Path:
    """Writes a team, whole or not at all.

    Args:
        folder: where to.
        workspace: base, basis and tokenizer.
        members: name, also of a file, to genotype.
        card: what the README says.
        facts: for ``team.json``, in JSON types.

    Raises:
        ValueError: no member.
        OSError: if the disk is full.
    """
    if not members:
        raise ValueError("members: expected at least one, found none")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(workspace.base))
    gains = 4 * workspace.layout.size * len(members)
    size = weights + basis_size(workspace.basis, workspace.report) + gains
    with replaced_folder(folder, size) as draft:
        base = Path(workspace.config.base)
        save_model(draft / "base", workspace.architecture, workspace.base, like=base)
        write_basis(draft / "basis.safetensors", stack_layers(workspace.basis), workspace.report)
        (draft / "members").mkdir()
        marks = {}
        for name, genotype in members.items():
            values = map(np.ascontiguousarray, jax.tree.leaves(genotype))
            arrays = dict(zip(leaf_paths(genotype), values, strict=True))
            save_file(arrays, draft / "members" / f"{name}.safetensors")
            marks[name] = digests(jax.tree.map(lambda leaf: leaf[None], genotype))[0]
        write_json_atomic(draft / "team.json", {"format": FORMAT, "members": marks, **facts})
        write_text_atomic(draft / "README.md", card.render())
    return folder


def load_team(folder: str | Path) -> LoadedTeam:
    """Reads a team back.

    Raises:
        TeamError: a file is missing, damaged or of another format; the message names it.
    """
    folder = Path(folder)
    marks = _read_members(folder)
    try:
        architecture, base = load_model(folder / "base")
    except (ValueError, OSError) as error:
        raise TeamError(f"the team's base is damaged: {error}") from error
    try:
        basis, _ = read_basis(folder / "basis.safetensors", roles(architecture))
    except (ValueError, OSError, SafetensorError) as error:
        raise TeamError(f"{folder / 'basis.safetensors'}: damaged ({error})") from error
    rows = [
        _read_member(folder / "members" / f"{name}.safetensors", basis, digest)
        for name, digest in marks.items()
    ]
    gains = _stack(rows)
    return LoadedTeam(folder, architecture, base, jax.device_put(basis), tuple(marks), gains)


def _read_members(folder: Path) -> dict[str, str]:
    """Name and digest of every member."""
    file = folder / "team.json"
    if not file.is_file():
        raise TeamError(f"{folder}: expected the folder of a team, found no team.json")
    try:
        facts = read_json(file)
    except (ValueError, OSError) as error:
        raise TeamError(str(error)) from error
    if not isinstance(facts, dict):
        raise TeamError(f"{file}: expected a JSON object, found {type(facts).__name__}")
    if facts.get("format") != FORMAT:
        raise TeamError(f"{file}: expected the format {FORMAT}, found {facts.get('format')}")
    members = facts.get("members")
    if not isinstance(members, dict) or not members:
        raise TeamError(f"{file}: expected members with their digests, found {members!r}")
    return members


def _read_member(path: Path, basis: Any, digest: str) -> Any:
    template = gain_layout(basis).zeros()
    try:
        arrays = load_file(path)
        leaves = [arrays[name] for name in leaf_paths(template)]
    except (OSError, SafetensorError, KeyError) as error:
        raise TeamError(f"{path}: expected the gains of a member ({error!r})") from error
    for name, leaf, zeros in zip(
        leaf_paths(template), leaves, jax.tree.leaves(template), strict=True
    ):
        if (leaf.shape, leaf.dtype) != (zeros.shape, zeros.dtype):
            raise TeamError(
                f"{path}: {name}: expected {zeros.dtype} {zeros.shape}, "
                f"found {leaf.dtype} {leaf.shape}"
            )
    treedef: Any = jax.tree.structure(template)
    found = digests([leaf[None] for leaf in leaves])[0]
    if found != digest:
        raise TeamError(f"{path}: expected the digest {digest}, found {found}: it is damaged")
    return treedef.unflatten(leaves)


def _stack(rows: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)
