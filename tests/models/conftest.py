"""Random models made by numpy: drawing them with JAX would compile a program per shape."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.specs import LeafSpec, leaf_table

VOCAB = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "<unk>": 5}
TEMPLATE = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"


def draw_params(config: LlamaConfig, seed: int = 0, scale: float = 1.0) -> Any:
    """Weights as `init_params` scales them, times `scale`."""
    rng = np.random.default_rng(seed)

    def leaf(spec: LeafSpec) -> jax.Array:
        shape = spec.full_shape(config.num_layers)
        if spec.init_std is None:
            return jax.device_put(np.ones(shape, np.dtype(config.dtype)))
        values = scale * spec.init_std * rng.standard_normal(shape)
        return jax.device_put(values.astype(np.dtype(config.dtype)))

    return jax.tree.map(leaf, leaf_table(config))


def draw_population(
    config: LlamaConfig, ranks: tuple[int, ...] = (2, 1), candidates: int = 3, size: float = 0.3
) -> tuple[Any, Any]:
    """A random basis of `len(ranks)` experts and the gains of random candidates."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def factors(spec: LeafSpec) -> MatrixFactors | VectorFactors:
        lead = (config.num_layers,) if spec.stacked else ()
        if spec.role == "vector":
            return VectorFactors(delta=size * normal(*lead, len(ranks), *spec.shape))
        u, v = (normal(*lead, side, sum(ranks)) for side in spec.shape)
        return MatrixFactors(u=np.float32(size) * u, v=v, ranks=ranks)

    def gains(spec: LeafSpec) -> np.ndarray:
        lead = (candidates, config.num_layers) if spec.stacked else (candidates,)
        width = len(ranks) if spec.role == "vector" else sum(ranks)
        return rng.random((*lead, width)).astype(np.float32)

    table = leaf_table(config)
    return jax.tree.map(factors, table), jax.tree.map(gains, table)


def save_tokenizer(
    folder: Path,
    vocab: dict[str, int] | None = None,
    template: str | None = TEMPLATE,
    split: Callable[[], Any] = pre_tokenizers.Whitespace,
    **special: str,
) -> Path:
    """A tokenizer of six words, with changes: more `vocab`, another `template`, ..."""
    backend = Tokenizer(models.WordLevel(VOCAB | (vocab or {}), unk_token="<unk>"))
    backend.pre_tokenizer = split()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[..., Path]:
    return save_tokenizer


@pytest.fixture(scope="session")
def make_params() -> Callable[..., Any]:
    return draw_params


@pytest.fixture(scope="session")
def make_population() -> Callable[..., tuple[Any, Any]]:
    return draw_population
