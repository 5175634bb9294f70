"""What a mask or a weight does to values, sums and counts."""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import Shape


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


def count(
    shape: Shape, w: Array | None, features: Shape, reduced: Shape, dtype: DTypeLike
) -> tuple[Array, Array]:
    """The sum of the weights, as wide as the weights vary; and the same, safe to divide by."""
    if w is None:
        n = jnp.asarray(math.prod(shape[i] for i in reduced), dtype)
        return n, n
    total = jnp.sum(w, reduced, dtype=dtype) * math.prod(
        shape[i] for i in reduced if w.shape[i] == 1
    )
    if total.size == 1:
        total = total.reshape(())
    else:
        total = jnp.broadcast_to(total, tuple(shape[i] for i in features))
    return total, jnp.where(total > 0, total, 1)


def mean(x: Array, w: Array | None, n: Array, reduced: Shape) -> Array:
    """sum(w x) / n, rounded like any sum: where a pivot is enough."""
    return jnp.sum(weigh(hide(x, w), w), reduced) / n.astype(x.dtype)
