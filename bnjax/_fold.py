"""Fold a normalization into the arrays of the linear layer before it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from bnjax._arguments import Axes, is_static, promote, split_axes
from bnjax._moments import Moments
from bnjax._normalize import affine


def fold(
    kernel: ArrayLike,
    kernel_bias: ArrayLike | None,
    m: Moments,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: ArrayLike = 1e-5,
) -> tuple[Array, Array]:
    """For inference: the linear layer that does what it and the normalization after it did.

    With `mul, add = affine(m, scale, bias)`, since (x W + b) mul + add = x (W mul) + (b mul + add):

      kernel = kernel * mul along the feature axes,  bias = kernel_bias * mul + add

    Any layer whose outputs are sums of inputs times kernel entries will do: dense layers and
    convolutions of any padding, stride, dilation and number of groups. Don't fold what is still
    trained, or a layer whose output something else than the normalization uses.
    `bnjax.linen.fold` and `bnjax.nnx.fold` fold whole models, and check the result.

    Args:
      kernel: the layer's, any shape.
      kernel_bias: the layer's, `[*features]`, or None.
      m: the running statistics, `[*features]`.
      scale, bias: the normalization's, `[*features]`; None is 1 and 0.
      feature_axis: the kernel's axis of output features, or a tuple of them: the last for Flax's
        layers, but -2 for `ConvTranspose(transpose_kernel=True)`; 0 for PyTorch's `Linear` and
        `Conv`, but 1 for its `ConvTranspose`, and with g groups (0, 2), after a reshape of the
        kernel to `[g, in / g, out / g, ...]` and of the features to `[g, out / g]`.
      epsilon: the normalization's; positive.

    Returns:
      `(kernel, bias)`, the kernel in its dtype, the bias in that of `kernel_bias`, or without one
      in the kernel's (complex where the normalization is).

    Raises:
      ValueError: for an epsilon that is not positive, a shape that does not fit, and for
        statistics that no data have (NaN, inf, a negative variance), where they are concrete.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> kernel, x = jnp.array([[1.0, 2.0]]), jnp.array([[3.0]])
      >>> m = bnjax.Moments(mean=jnp.array([1.0, 2.0]), var=jnp.array([4.0, 1.0]))
      >>> print(bnjax.normalize(x @ kernel, m, epsilon=1e-12))
      [[1. 4.]]
      >>> kernel, bias = bnjax.fold(kernel, None, m, epsilon=1e-12)
      >>> print(kernel, bias, x @ kernel + bias[None])
      [[0.5 2. ]] [-0.5 -2. ] [[1. 4.]]
    """
    kernel = jnp.asarray(kernel)
    features, others = split_axes(feature_axis, kernel.shape, "kernel")
    sizes = tuple(kernel.shape[i] for i in features)
    given = {"kernel_bias": kernel_bias, "mean": m.mean, "var": m.var, "scale": scale, "bias": bias}
    for name, p in given.items():
        if p is not None and np.shape(p) != sizes:
            raise ValueError(
                f"{name} has shape {np.shape(p)}, but kernel has shape {kernel.shape} and "
                f"features of shape {sizes} on axis {feature_axis}. "
                "Give one value for each feature, or another feature_axis."
            )
    check_statistics(m, "m")
    mul, add = affine(m, scale, bias, epsilon=epsilon)
    dtype = promote(kernel.dtype, mul.dtype)
    folded = kernel.astype(dtype) * lax.expand_dims(mul.astype(dtype), others)
    if kernel_bias is None:
        return _as(kernel.dtype, folded), _as(kernel.dtype, add)
    own = jnp.asarray(kernel_bias)
    dtype = promote(own.dtype, mul.dtype)
    return _as(kernel.dtype, folded), _as(own.dtype, own.astype(dtype) * mul + add)


def check_statistics(m: Moments, owner: str) -> None:
    """Refuses a mean or variance that no data have, where their values are known."""
    for name, p, low in (("mean", m.mean, -np.inf), ("variance", m.var, 0)):
        if not is_static(p):
            continue
        values = np.asarray(p).ravel()
        wrong = values[~(np.isfinite(values) & (values.real >= low))]
        if wrong.size:
            raise ValueError(
                f"{owner} has the {name} {wrong[0]} in {wrong.size} of {values.size} features, "
                "which no data have. Load statistics from before, or measure them anew "
                "(bnjax.recalibrate)."
            )


def _as(dtype: Any, p: Array) -> Array:
    """p in this dtype, unless that would drop its imaginary part."""
    drops = jnp.iscomplexobj(p) and not jnp.issubdtype(dtype, jnp.complexfloating)
    return p if drops else p.astype(dtype)
