"""Measure units that move together: means and covariances as moments."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax import _masks
from bnjax._arguments import (
    Axes,
    Shape,
    as_array,
    check_features,
    check_not_empty,
    is_whole,
    promote,
    read_mask,
    split_axes,
)
from bnjax._rounding import near, real_dtype
from bnjax._statistic import AxisName, Groups, explained, from_sums, static_groups, static_name
from bnjax._sums import Program
from bnjax._xla import blocked_product, saved


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

    @classmethod
    def initial(
        cls,
        features: int | Sequence[int],
        dtype: DTypeLike = jnp.float32,
        group_size: int | None = None,
    ) -> Self:
        """Nothing seen, as `Moments.initial`: the covariance is the identity in each group.

        Args:
          features: the number of features, or the shape of several feature axes.
          dtype: of the mean: that of the input, but at least float32.
          group_size: as in `cov_moments`.

        Example:
          >>> import bnjax
          >>> m = bnjax.CovMoments.initial(4, group_size=2)
          >>> print(m.mean, m.cov.shape, m.count)
          [0. 0. 0. 0.] (2, 2, 2) 0.0
        """
        mean = jnp.zeros(features, promote(dtype))
        size = check_group_size(group_size, mean.size)
        cov = jnp.tile(jnp.eye(size, dtype=mean.dtype), (mean.size // size, 1, 1))
        return cls(mean, cov, jnp.zeros((), real_dtype(mean.dtype)), jnp.zeros_like(mean))

    @property
    def second(self) -> Any:
        """The covariance."""
        return self.cov

    @property
    def var(self) -> Array:
        """The variances alone, `[*features]`: the covariance's diagonal."""
        diagonal = jnp.real(jnp.diagonal(jnp.asarray(self.cov), axis1=-2, axis2=-1))
        return diagonal.reshape(np.shape(self.mean))

    @classmethod
    def make(
        cls, mean: Any, second: Any, count: ArrayLike = 0.0, remainder: ArrayLike = 0.0
    ) -> Self:
        """`CovMoments` by position."""
        return cls(mean, second, count, remainder)

    @staticmethod
    def second_name() -> str:
        """The covariance's."""
        return "cov"

    @staticmethod
    def second_dtype(dtype: DTypeLike) -> DTypeLike:
        """The mean's: a covariance may be complex."""
        return dtype

    @staticmethod
    def shift(delta: Array, like: Array) -> Array:
        """delta delta^H in each group."""
        delta = delta.reshape(like.shape[:-1])
        return delta[..., :, None] * jnp.conj(delta)[..., None, :]

    @staticmethod
    def central(m2: Array, m1: Array) -> Array:
        """m2 - m1 m1^H, with what cancellation may take from the variances given back.

        It is nothing beside them but where the pivot is far away, and a constant to autodiff.
        """
        square = CovMoments.shift(m1, m2)
        lost = 2 * m2.shape[-1] * float(jnp.finfo(m2.dtype).eps) * lax.stop_gradient(square)
        return m2 - square + lost * CovMoments.unseen(m2)

    @staticmethod
    def unseen(like: Array) -> Array:
        """The identity in each group."""
        return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


CovMoments.__module__ = "bnjax"


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
      axis_name, axis_index_groups: as in `moments`.
      pivot: as in `moments`. One that is far from the mean can leave a covariance that is not
        positive, which epsilon has to outweigh.

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
    check_not_empty(x.shape, x.size)
    if weights is not None and any(weights.shape[i] != 1 for i in features):
        raise ValueError(
            f"where (a layer's mask) has shape {weights.shape} and x has shape {x.shape}, but a "
            "covariance needs all features of an example. Give one value for each example."
        )
    if pivot is not None:
        pivot = jnp.asarray(pivot, promote(x.dtype))
        check_features("pivot", pivot.shape, sizes)
    size = check_group_size(group_size, math.prod(sizes))
    axis_name, groups = static_name(axis_name), static_groups(axis_index_groups)
    program = Program(reduced, axis_name=axis_name, groups=groups)
    with explained(axis_name, axis_index_groups):
        return _cov_moments_of(program, x, weights, pivot, features, size)


def check_group_size(group_size: int | None, features: int) -> int:
    """The size of a group, which divides the number of features."""
    size = features if group_size is None else group_size
    if not is_whole(size) or size < 1 or features % size:
        raise ValueError(
            f"group_size is {group_size!r}, but there are {features} features. "
            f"Choose a divisor of {features}."
        )
    return int(size)


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


@functools.partial(jax.jit, static_argnames=("program", "features", "size"))
def _cov_moments_of(
    program: Program, x: Array, w: Array | None, c: Array | None, features: Shape, size: int
) -> CovMoments:
    reduced = program.reduced
    count = _masks.count(x, w, features, reduced, real_dtype(promote(x.dtype)))
    if c is None:
        s, n = program.shared(_masks.weighted_sum(x, w, reduced), count)
        c = s / _masks.divisor(n).astype(s.dtype)
    c = saved(near(c))
    parts = *saved(_sums(x, c, w, features, reduced, size)), count
    return from_sums(CovMoments, c, *saved(program.shared(*parts)))


@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def _sums(
    x: Array, c: Array, w: Array | None, features: Shape, reduced: Shape, size: int
) -> tuple[Array, Array]:
    """sum(w (x - c)) and sum(w (x - c) (x - c)^H). Recomputed in the backward pass."""
    d = _masks.hide(x.astype(c.dtype) - lax.expand_dims(c, reduced), w)
    weighted = _masks.weigh(d, w)
    left, right = (grouped(a, features, reduced, size) for a in (weighted, jnp.conj(d)))
    return jnp.sum(weighted, reduced), blocked_product(left, right)
