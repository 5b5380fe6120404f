"""Ordinary Hugging Face folders to parameters and back, leaf by leaf, without torch.

Both directions follow the leaf table. A tensor that is missing, extra or misshapen is refused with
its name and file before any weight is read.
"""

import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from cycleqd_jax.models.specs import DTYPES, LeafSpec, LlamaConfig, LlamaParams, leaf_table

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPE_OF_CODE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODE_OF_DTYPE = {name: code for code, name in _DTYPE_OF_CODE.items()}
_TIED_HEAD = "lm_head.weight"
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
    return LlamaConfig.from_hf(_read_json(folder / "config.json"), str(folder / "config.json"))


def load_model(folder: str | Path, dtype: str | None = None) -> tuple[LlamaConfig, LlamaParams]:
    """Read a model folder; weights keep the dtype of the file unless `dtype` is given.

    Raises ValueError, naming file and tensor with what was expected and found, for a folder without
    config or weights and for missing, extra or misshapen tensors.
    """
    folder = Path(folder)
    config = load_config(folder)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    with ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        tensors.check(config)
        params = jax.tree.map(
            lambda spec: _read_leaf(tensors, spec, config.num_layers, dtype), leaf_table(config)
        )
        tensors.check_tied_head(config)
    return replace(config, dtype=str(params.embed.dtype)), params


def save_model(
    folder: str | Path,
    config: LlamaConfig,
    params: LlamaParams,
    *,
    tokenizer: Any = None,
    like: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that `transformers` loads: config, generation config, weights, tokenizer.

    The tokenizer is an object with `save_pretrained`, or its files are copied from the folder
    `like`. Everything goes to a temporary sibling that is renamed at the end, so a failure leaves
    nothing half-written. Raises ValueError for parameters that do not fit `config`,
    FileExistsError for a folder that is not empty unless `overwrite`, OSError with a plain message
    when the disk is full.
    """
    folder = Path(folder)
    leaves = _checked_leaves(config, params)
    config = replace(config, dtype=str(params.embed.dtype))
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} already exists: expected an empty or new folder; pass overwrite=True"
        )
    size = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    with _replaced_folder(folder, size) as draft:
        _write_json(draft / "config.json", config.to_hf())
        hf = config.to_hf()
        ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(draft / "generation_config.json", {"do_sample": False, **ids})
        _write_weights(draft / _WEIGHTS, config, leaves)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(draft))
        elif like is not None:
            _copy_tokenizer(Path(like), draft)
    return folder


class _Tensors:
    """The tensors of one or many safetensors shards, opened lazily and memory-mapped."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, Any] = {}
        single, index = folder / _WEIGHTS, folder / _INDEX
        if index.is_file():
            self.source = index
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index}: expected a 'weight_map' of tensor names, found none")
            self.file_of = {name: folder / file for name, file in weight_map.items()}
        elif single.is_file():
            self.source = single
            self.file_of = dict.fromkeys(self._names(single), single)
        else:
            raise ValueError(f"{folder}: expected weights in {_WEIGHTS} or {_INDEX}, found neither")

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            if not path.is_file():
                raise ValueError(
                    f"{path}: expected a shard that {_INDEX} names, found no such file"
                )
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="np"))
            except SafetensorError as error:
                raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
        return self._open[path]

    def _names(self, path: Path) -> list[str]:
        return list(self._file(path).keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype code of a tensor, from the header."""
        path = self.file_of[name]
        file = self._file(path)
        if name not in self._names(path):
            raise ValueError(
                f"{path}: expected tensor {name}, which the index puts here; not found"
            )
        part = file.get_slice(name)
        return tuple(part.get_shape()), str(part.get_dtype())

    def read(self, name: str) -> np.ndarray:
        return self._file(self.file_of[name]).get_tensor(name)

    def check(self, config: LlamaConfig) -> None:
        """Hold names, shapes and dtypes against the table."""
        expected = {
            name: spec
            for spec in jax.tree.leaves(leaf_table(config))
            for name in spec.hf_names(config.num_layers)
        }
        missing = [name for name in expected if name not in self.file_of]
        if missing:
            raise ValueError(
                f"{self.source}: missing {_listed(missing)}: expected {len(expected)} tensors, "
                f"found {len(self.file_of)}"
            )
        allowed = {_TIED_HEAD} if config.tie_embeddings else set()
        extra = [
            name
            for name in self.file_of
            if name not in expected and name not in allowed and not name.endswith(_IGNORED_SUFFIX)
        ]
        if extra:
            raise ValueError(
                f"{self.source}: unexpected {_listed(extra)}: config.json describes "
                f"{len(expected)} tensors, found {len(self.file_of)}"
            )
        for name, spec in expected.items():
            shape, code = self.describe(name)
            if shape != spec.hf_shape():
                raise ValueError(
                    f"{self.file_of[name]}: tensor {name}: expected shape {spec.hf_shape()} from "
                    f"config.json, found {shape}"
                )
            if code not in _DTYPE_OF_CODE:
                raise ValueError(
                    f"{self.file_of[name]}: tensor {name}: expected dtype "
                    f"{', '.join(_DTYPE_OF_CODE)}, found {code}"
                )

    def check_tied_head(self, config: LlamaConfig) -> None:
        """A tied model may repeat its embedding as a head, but not carry another one."""
        if not config.tie_embeddings or _TIED_HEAD not in self.file_of:
            return
        embedding = leaf_table(config).embed.hf_name
        if not np.array_equal(self.read(_TIED_HEAD), self.read(embedding)):
            raise ValueError(
                f"{self.file_of[_TIED_HEAD]}: tensor {_TIED_HEAD}: expected a copy of {embedding} "
                "(tie_word_embeddings is true), found other values; set tie_word_embeddings to "
                "false in config.json to use it"
            )


def _read_leaf(tensors: _Tensors, spec: LeafSpec, num_layers: int, dtype: str | None) -> jax.Array:
    """One leaf in our orientation; host memory holds this leaf only."""
    names = spec.hf_names(num_layers)
    codes = [tensors.describe(name)[1] for name in names]
    for name, code in zip(names, codes, strict=True):
        if code != codes[0]:
            raise ValueError(
                f"{tensors.file_of[name]}: tensor {name}: expected dtype {codes[0]} as in "
                f"{names[0]}, found {code}"
            )
    target = np.dtype(jnp.dtype(dtype or _DTYPE_OF_CODE[codes[0]]))
    leaf = np.empty((len(names), *spec.shape), target)
    for i, name in enumerate(names):
        tensor = tensors.read(name)
        leaf[i] = (tensor.T if spec.transpose else tensor).astype(target)
    return jnp.asarray(leaf if spec.stacked else leaf[0])


def _checked_leaves(config: LlamaConfig, params: LlamaParams) -> list[tuple[LeafSpec, Any]]:
    """Pairs of spec and leaf, after a check of tree, shapes and dtypes."""
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
        if not isinstance(leaf, jax.Array | np.ndarray):
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


def _write_weights(path: Path, config: LlamaConfig, leaves: list[tuple[LeafSpec, Any]]) -> None:
    """Write one safetensors file, a leaf at a time.

    The library's writer wants all tensors in memory at once, which would be a second, transposed
    copy of the model; the format itself is a length, a JSON header and raw bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec, leaf in leaves:
        for name in spec.hf_names(config.num_layers):
            end = offset + int(np.prod(spec.shape)) * leaf.dtype.itemsize
            code = _CODE_OF_DTYPE[str(leaf.dtype)]
            shape = list(spec.hf_shape())
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec, leaf in leaves:
            whole = np.asarray(leaf)
            for tensor in whole if spec.stacked else [whole]:
                ordered = np.ascontiguousarray(tensor.T if spec.transpose else tensor)
                file.write(ordered.view(np.uint8).data)


@contextmanager
def _replaced_folder(folder: Path, size: int) -> Iterator[Path]:
    """A draft folder next to `folder` that takes its place on success and vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise OSError(errno.ENOSPC, _full(size, free), str(folder))
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        if folder.exists():
            old = draft.with_name(draft.name + ".old")
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(folder.parent).free
            raise OSError(errno.ENOSPC, _full(size, free), str(folder)) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _full(size: int, free: int) -> str:
    return (
        f"no space left to save the model: expected {size / 1e6:.1f} MB free, "
        f"found {free / 1e6:.1f} MB; free some or choose another folder"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _copy_tokenizer(source: Path, target: Path) -> None:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ValueError(f"{source}: expected tokenizer files such as tokenizer.json, found none")
    for path in found:
        shutil.copyfile(path, target / path.name)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent}: expected the file {path.name}, found none")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"tensor {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
