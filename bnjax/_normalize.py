"""Apply: normalize with given moments, and batch normalization as measure, then apply."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from bnjax import _masks
from bnjax._arguments import (
    Axes,
    Shape,
    as_array,
    check_epsilon,
    check_features,
    expand,
    output_dtype,
    promote,
    read_affine,
    read_mask,
    split_axes,
)
from bnjax._moments import Moments, moments
from bnjax._rounding import near, real_dtype
from bnjax._statistic import AxisName, Groups, check_statistic
from bnjax._xla import once, recomputed, rsqrt, value_once


def affine(
    m: Moments,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: ArrayLike = 1e-5,
) -> tuple[Array, Array]:
    """Normalization as one multiplication and one addition, y = x * mul + add:

      mul = scale / sqrt(var + epsilon),  add = bias - (mean + remainder) * mul

    Good for folding a normalization into the layer before it. Don't use it in place of
    `normalize` where |mean| is far above the standard deviation: x * mul + add cancels there.

    Args:
      m: the moments to normalize with.
      scale, bias: `[*features]`, or anything that broadcasts against them; None is 1 and 0.
      epsilon: added to the variance; positive.

    Returns:
      `(mul, add)` in the promotion of the moments, scale, bias and float32.

    Raises:
      ValueError: for an epsilon that is not positive.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> m = bnjax.Moments(mean=jnp.array([3.0]), var=jnp.array([4.0]))
      >>> mul, add = bnjax.affine(m, scale=jnp.array([10.0]), epsilon=1e-12)
      >>> print(mul, add)
      [5.] [-15.]
    """
    check_statistic("m", m)
    given = [p for p in (m.mean, scale, bias) if p is not None]
    dtype = promote(*(jnp.result_type(p) for p in given))
    check_epsilon(epsilon, dtype)
    real = real_dtype(dtype)
    mul = _factor(jnp.asarray(m.var, real), scale, epsilon, dtype)
    m1 = jnp.asarray(m.mean, dtype) + jnp.asarray(m.remainder, dtype)
    return mul, _offset(m1, mul, bias)


def _factor(var: Array, scale: ArrayLike | None, epsilon: ArrayLike, dtype: DTypeLike) -> Array:
    r = rsqrt(var + jnp.asarray(epsilon, var.dtype)).astype(dtype)
    return r if scale is None else r * jnp.asarray(scale, dtype)


def _offset(m1: Array, mul: Array, bias: ArrayLike | None) -> Array:
    add = -m1 * mul
    return add if bias is None else add + jnp.asarray(bias, mul.dtype)


def normalize(
    x: ArrayLike,
    m: Moments,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: Axes = -1,
    where: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-5,
    dtype: DTypeLike | None = None,
) -> Array:
    """Applies moments, in training the batch's and in inference those that were remembered.

      y = (x - mean) / sqrt(var + epsilon) * scale + bias

    In inference `normalize(x, Moments(**batch_stats), scale, bias)`. It is computed as

      d = x - c,  k = scale / sqrt(var + epsilon),  y = d k + (bias - m1 k)

    with c = stop_gradient(mean) and m1 = (mean - c) + remainder, exact at every mean / std.

    Args:
      x: any shape and numeric dtype; the arithmetic is in at least float32.
      m: moments of the shape of the features of `x`.
      scale, bias: `[*features]`, or of the rank of `x` and broadcasting against it (one for
        each example or position: conditional batch normalization). None is 1 and 0.
      feature_axis: the axis or axes of the features, as in `moments`.
      where: the mask or weights that `moments` had. Masked-out values are normalized as all
        others, but if NaN or infinite they yield the bias and reach no gradient.
      epsilon: added to the variance; positive.
      dtype: the dtype of y; by default that of `x` (float32 for integers; complex where m, scale
        or bias is). The cast comes last.

    Raises:
      TypeError: for m that is no statistic.
      ValueError: for an epsilon that is not positive, or a shape that does not fit.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> m = bnjax.Moments(mean=jnp.array([3.0]), var=jnp.array([4.0]))
      >>> print(bnjax.normalize(jnp.array([[3.0], [7.0]]), m, epsilon=1e-12))
      [[0.]
       [2.]]
    """
    check_statistic("m", m)
    x = as_array(x)
    features, reduced = split_axes(feature_axis, x.shape)
    sizes = tuple(x.shape[i] for i in features)
    check_features("mean", np.shape(m.mean), sizes)
    check_features("var", np.shape(m.var), sizes)
    check_epsilon(epsilon, promote(x.dtype, jnp.result_type(m.mean)))
    if dtype is None:
        dtype = output_dtype(x, m.mean, scale, bias)
    scale = read_affine("scale", scale, x.shape, features)
    bias = read_affine("bias", bias, x.shape, features)
    weights = read_mask(where, x.shape, features)
    return _normalized(x, m, scale, bias, weights, epsilon, reduced, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(6, 7))
def _normalized(
    x: Array,
    m: Moments,
    scale: Array | None,
    bias: Array | None,
    w: Array | None,
    epsilon: ArrayLike,
    reduced: Shape,
    dtype: DTypeLike,
) -> Array:
    kind = promote(jnp.result_type(m.mean), *(p.dtype for p in (x, scale, bias) if p is not None))
    mean, var = jnp.asarray(m.mean, kind), jnp.asarray(m.var, real_dtype(kind))
    rest = jnp.broadcast_to(m.remainder, mean.shape)
    ranked = functools.partial(expand, ndim=x.ndim, reduced=reduced)
    if any(p is not None and p.ndim > mean.ndim for p in (scale, bias)):
        mean, var, rest = map(ranked, (mean, var, rest))
        scale, bias = (None if p is None else ranked(p) for p in (scale, bias))
    c = near(mean)
    m1 = (mean - c) + rest
    mul = value_once(var, _factor(var, scale, epsilon, kind))
    add = value_once(var, _offset(m1, mul, bias))
    (c,) = once(var, c)
    c, m1, mul, add = map(ranked, (c, m1, mul, add))
    return (_scaled(x, c, mul, w, None if w is None else m1) + add).astype(dtype)


@recomputed
def _scaled(x: Array, c: Array, mul: Array, w: Array | None, shift: Array | None) -> Array:
    """(x - c) mul. A masked-out NaN is taken for the mean: its output is the bias, which asks
    nothing of x."""
    return _masks.hide(x.astype(c.dtype) - c, w, 0 if shift is None else shift) * mul


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: Axes = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups = None,
    pivot: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-5,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Moments]:
    """Batch normalization in training (Ioffe and Szegedy, 2015): measure, then apply.

      m = moments(x, ...);  y = normalize(x, m, scale, bias, ...)

    Gradients flow through the mean and the variance. The arguments and errors are those of
    `moments` and `normalize`; keep the moments with `ema` for use at inference.

    Returns:
      `(y, m)`: y in the dtype of `x` (or `dtype`), and the batch's `Moments`.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> y, m = bnjax.batch_norm(jnp.array([[1.0], [3.0]]), scale=jnp.array([0.5]))
      >>> print(y[:, 0].round(3), m.mean, m.count)
      [-0.5  0.5] [2.] 2.0
    """
    m = moments(
        x,
        feature_axis=feature_axis,
        where=where,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        pivot=pivot,
    )
    y = normalize(
        x, m, scale, bias, feature_axis=feature_axis, where=where, epsilon=epsilon, dtype=dtype
    )
    return y, m
