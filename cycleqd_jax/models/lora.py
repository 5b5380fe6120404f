"""Experts as PEFT adapter folders: low-rank updates of the base, read and never multiplied out.

PEFT stores B (out, r) and A (r, in) of ``W + s B A`` (Hu et al., arXiv 2106.09685) with
``s = alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski, arXiv 2312.03732). In
our orientation the update is ``left right^T`` with ``left = s A^T`` and ``right = B``.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cycleqd_jax.merging.low_rank import LowRank
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.folder import read_json
from cycleqd_jax.models.shards import (
    DTYPE_OF_CODE,
    Checkpoint,
    TensorEntry,
    first_not_finite,
)
from cycleqd_jax.models.specs import LeafSpec, leaf_table

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Options with the only values that are implemented.
_FIXED_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": ([],),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    # Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_READ_KEYS = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
# Keys that do not change what the adapter computes, or that the tensors' names answer.
_INERT_KEYS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
        *("peft_version", "lora_dropout", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
        *("eva_config", "loftq_config", "runtime_config"),
    }
)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is a PEFT adapter rather than a model."""
    return (Path(folder) / _CONFIG).is_file()


def adapter_base(folder: str | Path) -> str | None:
    """What the adapter's config names as its base model."""
    return read_json(Path(folder) / _CONFIG).get("base_model_name_or_path")


def check_adapter(folder: str | Path, config: LlamaConfig) -> None:
    """Hold an adapter's config and headers against the base's table; read no weight.

    Raises ValueError as `load_adapter` does.
    """
    _Adapter(Path(folder), config)


def load_adapter(folder: str | Path, config: LlamaConfig) -> Any:
    """Read a PEFT LoRA folder as a task vector of low-rank updates.

    Returns a tree like the parameters: a `LowRank` (layers, in, r), (layers, out, r) in float32 for
    every matrix, r = 0 where it was not touched and padded with zeros where layers differ in rank;
    zeros for every vector.

    Raises ValueError, naming file, option or tensor, for options that are not implemented (DoRA,
    modules_to_save, biases, ...), tensors that are missing, extra or misshapen, a rank other than
    the config's, and factors that are not finite.
    """
    adapter = _Adapter(Path(folder), config)

    def leaf(spec: LeafSpec) -> Any:
        if spec.role == "vector":
            return np.zeros(spec.full_shape(config.num_layers), np.float32)
        return adapter.update(spec)

    return jax.tree.map(leaf, leaf_table(config))


class _Adapter:
    """The checked headers of an adapter folder."""

    def __init__(self, folder: Path, config: LlamaConfig) -> None:
        self._options = _read_options(folder / _CONFIG)
        self._num_layers = config.num_layers
        checkpoint = Checkpoint(folder, _WEIGHTS, None)
        left = dict(checkpoint.entries)
        # Module -> its two factors, of (r, in) and (out, r).
        self._factors: dict[str, tuple[TensorEntry, TensorEntry]] = {}
        for spec in jax.tree.leaves(leaf_table(config)):
            if spec.role == "vector" or (config.tie_embeddings and not spec.stacked):
                continue
            for module in _modules(spec, config.num_layers):
                names = [_PREFIX + module + suffix for suffix in _suffixes(spec)]
                found = [left.pop(name) for name in names if name in left]
                if len(found) == 1:
                    (missing,) = {*names} - {found[0].name}
                    raise ValueError(
                        f"{checkpoint.source}: missing tensor {missing}: expected both factors of "
                        f"{module}, found {found[0].name}"
                    )
                if found:
                    self._factors[module] = (found[0], found[1])
                    self._check(module, spec)
        if left:
            tied = " (a tied embedding cannot be adapted)" if config.tie_embeddings else ""
            raise ValueError(
                f"{checkpoint.source}: unexpected tensor {next(iter(left))}: expected LoRA factors "
                f"of the model's matrices{tied}, found {len(left)} others"
            )
        self._check_coverage(checkpoint.source, config)

    def update(self, spec: LeafSpec) -> LowRank:
        """The scaled factors of one leaf."""
        modules = _modules(spec, self._num_layers)
        rank = max((self._rank(module) for module in modules if module in self._factors), default=0)
        outer, inner = spec.shape[::-1]
        left = np.zeros((len(modules), inner, rank), np.float32)
        right = np.zeros((len(modules), outer, rank), np.float32)
        for layer, module in enumerate(modules):
            if module in self._factors:
                a, b = (_read(entry) for entry in self._factors[module])
                left[layer, :, : a.shape[0]] = np.float32(self._scale(module)) * a.T
                right[layer, :, : a.shape[0]] = b
        return LowRank(left, right) if spec.stacked else LowRank(left[0], right[0])

    def _rank(self, module: str) -> int:
        return int(_of_module(self._options.get("rank_pattern"), module, self._options["r"]))

    def _scale(self, module: str) -> float:
        alpha = _of_module(self._options.get("alpha_pattern"), module, self._options["lora_alpha"])
        rank = self._rank(module)
        return alpha / (math.sqrt(rank) if self._options.get("use_rslora") else rank)

    def _check(self, module: str, spec: LeafSpec) -> None:
        rank, (inner, outer) = self._rank(module), spec.shape
        for entry, shape in zip(self._factors[module], ((rank, inner), (outer, rank)), strict=True):
            if entry.shape != shape:
                raise ValueError(
                    f"{entry.file}: tensor {entry.name}: expected shape {shape} from the base's "
                    f"matrix {spec.shape} and rank {rank} in {_CONFIG}, found {entry.shape}"
                )
            if entry.code not in DTYPE_OF_CODE:
                raise ValueError(
                    f"{entry.file}: tensor {entry.name}: expected dtype "
                    f"{', '.join(DTYPE_OF_CODE)}, found {entry.code}"
                )

    def _check_coverage(self, source: Path, config: LlamaConfig) -> None:
        """A module that the config lists must be adapted in every layer it is meant for."""
        targets = self._options.get("target_modules")
        if not isinstance(targets, list) or self._options.get("exclude_modules"):
            return
        layers = self._options.get("layers_to_transform")
        chosen = range(config.num_layers) if layers is None else layers
        chosen = [chosen] if isinstance(chosen, int) else chosen
        for spec in jax.tree.leaves(leaf_table(config)):
            if spec.role == "vector" or not spec.stacked:
                continue
            for layer, module in enumerate(_modules(spec, config.num_layers)):
                wanted = layer in chosen and any(
                    module == target or module.endswith(f".{target}") for target in targets
                )
                if wanted and module not in self._factors:
                    raise ValueError(
                        f"{source}: missing tensor {_PREFIX}{module}{_suffixes(spec)[0]}: "
                        f"{_CONFIG} lists it in target_modules"
                    )


def _read_options(path: Path) -> dict[str, Any]:
    options = read_json(path)
    for key, value in options.items():
        if key in _FIXED_OPTIONS:
            if value is not None and not any(
                type(value) is type(good) and value == good for good in _FIXED_OPTIONS[key]
            ):
                expected = " or ".join(repr(good) for good in _FIXED_OPTIONS[key])
                raise ValueError(
                    f"{path}: option {key}={value!r} is not implemented, expected {expected}"
                )
        elif key in _READ_KEYS or key in _INERT_KEYS:
            continue
        elif value not in (None, False, 0, "", [], {}):
            # A key that nobody here knows may change the mathematics: refusing is the safe side.
            raise ValueError(f"{path}: option {key}={value!r} is not implemented")
    for key in ("peft_type", "r", "lora_alpha"):
        if options.get(key) is None:
            raise ValueError(f"{path}: expected the key {key!r}, found none")
    for rank in (options["r"], *(options.get("rank_pattern") or {}).values()):
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{path}: expected ranks of at least 1, found {rank!r}")
    return options


def _modules(spec: LeafSpec, num_layers: int) -> list[str]:
    """PEFT's names of the modules that hold a leaf, in layer order."""
    return [name.removesuffix(".weight") for name in spec.hf_names(num_layers)]


def _suffixes(spec: LeafSpec) -> tuple[str, str]:
    """Ends of the names of A and B: a linear layer's, or an embedding's."""
    if spec.transpose:
        return ".lora_A.weight", ".lora_B.weight"
    return ".lora_embedding_A", ".lora_embedding_B"


def _of_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that matches the end of the module's name, as PEFT finds it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read(entry: TensorEntry) -> np.ndarray:
    values = np.empty(entry.shape, np.float32)
    for at, piece in entry.rows():
        where = first_not_finite(piece)
        if where is not None:
            raise ValueError(
                f"{entry.file}: tensor {entry.name}: expected finite weights, "
                f"found {piece[where]} in row {where[0] + at.start}"
            )
        values[at] = piece
    return values
