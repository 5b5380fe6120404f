from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.spectral import materialise
from cycleqd_jax.models import kernels, llama
from cycleqd_jax.models.specs import LlamaConfig

CANDIDATES = 3
Make = Callable[..., Any]
forward = jax.jit(llama.forward, static_argnums=1)
build = jax.jit(materialise)
attach = jax.jit(kernels.attach)


def config_of(tied: bool, dtype: str = "float32") -> LlamaConfig:
    return LlamaConfig(40, 16, 24, 2, 4, 2, 4, tie_embeddings=tied, dtype=dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_many_candidates_equal_each_materialised(
    tied: bool, make_params: Make, make_population: Make
) -> None:
    config = config_of(tied)
    base, (basis, gains) = make_params(config), make_population(config)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (5, 9))
    rows = jnp.array([2, 0, 1, 1, 2])
    together = forward(attach(base, basis, gains), config, tokens, rows)
    for row, candidate in enumerate(rows.tolist()):
        own = jax.tree.map(lambda gain, c=candidate: gain[c], gains)
        alone = forward(build(base, basis, own), config, tokens[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-5, atol=5e-5)


def test_per_row_gains_replace_the_row_numbers(make_params: Make, make_population: Make) -> None:
    config = config_of(tied=True)
    attached = attach(make_params(config), *make_population(config))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (4, 6))
    rows = jnp.array([1, 1, 0, 2])
    expected = forward(attached, config, tokens, rows)
    np.testing.assert_array_equal(
        forward(kernels.per_row(attached, rows), config, tokens), expected
    )


def test_built_candidate_equals_materialise(make_params: Make, make_population: Make) -> None:
    config = config_of(tied=False)
    base, (basis, gains) = make_params(config), make_population(config)
    attached = attach(base, basis, gains)
    for candidate in range(CANDIDATES):
        own = jax.tree.map(lambda gain, c=candidate: gain[c], gains)
        built = kernels.materialise_candidate(attached, jnp.int32(candidate))
        expected = build(base, basis, own)
        structure: Any = jax.tree.structure(expected)
        assert jax.tree.structure(built) == structure
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), built, expected)


def test_rank_zero_leaves_the_base(make_params: Make, make_population: Make) -> None:
    config = config_of(tied=True)
    base, (basis, gains) = make_params(config), make_population(config, (0, 0))
    still = jax.tree.map(jnp.zeros_like, gains)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 6))
    attached = attach(base, basis, still)
    rows = jnp.array([0, 2])
    np.testing.assert_array_equal(
        forward(attached, config, tokens, rows), forward(base, config, tokens)
    )
    assert kernels.spectral_share(attached) == 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_keep_the_dtype_of_the_weights(
    dtype: str, make_params: Make, make_population: Make
) -> None:
    config = config_of(tied=False, dtype=dtype)
    attached = attach(make_params(config), *make_population(config))
    x = jnp.ones((2, 3, config.hidden_size), dtype)
    layer = jax.tree.map(lambda leaf: leaf[0], attached.layers)
    assert kernels.project(x, layer.gate, jnp.array([0, 1])).dtype == dtype
    assert kernels.norm_weight(layer.mlp_norm, jnp.array([0, 1])).dtype == dtype


def test_gradient_of_a_product_is_the_stock_one() -> None:
    rng = np.random.default_rng(0)
    shapes = ((3, 5, 7), (7, 4), (3, 5, 4))
    x, weight, direction = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    ours = jax.grad(lambda x, w: jnp.vdot(kernels.project(x, w), direction), (0, 1))(x, weight)
    stock = jax.grad(lambda x, w: jnp.vdot(x @ w, direction), (0, 1))(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, stock)


def test_candidates_are_counted(make_params: Make, make_population: Make) -> None:
    config = config_of(tied=False)
    base, (basis, gains) = make_params(config), make_population(config)
    assert kernels.num_candidates(attach(base, basis, gains)) == CANDIDATES
    assert kernels.num_candidates(base) is None


def test_a_basis_of_something_else_is_refused(make_params: Make, make_population: Make) -> None:
    config = config_of(tied=False)
    base, (_, gains) = make_params(config), make_population(config)
    with pytest.raises(ValueError, match="expects a basis of MatrixFactors"):
        kernels.attach(base, base, gains)
