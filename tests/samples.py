"""Inputs that several files draw: normal data, and rows of settings that cover all pairs."""

import functools
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
    return jnp.asarray(2 * normal(shape, 0.5, seed), dtype)


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
    """Rows of field values such that any two values of two fields meet in a row.

    As few as thirty tries find: most rows are programs.
    """
    sizes = [len(values) for values in fields.values()]
    rows = min((_greedy_rows(sizes, random.Random(seed)) for seed in range(30)), key=len)
    return [{name: fields[name][k] for name, k in zip(fields, row, strict=True)} for row in rows]


def _greedy_rows(sizes, draw):
    """Each row begins with the value that lacks most others, and takes those that lack it most."""
    values = [(field, k) for field, size in enumerate(sizes) for k in range(size)]
    lacks = {value: {other for other in values if other[0] != value[0]} for value in values}
    rows = []
    while any(lacks.values()):
        row = [max(values, key=lambda value: (len(lacks[value]), draw.random()))]
        others = [field for field in range(len(sizes)) if field != row[0][0]]
        for field in draw.sample(others, len(others)):
            fitting = [(field, k) for k in range(sizes[field])]
            row.append(
                max(fitting, key=lambda value: (len(lacks[value].intersection(row)), draw.random()))
            )
        for value in row:
            lacks[value].difference_update(row)
        rows.append([k for _, k in sorted(row)])
    return rows


def fields_of_flaxs_layers(*, x_dtype, dtype, given, axis):
    """Rows for a layer beside flax's; of these, a wing says what it takes.

    In pairs meet the values that decide dtypes. The others are passed on as they are given, and
    take turns: the layers make no cases of them.
    """
    rows = covering(
        x_dtype=x_dtype,
        dtype=dtype,
        param_dtype=[jnp.float32, jnp.bfloat16],
        use_bias=[True, False],
        use_scale=[True, False],
    )
    in_turn = {
        "given": given,
        "axis": axis,
        "momentum": [0.9, 0.0, 1.0],
        "epsilon": [1e-5, 1e-2],
        "bias_init": [between_signs, jax.nn.initializers.zeros],
        "scale_init": [around_one, jax.nn.initializers.ones],
        "axis_name": [None, "replicas", ("replicas",)],
        "use_fast_variance": [True, False],
    }
    return [
        row | {name: of[(i + j) % len(of)] for j, (name, of) in enumerate(in_turn.items())}
        for i, row in enumerate(rows)
    ]


def every_pair(**fields):
    """Runs a test on rows of these arguments in which any two values of two arguments meet."""
    fields = {name: list(values) for name, values in fields.items()}
    rows = [tuple(row.values()) for row in covering(**fields)]
    return pytest.mark.parametrize(tuple(fields), rows)
