"""Batch renormalization: normalize with the batch, corrected towards the running statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import (
    Axes,
    Shape,
    as_array,
    check_epsilon,
    check_features,
    check_number,
    expand,
    is_static,
    promote,
    read_affine,
    split_axes,
)
from bnjax._moments import Moments, moments
from bnjax._normalize import normalize
from bnjax._statistic import AxisName, Groups, cast


def batch_renorm(
    x: ArrayLike,
    running: Moments,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    r_max: ArrayLike,
    d_max: ArrayLike,
    feature_axis: Axes = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups = None,
    pivot: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-5,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Moments]:
    """Batch renormalization in training (Ioffe, 2017), for batches that are small or not i.i.d.

    With the batch's mean_B, sigma_B = sqrt(var_B + epsilon), and mean, sigma of `running`:

      r = clip(sigma_B / sigma, 1 / r_max, r_max),  d = clip((mean_B - mean) / sigma, -d_max, d_max)
      y = ((x - mean_B) / sigma_B * r + d) * scale + bias

    r and d are constants to autodiff, so the gradient still passes through mean_B and sigma_B.
    Where no limit is reached, y is what inference gives, (x - mean) / sigma * scale + bias; with
    r_max = 1 and d_max = 0 it is `batch_norm`'s. Ioffe starts there and relaxes the limits to 3
    and 5 once the running statistics are near. Don't use it where batches are large: `batch_norm`
    is simpler and trains at least as well there.

    Keep the moments with `ema` after the call. It averages the variance, as for `batch_norm`, so
    that the two share their state; Ioffe's algorithm averages sigma.

    Args:
      x: any shape and numeric dtype.
      running: the statistics that inference would use now; constants to autodiff.
      scale, bias: as in `normalize`.
      r_max: a scalar >= 1; infinity sets no limit.
      d_max: a scalar >= 0; infinity sets no limit. For complex `x` it limits |d|.
      feature_axis, where, axis_name, axis_index_groups, pivot: as in `moments`.
      epsilon, dtype: as in `normalize`.

    Returns:
      `(y, m)`: y in the dtype of `x` (or `dtype`), and the batch's `Moments`.

    Raises:
      ValueError: for a limit out of range, and what `moments` and `normalize` refuse.
      NameError: for an `axis_name` that is not mapped.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> running = bnjax.Moments(mean=jnp.array([0.0]), var=jnp.array([4.0]))
      >>> x = jnp.array([[1.0], [3.0]])  # mean 2, standard deviation 1
      >>> y, m = bnjax.batch_renorm(x, running, r_max=3.0, d_max=5.0)
      >>> print(y[:, 0].round(2), m.mean)  # as at inference: x / 2
      [0.5 1.5] [2.]
      >>> y, m = bnjax.batch_renorm(x, running, r_max=1.0, d_max=0.0)
      >>> print(y[:, 0].round(2))  # as with batch_norm
      [-1.  1.]
    """
    m = moments(
        x,
        feature_axis=feature_axis,
        where=where,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        pivot=pivot,
    )
    y = renormalize(
        x,
        m,
        scale,
        bias,
        running=running,
        r_max=r_max,
        d_max=d_max,
        feature_axis=feature_axis,
        where=where,
        epsilon=epsilon,
        dtype=dtype,
    )
    return y, m


def renormalize(
    x: ArrayLike,
    m: Moments,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    running: Moments,
    r_max: ArrayLike,
    d_max: ArrayLike,
    feature_axis: Axes,
    where: ArrayLike | None,
    epsilon: ArrayLike,
    dtype: DTypeLike | None,
) -> Array:
    """`normalize` with the batch's moments, corrected towards the running ones."""
    x = as_array(x)
    features, reduced = split_axes(feature_axis, x.shape)
    sizes = tuple(x.shape[i] for i in features)
    scale = read_affine("scale", scale, x.shape, features)
    bias = read_affine("bias", bias, x.shape, features)
    check_epsilon(epsilon, promote(x.dtype, jnp.result_type(m.mean)))
    check_features("running.mean", np.shape(running.mean), sizes)
    check_features("running.var", np.shape(running.var), sizes)
    _check_limits(r_max, d_max)
    scale, bias = _corrected(m, running, scale, bias, r_max, d_max, epsilon, reduced)
    return normalize(
        x, m, scale, bias, feature_axis=feature_axis, where=where, epsilon=epsilon, dtype=dtype
    )


def _check_limits(r_max: ArrayLike, d_max: ArrayLike) -> None:
    """Refuses limits that leave no room for r = 1 and d = 0, where their values are known."""
    cure = "Choose a number from 1 (no correction) upwards, such as 3."
    check_number("r_max", r_max, cure)
    if is_static(r_max) and not np.asarray(r_max) >= 1:
        raise ValueError(
            f"r_max is {r_max}, but the correction r stays between 1 / r_max and r_max. {cure}"
        )
    cure = "Choose a number from 0 (no correction) upwards, such as 5."
    check_number("d_max", d_max, cure)
    if is_static(d_max) and not np.asarray(d_max) >= 0:
        raise ValueError(
            f"d_max is {d_max}, but the correction d stays between -d_max and d_max. {cure}"
        )


@functools.partial(jax.jit, static_argnames="reduced")
def _corrected(
    m: Moments,
    running: Moments,
    scale: Array | None,
    bias: Array | None,
    r_max: ArrayLike,
    d_max: ArrayLike,
    epsilon: ArrayLike,
    reduced: Shape,
) -> tuple[Array, Array]:
    """r * scale and d * scale + bias, of x's rank: with them `normalize` renormalizes."""
    given = [p.dtype for p in (scale, bias) if p is not None]
    dtype = promote(*map(jnp.result_type, (m.mean, running.mean)), *given)
    batch, old = lax.stop_gradient((cast(m, dtype), cast(running, dtype)))
    r_max, d_max = (jnp.asarray(limit, old.var.dtype) for limit in (r_max, d_max))
    r = jnp.clip(jnp.sqrt((batch.var + epsilon) / (old.var + epsilon)), 1 / r_max, r_max)
    # Means and remainders apart: their sums would round away what the remainders hold.
    d = (batch.mean - old.mean) + (batch.remainder - old.remainder)
    d = d * lax.rsqrt(old.var + epsilon).astype(dtype)
    d = lax.sign(d) * jnp.minimum(jnp.abs(d), d_max).astype(dtype)

    def ranked(p: Array) -> Array:
        return expand(p.astype(dtype), r.ndim + len(reduced), reduced)

    new_scale, new_bias = ranked(r), ranked(d)
    if scale is not None:
        new_scale, new_bias = new_scale * ranked(scale), new_bias * ranked(scale)
    if bias is not None:
        new_bias = new_bias + ranked(bias)
    return new_scale, new_bias
