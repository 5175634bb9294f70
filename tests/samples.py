"""Inputs that several files draw: normal data, and rows of settings that cover all pairs."""

import functools
import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

RATIOS = [0, 1e2, 1e3, 1e4, 1e5, 1e6]  # mean / std
ROWS = [4096, 4099]  # XLA fuses differently where the row count is no power of two


def normal(shape, ratio=0, seed=0, dtype=np.float32):
    """Data of standard deviation 1 and mean `ratio`."""
    return (ratio + np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def well_scaled(seed, shape, dtype=jnp.float32):
    """A JAX array of standard deviation 2, whose mean is not zero."""
    return jnp.asarray(1 + 2 * np.random.default_rng(seed).standard_normal(shape), dtype)


def between_signs(key, shape, dtype=jnp.float32):
    """An initializer between -1 and 1: as the key says, and sooner compiled than random ones."""
    return _waves(key, tuple(shape), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _waves(key, shape, dtype):
    start = jax.random.key_data(key)[-1] % 1000
    return jnp.sin(start.astype(dtype) + jnp.arange(math.prod(shape), dtype=dtype)).reshape(shape)


def around_one(key, shape, dtype=jnp.float32):
    """The same between 1/2 and 3/2."""
    return 1 + between_signs(key, shape, dtype) / 2


def kernel(key, shape, dtype=jnp.float32):
    """An initializer of kernels, the same for every key: nothing to compile."""
    values = np.random.default_rng(0).standard_normal(shape) / shape[-2] ** 0.5
    return jnp.asarray(values, dtype)


def fresh(features=3):
    """Running statistics as a layer begins with them."""
    return {"mean": jnp.zeros(features), "var": jnp.ones(features)}


def covering(**fields):
    """Rows of field values such that any two values of two fields meet in a row."""
    draw, covered = random.Random(0), []
    choices = [range(len(values)) for values in fields.values()]

    def pairs(row):
        return set(itertools.combinations(enumerate(row), 2))

    missing = {
        pair
        for (i, a), (j, b) in itertools.combinations(enumerate(choices), 2)
        for pair in itertools.product([(i, k) for k in a], [(j, k) for k in b])
    }
    while missing:
        rows = [[draw.choice(c) for c in choices] for _ in range(30)]
        for row in rows:
            for field, value in min(missing):
                row[field] = value
        best = max(rows, key=lambda row: len(missing & pairs(row)))
        missing -= pairs(best)
        covered.append({name: fields[name][k] for name, k in zip(fields, best, strict=True)})
    return covered


def every_pair(**fields):
    """Runs a test on rows of these arguments in which any two values of two arguments meet."""
    fields = {name: list(values) for name, values in fields.items()}
    rows = [tuple(row.values()) for row in covering(**fields)]
    return pytest.mark.parametrize(tuple(fields), rows)
