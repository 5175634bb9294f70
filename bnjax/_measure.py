"""Measure: the moments of a batch."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax._inputs import (
    Axes,
    Shape,
    as_array,
    check_features,
    promote,
    read_mask,
    split_axes,
)
from bnjax._moments import AxisName, Groups, Moments, _about, _pmerge, _saved
from bnjax._rounding import near, once, real_dtype


def moments(
    x: ArrayLike,
    *,
    feature_axis: Axes = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups = None,
    pivot: ArrayLike | None = None,
) -> Moments:
    """Measures each feature's mean, variance and count over all other axes.

    With weights w (1 without `where`), n = sum(w) and d = x - c for a constant pivot c:

      m1 = sum(w d) / n,  mean + remainder = c + m1,  var = sum(w |d|^2) / n - |m1|^2

    c cancels algebraically, so derivatives of every order are exact; near the mean it keeps
    the variance from cancelling in floating point (Chan, Golub and LeVeque, 1983).

    Args:
      x: any shape and numeric dtype; sums are accumulated in at least float32.
      feature_axis: the axis or axes that keep statistics of their own. `features` are their
        sizes, in the order of the axes of `x`.
      where: a mask (booleans or integers) or sample weights (floats >= 0) that broadcasts
        against `x`. Masked-out values may be NaN or infinite.
      axis_name: the mapped axis or axes to share statistics over, as in `jax.lax.psum`.
      axis_index_groups: groups of indices of that axis that share, as in `jax.lax.psum`.
      pivot: an estimate of the mean, `[*features]`, the same on all replicas. It saves one
        read of `x` and one collective, and is accurate within a few standard deviations of
        the mean. By default the batch mean.

    Returns:
      `Moments` in the promotion of `x.dtype` with float32 (var and count are real). A feature
      with count 0 has mean 0 (or the pivot) and variance 1.

    Raises:
      ValueError: for an empty batch, or an argument whose shape does not fit.
      NameError: for an `axis_name` that is not mapped.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 10.0], [3.0, 10.0], [jnp.nan, 40.0]])
      >>> m = bnjax.moments(x, where=jnp.array([[True], [True], [False]]))
      >>> print(m.mean, m.var, m.count)
      [ 2. 10.] [1. 0.] 2.0
    """
    x = as_array(x)
    features, reduced = split_axes(feature_axis, x.shape)
    weights = read_mask(where, x.shape, features)
    if not math.prod(x.shape[i] for i in reduced):
        raise ValueError(
            f"x has shape {x.shape}, so there is no value to measure. Leave empty batches out."
        )
    if pivot is not None:
        pivot = jnp.asarray(pivot, promote(x.dtype))
        check_features("pivot", pivot.shape, tuple(x.shape[i] for i in features))
    m = _measure(x, weights, pivot, features, reduced)
    if axis_name is None:
        return m
    return _pmerge(m, axis_name, axis_index_groups, pivot)


@functools.partial(jax.jit, static_argnames=("features", "reduced"))
def _measure(
    x: Array, w: Array | None, c: Array | None, features: Shape, reduced: Shape
) -> Moments:
    dtype = promote(x.dtype)
    count, n = _count(x.shape, w, features, reduced, real_dtype(dtype))
    if c is None:
        c = _mean(x.astype(dtype), w, n, reduced)
    c, other = _saved((once(near(c, 1)), near(c, 2)))
    at = functools.partial(lax.expand_dims, dimensions=reduced)
    s1, s2 = _saved(_sums(x, at(c), at(other), w, reduced))
    return _about(Moments, c, s1 / n.astype(dtype) + (other - c), s2 / n, count, n)


def _mean(x: Array, w: Array | None, n: Array, reduced: Shape) -> Array:
    return jnp.sum(_weigh(_finite(x, w), w), reduced) / n.astype(x.dtype)


def _count(
    shape: Shape, w: Array | None, features: Shape, reduced: Shape, dtype: DTypeLike
) -> tuple[Array, Array]:
    """The sum of the weights, as wide as the weights vary; and the same, safe to divide by."""
    if w is None:
        n = jnp.asarray(math.prod(shape[i] for i in reduced), dtype)
        return n, n
    count = jnp.sum(w, reduced, dtype=dtype) * math.prod(
        shape[i] for i in reduced if w.shape[i] == 1
    )
    if count.size == 1:
        count = count.reshape(())
    else:
        count = jnp.broadcast_to(count, tuple(shape[i] for i in features))
    return count, jnp.where(count > 0, count, 1)


def _finite(d: Array, w: Array | None, fill: ArrayLike = 0) -> Array:
    """d, where masked-out values that are NaN or infinite are replaced: 0 * NaN is NaN."""
    if w is None:
        return d
    return jnp.where((w if w.dtype == bool else w > 0) | jnp.isfinite(d), d, fill)


def _weigh(d: Array, w: Array | None) -> Array:
    if w is None:
        return d
    return jnp.where(w, d, 0) if w.dtype == bool else w.astype(d.dtype) * d


@functools.partial(jax.checkpoint, static_argnums=4)
def _sums(x: Array, c: Array, other: Array, w: Array | None, reduced: Shape) -> tuple[Array, Array]:
    """sum(w (x - other)) and sum(w |x - c|^2). Recomputed in the backward pass: x alone is kept.

    Two pivots, because XLA's CPU backend writes out a difference that two reductions share
    (tests/bench/NOTES.md); two differences are fused, each into its own reduction.
    """
    x = x.astype(c.dtype)
    d = _finite(x - c, w)
    s1 = jnp.sum(_weigh(_finite(x - other, w), w), reduced)
    return once(s1), once(jnp.sum(jnp.real(_weigh(d, w) * jnp.conj(d)), reduced))
