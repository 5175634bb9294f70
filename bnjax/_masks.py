"""What a mask or a weight does to values, sums and counts."""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import Shape, promote


def hide(d: Array, w: Array | None, fill: ArrayLike = 0) -> Array:
    """d, where masked-out values that are NaN or infinite are replaced: 0 * NaN is NaN."""
    if w is None:
        return d
    return jnp.where((w if w.dtype == bool else w > 0) | jnp.isfinite(d), d, fill)


def weigh(d: Array, w: Array | None) -> Array:
    """w d, where d is hidden already."""
    if w is None:
        return d
    return jnp.where(w, d, 0) if w.dtype == bool else w.astype(d.dtype) * d


def count(x: Array, w: Array | None, features: Shape, reduced: Shape, dtype: DTypeLike) -> Array:
    """The sum of the weights, as wide as the weights vary: a scalar if all features have one."""
    if w is None:
        return jnp.asarray(math.prod(x.shape[i] for i in reduced), dtype)
    whole = jnp.sum(w, reduced, dtype=dtype) * math.prod(
        x.shape[i] for i in reduced if w.shape[i] == 1
    )
    if whole.size == 1:
        return whole.reshape(())
    return jnp.broadcast_to(whole, tuple(x.shape[i] for i in features))


def weighted_sum(x: Array, w: Array | None, reduced: Shape) -> Array:
    """sum(w x), rounded like any sum: with the count, a pivot."""
    return jnp.sum(weigh(hide(x.astype(promote(x.dtype)), w), w), reduced)


def divisor(count: Array) -> Array:
    """The count, but safe to divide by."""
    return jnp.where(count > 0, count, 1)
