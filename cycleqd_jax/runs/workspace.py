"""What a run needs before its first generation: models, basis, problems, sandbox, all checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cycleqd_jax.merging.decomposition import DecompositionReport, Method
from cycleqd_jax.merging.layout import GainLayout
from cycleqd_jax.merging.low_rank import decompose_low_rank, join_experts
from cycleqd_jax.merging.spectral import (
    FLOAT32_EPS,
    decompose,
    expert_gains,
    gain_layout,
    materialise,
)
from cycleqd_jax.merging.task_vector import task_vector
from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.compatibility import check_family
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.kernels import attach, round_directions
from cycleqd_jax.models.lora import is_adapter
from cycleqd_jax.models.specs import roles
from cycleqd_jax.models.tokenizer import load_tokenizer
from cycleqd_jax.runs.basis_cache import Decomposition, cached_decomposition, checkpoint_digest
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.records.parents import BASE
from cycleqd_jax.runs.stored import StoredFamily, StoredLeaf
from cycleqd_jax.sharding import replicated, weight_sharding
from cycleqd_jax.tasks.base import Problem, Task
from cycleqd_jax.tasks.registry import make_tasks


@dataclass(frozen=True)
class Workspace:
    """The checked inputs of a run.

    Base and basis are on the devices once, with their layers apart: decoding wants them so, and
    merging takes them so too. Experts stay in their folders.

    Attributes:
        config: what was asked for.
        architecture: of base and experts.
        base: the base's parameters, layers apart.
        basis: the experts' task vectors as rank-one directions, float32, layers apart.
        layout: of the gains, whose layers are stacked.
        report: how much of every task vector the basis keeps.
        tokenizer: the base's.
        tasks: the skills, one archive each.
        digests: of the weights and configs of ``base`` and every expert, by name.
        notes: what differs between base and experts without harm, a sentence each.
        stored: base and experts in their folders.
    """

    config: RunConfig
    architecture: LlamaConfig
    base: Any
    basis: Any
    layout: GainLayout
    report: DecompositionReport
    tokenizer: Any
    tasks: Sequence[Task]
    digests: Mapping[str, str]
    notes: Sequence[str]
    stored: StoredFamily

    @property
    def folders(self) -> dict[str, str]:
        """Where ``base`` and every expert lie, by name."""
        return {BASE: self.config.base, **self.config.experts}

    @property
    def mesh(self) -> Mesh | None:
        """The devices that hold base and basis; None is one device."""
        return self.stored.mesh

    @cached_property
    def directions(self) -> Any:
        """The basis in the weights' dtype, for products with activations; made once."""
        return round_directions(self.basis, self.base)

    def population(self, gains: Any) -> Any:
        """Parameters of genotypes, leaves (candidates, ...): nothing is built, the base is shared.

        Candidates that `attach` puts on one base, layers apart, for a `Decoder`.
        """
        return attach(self.base, self.directions, _gains_apart(self._everywhere(gains)))

    def model(self, gains: Any) -> Any:
        """Weights of one genotype, layers apart, in the base's dtype and where the base's lie."""
        built = materialise(self.base, self.basis, unstack_layers(self._everywhere(gains)))
        if self.mesh is None:
            return built
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), built, self.base)

    def expert_params(self, name: str) -> Any:
        """An expert's weights, layers apart: read from its folder, a LoRA expert's built here."""
        folder = self.config.experts[name]
        if is_adapter(folder):
            number = list(self.config.experts).index(name)
            return self.model(expert_gains(self.layout, number))
        return load_model(folder, sharding=self.stored.sharding, unstack=True)[1]

    def problems(self, split: Any, count: int, seed: int) -> dict[str, Sequence[Problem]]:
        """Draw problems of every task."""
        return {
            task.name: task.problems(split, count, seed=seed, difficulty=self.config.difficulty)
            for task in self.tasks
        }

    def _everywhere(self, gains: Any) -> Any:
        return gains if self.mesh is None else jax.device_put(gains, replicated(self.mesh))


def open_workspace(
    config: RunConfig, cache: Path | None = None, mesh: Mesh | None = None
) -> Workspace:
    """Load and check everything a run starts from; an expert is a model or a PEFT adapter.

    Args:
        config: what to run.
        cache: folder where decompositions are kept from run to run; None keeps none.
        mesh: devices that weights and directions are split over; None is one device.

    Raises:
        ValueError: an unknown task, a folder that is no model, an expert of another architecture,
            or with another tokenizer than the base, or a mesh that does not divide the model.
    """
    tasks = make_tasks(config.tasks)
    folders = {name: Path(folder) for name, folder in config.experts.items()}
    notes = check_family(Path(config.base), folders)
    tokenizer = load_tokenizer(config.base)
    stored = StoredFamily(config, mesh)
    # "gram" needs float64, which a TPU does not have.
    method: Method = "svd" if jax.default_backend() == "tpu" else "gram"
    digests = {
        name: checkpoint_digest(folder)
        for name, folder in {BASE: Path(config.base), **folders}.items()
    }
    settings = {"rank": config.rank, "noise": FLOAT32_EPS, "method": method}
    basis, report = cached_decomposition(
        cache,
        list(digests.values()),
        settings,
        roles(stored.architecture),
        lambda: _decompose(stored, settings),
    )
    layout = gain_layout(basis)
    basis = unstack_layers(basis)
    places = None if mesh is None else weight_sharding(stored.architecture, mesh, basis)
    basis = jax.device_put(basis, places)
    # Now that the decomposition needs no room any more.
    _, base = load_model(config.base, sharding=stored.sharding, unstack=True)
    return Workspace(
        config=config,
        architecture=stored.architecture,
        base=base,
        basis=basis,
        layout=layout,
        report=report,
        tokenizer=tokenizer,
        tasks=tasks,
        digests=digests,
        notes=notes,
        stored=stored,
    )


def _decompose(stored: StoredFamily, settings: Mapping[str, Any]) -> Decomposition:
    """One basis of full experts and LoRA experts, in the order of the config, as NumPy arrays.

    So it is as from the cache, and the factors of one leaf at a time are on a device.
    """
    nodes: list[Any] = []
    ranks: dict[str, tuple[int, ...]] = {}
    errors: dict[str, np.ndarray] = {}
    for leaf in stored.leaves():
        found, report = _decompose_leaf(leaf, stored.mesh, settings)
        nodes.append(jax.device_get(found[leaf.path]))
        del found
        ranks |= report.ranks
        errors |= report.error
    treedef: Any = jax.tree.structure(roles(stored.architecture))
    return treedef.unflatten(nodes), DecompositionReport(ranks=ranks, error=errors)


def _decompose_leaf(
    leaf: StoredLeaf, mesh: Mesh | None, settings: Mapping[str, Any]
) -> Decomposition:
    """The basis of one leaf, by its path; one expert's task vector is in memory at a time."""
    policy, parts = {leaf.path: leaf.role}, []
    base = None if all(leaf.adapters) else {leaf.path: leaf.base()}
    for adapter, read in zip(leaf.adapters, leaf.experts, strict=True):
        if adapter:
            parts.append(decompose_low_rank({leaf.path: read()}, policy, settings["rank"]))
            continue
        tau = task_vector({leaf.path: read()}, base)
        parts.append(decompose([tau], policy, base=base, mesh=mesh, **settings))
        del tau
    return join_experts(parts, range(len(parts)))


@jax.jit
def _gains_apart(gains: Any) -> Any:
    """Gains of candidates, leaves (candidates, layers, ...), as the layers' own."""
    layers = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), gains.layers)
    return unstack_layers(gains.replace(layers=layers))
