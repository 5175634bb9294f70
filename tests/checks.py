"""What tests assert in more than one file. Oracles are in `reference`, inputs in `samples`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference


def assert_refused(call, message, error=ValueError):
    """The call raises this error, with this message and no more."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def assert_same_bits(a, b):
    """Same tree, dtypes, shapes and bits."""
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def assert_agree(ours, theirs, *, summed=False):
    """Same tree, dtypes and shapes; to 1e-5 of the largest value, and to 16 bits' last place.

    That is each value's own last place, or the largest value's for `summed`: sums of rounded terms.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        last_place = float(jnp.finfo(b.dtype).eps) if b.dtype.itemsize == 2 else 0
        wide = np.complex128 if jnp.iscomplexobj(b) else np.float64
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        atol = (1e-5 + last_place * summed) * np.max(np.abs(b))
        np.testing.assert_allclose(a, b, rtol=last_place, atol=atol)


def largest_error(actual, expected):
    return np.max(np.abs(reference.wide(actual) - expected))


def assert_accurate(m, expected, tolerance=(1e-6, 2e-6)):
    """Mean + remainder within a part of the standard deviation, the variance of itself."""
    mean, var, count, remainder = map(reference.wide, m)
    error = np.abs(mean + remainder - expected.mean) / np.sqrt(expected.var)
    assert np.max(error) <= tolerance[0]
    assert np.max(np.abs(var / expected.var - 1)) <= tolerance[1]
    np.testing.assert_allclose(np.broadcast_to(count, var.shape), expected.count, rtol=1e-6)
