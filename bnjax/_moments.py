"""Moments: mean, variance and count of a batch as a value, and how they are measured."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax import _masks
from bnjax._arguments import (
    Axes,
    Shape,
    as_array,
    check_features,
    check_not_empty,
    promote,
    read_mask,
    split_axes,
)
from bnjax._rounding import abs2, real_dtype
from bnjax._statistic import AxisName, Groups, explained, from_sums, static_groups, static_name
from bnjax._sums import Guess, Pivot, Program, sums
from bnjax._xla import saved


class Moments(NamedTuple):
    """Mean, variance and count of each feature: under `merge`, a commutative monoid.

    Attributes:
      mean: `[*features]`, at least float32.
      var: `[*features]`, real, biased: the weighted mean of |x - mean|^2.
      count: the sum of the weights, `[*features]` or a scalar. Zero is neutral in
        `merge` and `ema`, and suits statistics that are only applied. In float32 it is exact up
        to 2^24 times the largest power of two that divides the batches' sizes, then rounded, and
        stays at about 2^24 batches: from there on the mean is that of about the last 2^24, and
        the variance theirs to within a tenth.
      remainder: what the mean's dtype could not hold, `[*features]` or a scalar: the
        true mean is `mean + remainder`. Zero for statistics from a checkpoint.
    """

    mean: Any
    var: Any
    count: Any = 0.0
    remainder: Any = 0.0

    @classmethod
    def initial(cls, features: int | Sequence[int], dtype: DTypeLike = jnp.float32) -> Self:
        """Nothing seen: what is neutral in `merge`, and where `ema` and a scan over either start.

        Mean 0, variance 1, count 0 and remainder 0, all `[*features]`, so that a `lax.scan` may
        carry them whatever the masks are. On an explicit mesh with sharded features put them
        there first, with `jax.device_put`.

        Args:
          features: the number of features, or the shape of several feature axes.
          dtype: of the mean: that of the input, but at least float32.

        Example:
          >>> import bnjax, jax, jax.numpy as jnp
          >>> batches = jnp.arange(12.0).reshape(3, 4, 1)
          >>> def step(m, x):
          ...     return bnjax.merge(m, bnjax.moments(x)), None
          >>> m, _ = jax.lax.scan(step, bnjax.Moments.initial(1), batches)
          >>> print(m.mean, m.var.round(2), m.count)
          [5.5] [11.92] [12.]
        """
        zeros = jnp.zeros(features, promote(dtype))
        real = jnp.zeros(features, real_dtype(zeros.dtype))
        # No array twice, so that all can be donated.
        return cls(zeros, jnp.ones_like(real), real, jnp.zeros_like(zeros))

    @property
    def second(self) -> Any:
        """The variance."""
        return self.var

    @classmethod
    def make(
        cls, mean: Any, second: Any, count: ArrayLike = 0.0, remainder: ArrayLike = 0.0
    ) -> Self:
        """`Moments` by position."""
        return cls(mean, second, count, remainder)

    @staticmethod
    def second_name() -> str:
        """The variance's."""
        return "var"

    @staticmethod
    def second_dtype(dtype: DTypeLike) -> DTypeLike:
        """Real."""
        return real_dtype(dtype)

    @staticmethod
    def shift(delta: Array, like: Array) -> Array:
        """|delta|^2."""
        return abs2(delta)

    @staticmethod
    def central(m2: Array, m1: Array) -> Array:
        """m2 - |m1|^2, not below 0."""
        var = m2 - abs2(m1)
        return jnp.where(var < 0, 0, var)  # `maximum` may hide a NaN on some backends

    @staticmethod
    def unseen(like: Array) -> ArrayLike:
        """1."""
        return 1


Moments.__module__ = "bnjax"  # where users find it, and pickles, whatever moves


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

    Squares and their sums must not overflow: in float32 that holds for standard deviations up to
    1e19 / sqrt(n) and means up to 1e25 / sqrt(n); beyond, the variance is infinite or NaN.

    Args:
      x: any shape and numeric dtype; sums are accumulated in at least float32.
      feature_axis: the axis or axes that keep statistics of their own. `features` are their
        sizes, in the order of the axes of `x`.
      where: a mask (booleans or integers) or sample weights (floats >= 0) that broadcasts
        against `x`. Masked-out values may be NaN or infinite.
      axis_name: the mapped axis or axes to share statistics over, as in `jax.lax.psum`.
      axis_index_groups: groups of indices of that axis that share, as in `jax.lax.psum`.
      pivot: an estimate of the mean, `[*features]`, the same on all replicas. Near the mean
        it saves one read of `x` and one collective; where it turns out to be farther than 1.4
        standard deviations, all is measured again about the batch mean. That is the default,
        on a GPU for unmasked feature maps the mean over a sixteenth of the positions.

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
    guess = None if pivot is None else Guess(pivot)
    return moments_near(
        x,
        guess,
        feature_axis=feature_axis,
        where=where,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )


def moments_near(
    x: ArrayLike,
    guess: Guess | None,
    *,
    feature_axis: Axes,
    where: ArrayLike | None,
    axis_name: AxisName | None,
    axis_index_groups: Groups,
) -> Moments:
    """`moments`, where one may have a guess at the mean."""
    x = as_array(x)
    features, reduced = split_axes(feature_axis, x.shape)
    weights = read_mask(where, x.shape, features)
    check_not_empty(x.shape, math.prod(x.shape[i] for i in reduced))
    pivot: Pivot = "batch"
    c, slack = None, jnp.zeros(())
    if guess is not None:
        pivot = guess.pivot
        # A larger epsilon would let the variance's own digits go.
        slack = jnp.minimum(jnp.asarray(guess.slack), 1e-5)
        c = guess.mean if jnp.iscomplexobj(x) else jnp.real(guess.mean)
        c = jnp.asarray(c, promote(x.dtype))
        check_features(guess.name, c.shape, tuple(x.shape[i] for i in features))
    axis_name, groups = static_name(axis_name), static_groups(axis_index_groups)
    with explained(axis_name, axis_index_groups):
        return _moments_of(
            Program(reduced, pivot, axis_name, groups), x, c, slack, weights, features
        )


@functools.partial(jax.jit, static_argnames=("program", "features"))
def _moments_of(
    program: Program,
    x: Array,
    c: Array | None,
    slack: Array,
    w: Array | None,
    features: Shape,
) -> Moments:
    real = real_dtype(promote(x.dtype))
    c, slack = lax.stop_gradient((c, slack.astype(real) + jnp.finfo(real).tiny))
    count = _masks.count(x, w, features, program.reduced, real)
    c, s1, s2, count = saved(sums(program, x, c, w, count, slack))
    return from_sums(Moments, c, s1, s2, count)
