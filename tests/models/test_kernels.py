from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors, materialise
from cycleqd_jax.models import kernels, llama
from cycleqd_jax.models.llama import init_params
from cycleqd_jax.models.specs import LeafSpec, LlamaConfig, leaf_table

EXPERTS, CANDIDATES = 2, 3
forward = jax.jit(llama.forward, static_argnums=1)
build = jax.jit(materialise)
attach = jax.jit(kernels.attach)


def population(
    config: LlamaConfig, ranks: tuple[int, ...] = (2, 1), candidates: int = CANDIDATES
) -> tuple[Any, Any, Any]:
    """Base, basis and gains of random candidates."""
    made = jax.jit(directions, static_argnums=(0, 1, 2))(config, ranks, candidates)
    return init_params(jax.random.key(0), config), *made


def directions(config: LlamaConfig, ranks: tuple[int, ...], candidates: int) -> tuple[Any, Any]:
    keys = iter(jax.random.split(jax.random.key(1), 100))

    def factors(spec: LeafSpec) -> MatrixFactors | VectorFactors:
        lead = (config.num_layers,) if spec.stacked else ()
        if spec.role == "vector":
            delta = 0.3 * jax.random.normal(next(keys), (*lead, EXPERTS, *spec.shape))
            return VectorFactors(delta=delta)
        rank = sum(ranks)
        return MatrixFactors(
            u=0.3 * jax.random.normal(next(keys), (*lead, spec.shape[0], rank)),
            v=jax.random.normal(next(keys), (*lead, spec.shape[1], rank)),
            ranks=ranks,
        )

    def gain(spec: LeafSpec) -> jax.Array:
        lead = (candidates, config.num_layers) if spec.stacked else (candidates,)
        size = EXPERTS if spec.role == "vector" else sum(ranks)
        return jax.random.uniform(next(keys), (*lead, size))

    table = leaf_table(config)
    return jax.tree.map(factors, table), jax.tree.map(gain, table)


def config_of(tied: bool, dtype: str = "float32") -> LlamaConfig:
    return LlamaConfig(40, 16, 24, 2, 4, 2, 4, tie_embeddings=tied, dtype=dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_many_candidates_equal_each_materialised(tied: bool) -> None:
    config = config_of(tied)
    base, basis, gains = population(config)
    tokens = jax.random.randint(jax.random.key(2), (5, 9), 0, config.vocab_size)
    rows = jnp.array([2, 0, 1, 1, 2])
    together = forward(attach(base, basis, gains), config, tokens, rows)
    for row, candidate in enumerate(rows.tolist()):
        own = jax.tree.map(lambda gain, c=candidate: gain[c], gains)
        alone = forward(build(base, basis, own), config, tokens[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-5, atol=5e-5)


def test_per_row_gains_replace_the_row_numbers() -> None:
    config = config_of(tied=True)
    attached = attach(*population(config))
    tokens = jax.random.randint(jax.random.key(2), (4, 6), 0, config.vocab_size)
    rows = jnp.array([1, 1, 0, 2])
    expected = forward(attached, config, tokens, rows)
    np.testing.assert_array_equal(
        forward(kernels.per_row(attached, rows), config, tokens), expected
    )


def test_built_candidate_equals_materialise() -> None:
    base, basis, gains = population(config_of(tied=False))
    attached = attach(base, basis, gains)
    for candidate in range(CANDIDATES):
        own = jax.tree.map(lambda gain, c=candidate: gain[c], gains)
        built = kernels.materialise_candidate(attached, jnp.int32(candidate))
        expected = build(base, basis, own)
        assert jax.tree.structure(built) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), built, expected)


def test_rank_zero_leaves_the_base() -> None:
    config = config_of(tied=True)
    base, basis, gains = population(config, ranks=(0, 0))
    still = jax.tree.map(jnp.zeros_like, gains)
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, config.vocab_size)
    attached = attach(base, basis, still)
    rows = jnp.array([0, 2])
    np.testing.assert_array_equal(
        forward(attached, config, tokens, rows), forward(base, config, tokens)
    )
    assert kernels.spectral_share(attached) == 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_keep_the_dtype_of_the_weights(dtype: str) -> None:
    config = config_of(tied=False, dtype=dtype)
    attached = attach(*population(config))
    x = jnp.ones((2, 3, config.hidden_size), dtype)
    layer = jax.tree.map(lambda leaf: leaf[0], attached.layers)
    assert kernels.project(x, layer.gate, jnp.array([0, 1])).dtype == dtype
    assert kernels.norm_weight(layer.mlp_norm, jnp.array([0, 1])).dtype == dtype


def test_gradient_of_a_product_is_the_stock_one() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 5, 7))
    weight = jax.random.normal(keys[1], (7, 4))
    direction = jax.random.normal(keys[2], (3, 5, 4))
    ours = jax.grad(lambda x, w: jnp.vdot(kernels.project(x, w), direction), (0, 1))(x, weight)
    stock = jax.grad(lambda x, w: jnp.vdot(x @ w, direction), (0, 1))(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, stock)


def test_candidates_are_counted() -> None:
    config = config_of(tied=False)
    base, basis, gains = population(config)
    assert kernels.num_candidates(attach(base, basis, gains)) == CANDIDATES
    assert kernels.num_candidates(base) is None


def test_a_basis_of_something_else_is_refused() -> None:
    base, _, gains = population(config_of(tied=False))
    with pytest.raises(ValueError, match="expects a basis of MatrixFactors"):
        kernels.attach(base, base, gains)
