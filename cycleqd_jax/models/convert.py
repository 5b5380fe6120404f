"""Ordinary Hugging Face folders to parameters and back, leaf by leaf, without torch.

Both directions follow the leaf table. A tensor that is missing, extra or misshapen is refused with
its name and file before any weight is read.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.models.config import DTYPES, LlamaConfig
from cycleqd_jax.models.folder import read_json, replaced_folder, write_json
from cycleqd_jax.models.shards import (
    DTYPE_OF_CODE,
    Checkpoint,
    TensorEntry,
    first_not_finite,
    write_safetensors,
)
from cycleqd_jax.models.specs import LeafSpec, LlamaParams, leaf_paths, leaf_table

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_TIED_HEAD = "lm_head.weight"
# Start and stop of a part of a leaf along every axis.
_Block = tuple[tuple[int, int], ...]
# A buffer that old Llama 2 exports carry; it follows from the config.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load_config(folder: str | Path) -> LlamaConfig:
    """Read a folder's `config.json`. Raises ValueError where it is missing or unsupported."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a model folder, found no such folder")
    return LlamaConfig.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def check_weights(folder: str | Path) -> LlamaConfig:
    """Hold a folder's config and the headers of its weights against each other; read no weight.

    The config has the dtype of the stored embeddings. Raises ValueError as `load_model` does.
    """
    config = load_config(folder)
    return replace(config, dtype=_dtype_of(config, _open(Path(folder), config)))


def load_model(
    folder: str | Path,
    dtype: str | None = None,
    *,
    sharding: Any = None,
    unstack: bool = False,
) -> tuple[LlamaConfig, LlamaParams]:
    """Read a model folder; weights keep the dtype of the file unless `dtype` is given.

    Each leaf goes straight to its place, a device's part at a time: besides the model, host memory
    holds one part of one leaf. `sharding` is a `jax.sharding.Sharding` for all leaves or a tree of
    them with the structure of the parameters; None is the default device. With `unstack` the layers
    come apart, as `cache.unstack_layers` gives them, and only one leaf is ever there twice.

    Raises ValueError, naming file and tensor with what was expected and found, for a folder without
    config or weights, truncated or corrupt files, missing, extra or misshapen tensors, weights that
    are not finite (in the file, or after the conversion to `dtype`), and a sharding that does not
    divide a leaf.
    """
    config, readers = open_model(folder, dtype, sharding=sharding)
    if not unstack:
        return config, jax.tree.map(lambda read: read(), readers)
    stacks, structure = jax.tree.flatten(readers.layers)
    rows = [_split(read, config.num_layers) for read in stacks]
    layers = tuple(jax.tree.unflatten(structure, layer) for layer in zip(*rows, strict=True))
    others = jax.tree.map(lambda read: read(), readers.replace(layers=None))
    return config, others.replace(layers=layers)


def open_model(
    folder: str | Path, dtype: str | None = None, *, sharding: Any = None
) -> tuple[LlamaConfig, LlamaParams]:
    """Check a model folder but for its weights' values, which are read leaf by leaf as wanted.

    Returns the config and, in place of every leaf of the parameters, a function without arguments
    that reads it from the file to its place. Arguments and errors are those of `load_model`;
    weights that are not finite are found where a leaf is read.
    """
    folder = Path(folder)
    config = load_config(folder)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    checkpoint = _open(folder, config)
    _check_tied_head(checkpoint, config)
    table = leaf_table(config)
    readers = [
        partial(_load_leaf, checkpoint, spec, config.num_layers, dtype, place)
        for spec, place in zip(jax.tree.leaves(table), _places(config, sharding), strict=True)
    ]
    stored = dtype or _dtype_of(config, checkpoint)
    return replace(config, dtype=stored), jax.tree.unflatten(jax.tree.structure(table), readers)


def save_model(
    folder: str | Path,
    config: LlamaConfig,
    params: LlamaParams,
    *,
    tokenizer: Any = None,
    like: str | Path | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5_000_000_000,
) -> Path:
    """Write a folder that `transformers` loads: config, generation config, weights, tokenizer.

    Weights beyond `max_shard_size` bytes go to several files and an index; a tensor is never cut.
    The tokenizer is an object with `save_pretrained`, or its files, the chat template and the
    generation config are copied from the folder `like`. `params` may have its layers apart.
    Everything goes to a temporary sibling that
    is renamed at the end, so a failure leaves nothing half-written. Raises ValueError for
    parameters that do not fit `config`, FileExistsError for a folder that is not empty unless
    `overwrite`, OSError with a plain message when the disk is full.
    """
    folder = Path(folder)
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
    leaves = _checked_leaves(config, params)
    config = replace(config, dtype=str(params.embed.dtype))
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} already exists: expected an empty or new folder; pass overwrite=True"
        )
    size = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    with replaced_folder(folder, size) as draft:
        hf = config.to_hf()
        write_json(draft / "config.json", hf)
        if like is not None and (Path(like) / _GENERATION).is_file():
            shutil.copyfile(Path(like) / _GENERATION, draft / _GENERATION)
        else:
            ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(draft / _GENERATION, {"do_sample": False, **ids})
        _write_weights(draft, config, leaves, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(draft))
        elif like is not None:
            _copy_tokenizer(Path(like), draft)
    return folder


def _open(folder: Path, config: LlamaConfig) -> Checkpoint:
    """The folder's tensors, with names, shapes and dtypes held against the table."""
    checkpoint = Checkpoint(folder, _WEIGHTS, _INDEX)
    entries = checkpoint.entries
    expected = {
        name: spec
        for spec in jax.tree.leaves(leaf_table(config))
        for name in spec.hf_names(config.num_layers)
    }
    missing = [name for name in expected if name not in entries]
    if missing:
        raise ValueError(
            f"{checkpoint.source}: missing {_listed(missing)}: expected {len(expected)} tensors, "
            f"found {len(entries)}"
        )
    allowed = {_TIED_HEAD} if config.tie_embeddings else set()
    extra = [
        name
        for name in entries
        if name not in expected and name not in allowed and not name.endswith(_IGNORED_SUFFIX)
    ]
    if extra:
        raise ValueError(
            f"{checkpoint.source}: unexpected {_listed(extra)}: config.json describes "
            f"{len(expected)} tensors, found {len(entries)}"
        )
    for name, spec in expected.items():
        _check_entry(entries[name], spec)
    for spec in jax.tree.leaves(leaf_table(config)):
        first, *others = (entries[name] for name in spec.hf_names(config.num_layers))
        for entry in others:
            if entry.code != first.code:
                raise ValueError(
                    f"{entry.file}: tensor {entry.name}: expected dtype {first.code} as in "
                    f"{first.name}, found {entry.code}"
                )
    return checkpoint


def _check_entry(entry: TensorEntry, spec: LeafSpec) -> None:
    if entry.shape != spec.hf_shape():
        raise ValueError(
            f"{entry.file}: tensor {entry.name}: expected shape {spec.hf_shape()} from "
            f"config.json, found {entry.shape}"
        )
    if entry.code not in DTYPE_OF_CODE:
        raise ValueError(
            f"{entry.file}: tensor {entry.name}: expected dtype {', '.join(DTYPE_OF_CODE)}, "
            f"found {entry.code}"
        )


def _dtype_of(config: LlamaConfig, checkpoint: Checkpoint) -> str:
    return DTYPE_OF_CODE[checkpoint.entries[leaf_table(config).embed.hf_name].code]


def _check_tied_head(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """A tied model may repeat its embedding as a head, but not carry another one."""
    if not config.tie_embeddings or _TIED_HEAD not in checkpoint.entries:
        return
    spec = leaf_table(config).embed
    head, embedding = checkpoint.entries[_TIED_HEAD], checkpoint.entries[spec.hf_name]
    same = (head.shape, head.code) == (embedding.shape, embedding.code) and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(head.rows(), embedding.rows(), strict=True)
    )
    if not same:
        raise ValueError(
            f"{head.file}: tensor {_TIED_HEAD}: expected a copy of {embedding.name} "
            "(tie_word_embeddings is true), found other values; set tie_word_embeddings to "
            "false in config.json to use it"
        )


def _places(config: LlamaConfig, sharding: Any) -> list[jax.sharding.Sharding | None]:
    """One sharding per leaf, each checked to divide its leaf; None is the default device."""
    table = leaf_table(config)
    if sharding is None:
        return [None] * len(jax.tree.leaves(table))
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, table)
    expected: Any = jax.tree.structure(table)
    found: Any = jax.tree.structure(sharding)
    if found != expected:
        raise ValueError(f"load_model: expected shardings with the tree {expected}, found {found}")
    places = jax.tree.leaves(sharding)
    for (path, spec), place in zip(leaf_paths(config), places, strict=True):
        shape = spec.full_shape(config.num_layers)
        try:
            place.shard_shape(shape)
        except ValueError as error:
            raise ValueError(
                f"load_model: leaf {path}: expected a sharding that divides its shape {shape}, "
                f"found {place}: {error}"
            ) from error
    return places


def _load_leaf(
    checkpoint: Checkpoint,
    spec: LeafSpec,
    num_layers: int,
    dtype: str | None,
    place: jax.sharding.Sharding | None,
) -> jax.Array:
    """One leaf in our orientation, on its devices; host memory holds one device's part of it."""
    entries = [checkpoint.entries[name] for name in spec.hf_names(num_layers)]
    target = entries[0].dtype if dtype is None else np.dtype(jnp.dtype(dtype))
    shape = spec.full_shape(num_layers)
    if place is None:
        # Not bound to its device, as any other array that is made without naming one.
        whole = tuple((0, size) for size in shape)
        return jax.block_until_ready(jax.device_put(_read_block(entries, spec, whole, target)))
    devices_of: dict[_Block, list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        sides = zip(index or (slice(None),) * len(shape), shape, strict=True)
        block = tuple(side.indices(size)[:2] for side, size in sides)
        devices_of.setdefault(block, []).append(device)
    parts = {}
    for block, devices in devices_of.items():
        values = _read_block(entries, spec, block, target)
        for device in devices:
            # Waiting keeps the buffers of transfers from piling up.
            parts[device] = jax.block_until_ready(jax.device_put(values, device))
        del values
    order = place.addressable_devices_indices_map(shape)
    return jax.make_array_from_single_device_arrays(shape, place, [parts[d] for d in order])


def _split(read: Callable[[], jax.Array], num_layers: int) -> list[jax.Array]:
    """The layers of a stacked leaf, which is let go on return."""
    stack = read()
    return [jax.block_until_ready(stack[layer]) for layer in range(num_layers)]


def _read_block(
    entries: list[TensorEntry], spec: LeafSpec, block: _Block, target: np.dtype
) -> np.ndarray:
    """The part `block` of a leaf, checked to be finite, from the rows of the file that cover it."""
    (first, last), *sides = block if spec.stacked else ((0, 1), *block)
    values = np.empty((last - first, *(stop - start for start, stop in sides)), target)
    (top, bottom), *others = sides[::-1] if spec.transpose else sides
    columns = tuple(slice(*side) for side in others)
    for entry, out in zip(entries[first:last], values, strict=True):
        for at, piece in entry.rows(top, bottom):
            own = piece[(slice(None), *columns)]
            with np.errstate(over="ignore"):
                own = np.ascontiguousarray(own.astype(target, copy=False))
            _check_finite(own, entry, at.start)
            to = slice(at.start - top, at.stop - top)
            if spec.transpose:
                out[:, to] = own.T
            else:
                out[to] = own
    return values if spec.stacked else values[0]


def _check_finite(values: np.ndarray, entry: TensorEntry, row: int) -> None:
    where = first_not_finite(values)
    if where is not None:
        at = (where[0] + row, *where[1:])
        raise ValueError(
            f"{entry.file}: tensor {entry.name}: expected finite weights, found {values[where]} "
            f"in row {at[0]} (stored as {entry.code}, read as {values.dtype})"
        )


@dataclass(frozen=True)
class _Layers:
    """A stacked leaf as its layers."""

    rows: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.rows[0].shape)

    @property
    def dtype(self) -> Any:
        return self.rows[0].dtype

    @property
    def size(self) -> int:
        return sum(row.size for row in self.rows)


def _checked_leaves(config: LlamaConfig, params: LlamaParams) -> list[tuple[LeafSpec, Any]]:
    """Pairs of spec and leaf, after a check of tree, shapes and dtypes."""
    if isinstance(params.layers, tuple):
        layers = jax.tree.map(lambda *rows: _Layers(rows), *params.layers)
        params = params.replace(layers=layers)
    table = leaf_table(config)
    expected: Any = jax.tree.structure(table)
    # Kernels stay whole here: one of them in place of a leaf must be named, not flattened.
    found, structure = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: not isinstance(node, LlamaParams | type(table.layers) | None)
    )
    if structure != expected:
        raise ValueError(
            f"save_model: expected parameters with the tree {expected}, found {structure}; "
            "a tied model has no head"
        )
    specs = jax.tree.leaves(table)
    for spec, (path, leaf) in zip(specs, found, strict=True):
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | np.ndarray | _Layers):
            raise ValueError(
                f"save_model: leaf {where}: expected an array, found {type(leaf).__name__}; "
                "materialise the candidate first"
            )
        shape = spec.full_shape(config.num_layers)
        if leaf.shape != shape:
            raise ValueError(
                f"save_model: leaf {where}: expected shape {shape}, found {leaf.shape}"
            )
        if str(leaf.dtype) not in DTYPES:
            raise ValueError(
                f"save_model: leaf {where}: expected dtype {', '.join(DTYPES)}, found {leaf.dtype}"
            )
    return [(spec, leaf) for spec, (_, leaf) in zip(specs, found, strict=True)]


def _write_weights(
    folder: Path, config: LlamaConfig, leaves: list[tuple[LeafSpec, Any]], max_shard_size: int
) -> None:
    shards: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
    total = filled = 0
    for spec, leaf in leaves:
        size = int(np.prod(spec.shape)) * leaf.dtype.itemsize
        for name in spec.hf_names(config.num_layers):
            if shards[-1] and filled + size > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append((name, np.dtype(leaf.dtype), spec.hf_shape()))
            filled += size
            total += size
    tensors = _tensors(leaves)
    if len(shards) == 1:
        write_safetensors(folder / _WEIGHTS, shards[0], tensors)
        return
    weight_map: dict[str, str] = {}
    for number, layout in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, layout, tensors)
        weight_map |= dict.fromkeys((name for name, _, _ in layout), file)
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(leaves: list[tuple[LeafSpec, Any]]) -> Iterator[np.ndarray]:
    """Every tensor in the orientation of the file; one leaf at a time is fetched to the host."""
    for spec, leaf in leaves:
        rows: Iterable[Any] = [leaf]
        if spec.stacked:
            rows = leaf.rows if isinstance(leaf, _Layers) else np.asarray(leaf)
        for row in rows:
            tensor = np.asarray(row)
            yield tensor.T if spec.transpose else tensor


def _copy_tokenizer(source: Path, target: Path) -> None:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ValueError(f"{source}: expected tokenizer files such as tokenizer.json, found none")
    for path in found:
        shutil.copyfile(path, target / path.name)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"tensor {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
