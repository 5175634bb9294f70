"""The edges of float32's range: where squares and their sums do not overflow, all is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from samples import normal

import bnjax
import bnjax.linen

pytestmark = pytest.mark.optimized

ROWS = [12, 4099]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_the_largest_standard_deviation(mean, rows):
    """1e19 / sqrt(n), as documented: the sum of n squares is 1e38."""
    std = 1e19 / np.sqrt(rows)
    x = (std * normal((rows, 8), mean, dtype=np.float64)).astype(np.float32)
    y, m = jax.jit(bnjax.batch_norm)(x)
    expected = reference.moments(x)
    np.testing.assert_allclose(m.var, expected.var.astype(float), rtol=2e-6)
    np.testing.assert_allclose(y, reference.batch_norm(x).astype(float), atol=2e-6)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("pivot", ["auto", "batch", "running"])
def test_the_largest_constant(pivot, rows):
    """1e25 / sqrt(n): the rounding error of the mean, squared n times, does not overflow."""
    x = np.full((rows, 8), 1e25 / np.sqrt(rows), np.float32)
    layer = bnjax.linen.BatchNorm(False, momentum=0.0, pivot=pivot)
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    def step(variables, x):
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    for _ in range(2):
        y, stats = step(variables, x)
        assert np.isfinite(y).all()
        np.testing.assert_allclose(stats["mean"], x[0], rtol=1e-6)
        assert np.all(np.sqrt(stats["var"]) <= 1e-6 * np.abs(x[0]))
        variables = variables | {"batch_stats": stats}


def test_a_constant_of_any_size_has_finite_gradients():
    for size in (0.0, 1e-38, 1.0, 1e20):
        x = jnp.full((12, 3), size)
        dx = jax.jit(jax.grad(lambda x: jnp.sum(bnjax.batch_norm(x)[0] ** 3)))(x)
        assert np.isfinite(dx).all()
