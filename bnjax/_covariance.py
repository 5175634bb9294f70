"""Measure units that move together: means and covariances as moments."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from bnjax._inputs import (
    Axes,
    Shape,
    as_array,
    check_features,
    promote,
    read_mask,
    split_axes,
)
from bnjax._measure import _count, _finite, _mean, _weigh
from bnjax._moments import AxisName, Groups, _about, _pmerge, _saved
from bnjax._rounding import near, real_dtype

EXACT = lax.Precision.HIGHEST  # accelerators round the factors of a product to 16 bits otherwise


class CovMoments(NamedTuple):
    """Mean, covariance and count of features in groups: `merge`, `pmerge` and `ema` take it.

    Attributes:
      mean: `[*features]`, at least float32.
      cov: `[groups, size, size]`, biased: the weighted mean of (x - mean) (x - mean)^H in each
        group. The features, in the order of the axes of `x`, are cut into groups of `size`.
      count: the sum of the examples' weights, a scalar. Zero is neutral in `merge` and `ema`.
      remainder: what the mean's dtype could not hold, `[*features]` or a scalar.
    """

    mean: Any
    cov: Any
    count: Any = 0.0
    remainder: Any = 0.0

    @property
    def var(self) -> Array:
        """The variances alone, `[*features]`: the covariance's diagonal."""
        diagonal = jnp.real(jnp.diagonal(jnp.asarray(self.cov), axis1=-2, axis2=-1))
        return diagonal.reshape(jnp.shape(self.mean))

    @staticmethod
    def _square(d: Array, like: Array) -> Array:
        d = d.reshape(like.shape[:-1])
        return d[..., :, None] * jnp.conj(d)[..., None, :]

    @staticmethod
    def _central(m2: Array, m1: Array) -> Array:
        """m2 - m1 m1^H, with what cancellation may take from the variances given back.

        It is nothing beside them but where the pivot is far away, and a constant to autodiff.
        """
        square = CovMoments._square(m1, m2)
        lost = 2 * m2.shape[-1] * float(jnp.finfo(m2.dtype).eps) * lax.stop_gradient(square)
        return m2 - square + lost * CovMoments._unit(m2)

    @staticmethod
    def _unit(like: Array) -> Array:
        return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def cov_moments(
    x: ArrayLike,
    *,
    feature_axis: Axes = -1,
    group_size: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups = None,
    pivot: ArrayLike | None = None,
) -> CovMoments:
    """Measures mean, covariance and count, as `moments` does with the variance.

    With weights w, n = sum(w) and d = x - c for a constant pivot c:

      m1 = sum(w d) / n,  mean + remainder = c + m1,  cov = sum(w d d^H) / n - m1 m1^H

    Args:
      x: any shape and numeric dtype; sums are accumulated in at least float32.
      feature_axis: the axis or axes of the features, as in `moments`.
      group_size: how many neighbouring features make a group; by default all of them. The
        covariance has `features * group_size` numbers, and costs as much for each example.
      where: a mask or sample weights as in `moments`, one for each example or position: a
        covariance needs all features of an example.
      axis_name, axis_index_groups, pivot: as in `moments`. A pivot that is far from the mean
        can leave a covariance that is not positive, which epsilon has to outweigh.

    Returns:
      `CovMoments` in the promotion of `x.dtype` with float32. With count 0 the mean is 0 (or
      the pivot) and the covariance the identity.

    Raises:
      ValueError: for an empty batch, a group size that does not divide the number of features,
        a mask that differs between features, or an argument whose shape does not fit.
      NameError: for an `axis_name` that is not mapped.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> m = bnjax.cov_moments(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      >>> print(m.mean, m.cov[0], m.count)
      [2. 4.] [[1. 2.]
       [2. 4.]] 2.0
    """
    x = as_array(x)
    features, reduced = split_axes(feature_axis, x.shape)
    weights = read_mask(where, x.shape, features)
    sizes = tuple(x.shape[i] for i in features)
    if not x.size:
        raise ValueError(
            f"x has shape {x.shape}, so there is no value to measure. Leave empty batches out."
        )
    if weights is not None and any(weights.shape[i] != 1 for i in features):
        raise ValueError(
            f"where (a layer's mask) has shape {weights.shape} and x has shape {x.shape}, but a "
            "covariance needs all features of an example. Give one value for each example."
        )
    if pivot is not None:
        pivot = jnp.asarray(pivot, promote(x.dtype))
        check_features("pivot", pivot.shape, sizes)
    size = check_group_size(group_size, math.prod(sizes))
    m = _measure(x, weights, pivot, features, reduced, size)
    if axis_name is None:
        return m
    return _pmerge(m, axis_name, axis_index_groups, pivot)


def check_group_size(group_size: int | None, features: int) -> int:
    """The size of a group, which divides the number of features."""
    size = features if group_size is None else group_size
    if size < 1 or features % size:
        raise ValueError(
            f"group_size is {group_size}, but there are {features} features. "
            f"Choose a divisor of {features}."
        )
    return size


def grouped(d: Array, features: Shape, reduced: Shape, size: int) -> Array:
    """d as `[groups, *reduced, size]`."""
    d = jnp.transpose(d, reduced + features)
    d = d.reshape(*d.shape[: len(reduced)], -1, size)
    return jnp.moveaxis(d, -2, 0)


def ungrouped(d: Array, features: Shape, reduced: Shape, shape: Shape) -> Array:
    """The reverse of `grouped`, for an x of this shape."""
    d = jnp.moveaxis(d, 0, -2)
    d = d.reshape([shape[i] for i in reduced + features])
    return jnp.transpose(d, sorted(range(len(shape)), key=(reduced + features).__getitem__))


@functools.partial(jax.jit, static_argnames=("features", "reduced", "size"))
def _measure(
    x: Array, w: Array | None, c: Array | None, features: Shape, reduced: Shape, size: int
) -> CovMoments:
    dtype = promote(x.dtype)
    count, n = _count(x.shape, w, features, reduced, real_dtype(dtype))
    if c is None:
        c = _mean(x.astype(dtype), w, n, reduced)
    c = _saved(near(c))
    s1, s2 = _saved(_sums(x, c, w, features, reduced, size))
    n = n.astype(dtype)
    return _about(CovMoments, c, s1 / n, s2 / n, count, n)


@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def _sums(
    x: Array, c: Array, w: Array | None, features: Shape, reduced: Shape, size: int
) -> tuple[Array, Array]:
    """sum(w (x - c)) and sum(w (x - c) (x - c)^H). Recomputed in the backward pass."""
    d = _finite(x.astype(c.dtype) - lax.expand_dims(c, reduced), w)
    weighted = _weigh(d, w)
    left, right = (grouped(a, features, reduced, size) for a in (weighted, jnp.conj(d)))
    return jnp.sum(weighted, reduced), _product(left, right)


def _product(a: Array, b: Array) -> Array:
    """sum of a b^T over all rows of `[groups, *rows, size]`, added up block by block.

    XLA's CPU backend multiplies small matrices row by row: over 65536 rows a covariance of two
    features with condition number 1e3 is off by 7e-3, in blocks by 4e-5. First a power of two
    of blocks, which a sharded batch divides into evenly; then parts of them, padded with zeros.
    """
    groups, *rows, size = a.shape
    sharding = jax.typeof(a).sharding
    if any(axis is not None for axis in sharding.spec):  # on an explicit mesh: no reshaping
        axes = tuple(range(1, a.ndim - 1))
        whole = NamedSharding(sharding.mesh, P(None, None, None))
        numbers = ((axes, axes), ((0,), (0,)))
        return lax.dot_general(a, b, numbers, precision=EXACT, out_sharding=whole)
    n, blocks, least = math.prod(rows), 1, max(32, 8 * size)
    while n % (2 * blocks) == 0 and n // (2 * blocks) >= least:
        blocks *= 2
    parts = max(n // blocks // least, 1)
    spare = -(n // blocks) % parts
    a, b = (p.reshape(groups, blocks, n // blocks, size) for p in (a, b))
    if spare:
        a, b = (jnp.pad(p, ((0, 0), (0, 0), (0, spare), (0, 0))) for p in (a, b))
    a, b = (p.reshape(groups, blocks * parts, -1, size) for p in (a, b))
    return jnp.sum(jnp.einsum("gbni,gbnj->gbij", a, b, precision=EXACT), 1)
