"""Apply covariances: whitening, by Cholesky factor and by Newton-Schulz iteration."""

import functools
import math
from typing import Literal

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
    check_epsilon,
    check_features,
    expand,
    is_whole,
    output_dtype,
    promote,
    read_affine,
    read_mask,
    split_axes,
)
from bnjax._covariance import CovMoments, grouped, ungrouped
from bnjax._xla import EXACT, saved


def whiten(
    x: ArrayLike,
    m: CovMoments,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: Axes = -1,
    where: ArrayLike | None = None,
    method: Literal["cholesky", "newton_schulz"] = "cholesky",
    iterations: int = 5,
    epsilon: ArrayLike = 1e-5,
    dtype: DTypeLike | None = None,
) -> Array:
    """Removes the linear relationships of the features in each group (Huang et al., 2018):

      y = W (x - mean) * scale + bias  with  W A W^H = I,  A = cov + epsilon I

    "cholesky": W is the inverse of the Cholesky factor of A, so each feature loses what the
    features before it in the group explain. Exact; with groups of one feature it is `normalize`.

    "newton_schulz": W approaches the inverse square root of A, which is symmetric: ZCA, of all
    whitening transforms the one that moves x least. With S = A / trace(A) it iterates

      Y = S, Z = I;  R = (3 I - Z Y) / 2,  Y <- Y R,  Z <- R Z;  W = Z / sqrt(trace(A))

    (Higham, 1997), in exact arithmetic the iteration of Huang et al. (2019), but that it stays
    at the limit where theirs leaves it again. While an eigenvalue s of S is small each step
    brings it up by 9/4; then the error 1 - s z^2 is squared. Few iterations whiten the large
    eigenvalues only, which keeps small batches from amplifying noise.

    Where a covariance is singular and rounding exceeds epsilon, what epsilon lacks is added to
    the variances, so that output and gradient are finite also where features outnumber samples.

    Don't use it by default: it costs a matrix product for each example, and a factorization.

    Args:
      x: any shape and numeric dtype; the arithmetic is in at least float32.
      m: from `cov_moments`, or remembered: `CovMoments(**batch_stats)`.
      scale, bias: `[*features]`, or of the rank of `x`, as in `normalize`.
      feature_axis: the axis or axes of the features.
      where: the mask that `cov_moments` had. A masked-out value that is NaN or infinite is
        taken for the mean, and reaches no gradient.
      method: "cholesky" or "newton_schulz".
      iterations: of Newton-Schulz; at least one.
      epsilon: added to the variances; positive.
      dtype: the dtype of y; by default that of `x` (float32 for integers). The cast comes last.

    Raises:
      ValueError: for an unknown method, iterations below 1, an epsilon that is not positive, or
        a shape that does not fit.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (100, 2)) @ jnp.array([[3.0, 2.0], [0.0, 1.0]])
      >>> y = bnjax.whiten(x, bnjax.cov_moments(x))
      >>> print(jnp.abs(bnjax.cov_moments(y).cov[0]).round(3))
      [[1. 0.]
       [0. 1.]]
    """
    x = as_array(x)
    features, reduced = split_axes(feature_axis, x.shape)
    if not isinstance(m, CovMoments):
        raise TypeError(
            f"m is of type {type(m).__name__}, but whitening needs covariances. "
            "Measure them with bnjax.cov_moments."
        )
    check_features("mean", np.shape(m.mean), tuple(x.shape[i] for i in features))
    groups, number = np.shape(m.cov), math.prod(np.shape(m.mean))
    if len(groups) != 3 or groups[1] != groups[2] or groups[0] * groups[1] != number:
        raise ValueError(
            f"cov has shape {groups}, but x has {number} features. "
            "Give one of shape [groups, size, size], where groups * size is their number."
        )
    check_epsilon(epsilon, promote(x.dtype, jnp.result_type(m.cov)))
    if method not in ("cholesky", "newton_schulz"):
        raise ValueError(f"method is {method!r}. Choose 'cholesky' or 'newton_schulz'.")
    if not is_whole(iterations) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}. Choose a whole number, at least 1.")
    if dtype is None:
        dtype = output_dtype(x, m.mean, scale, bias)
    scale = read_affine("scale", scale, x.shape, features)
    bias = read_affine("bias", bias, x.shape, features)
    weights = read_mask(where, x.shape, features)
    steps = int(iterations) if method == "newton_schulz" else 0
    factor = _factor(jnp.asarray(m.cov), epsilon, steps)
    m = m._replace(cov=factor)
    return _whitened(x, m, scale, bias, weights, features, reduced, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames="steps")
def _factor(cov: Array, epsilon: ArrayLike, steps: int) -> Array:
    """W, by `steps` of Newton-Schulz or, with 0, from the Cholesky factor."""
    dtype = promote(jnp.result_type(cov))
    unit = jnp.eye(cov.shape[-1], dtype=dtype)[None]
    a = cov.astype(dtype) + jnp.asarray(epsilon, dtype) * unit
    return saved(_newton_schulz(a, unit, steps, epsilon) if steps else _cholesky(a, unit))


def _cholesky(a: Array, unit: Array) -> Array:
    """The inverse of a's lower factor.

    A pivot that is no larger than rounding may leave it decides, as a constant, to raise the
    diagonal of its group by that much. Condition numbers to 1e3 are far from it.
    """
    variances = jnp.real(jnp.diagonal(a, axis1=1, axis2=2))
    tolerance = 8 * unit.shape[-1] * float(jnp.finfo(a.dtype).eps)
    trial = jnp.diagonal(jnp.linalg.cholesky(lax.stop_gradient(a)), axis1=1, axis2=2)
    fine = jnp.all(jnp.real(trial) ** 2 > tolerance * lax.stop_gradient(variances), 1)
    lift = jnp.where(fine[:, None], 0, tolerance) * variances
    lower = saved(jnp.linalg.cholesky(a + lift[..., None].astype(a.dtype) * unit))
    return lax.linalg.triangular_solve(
        lower, jnp.broadcast_to(unit, a.shape), left_side=True, lower=True
    )


def _newton_schulz(a: Array, unit: Array, steps: int, epsilon: ArrayLike) -> Array:
    """The inverse square root of a, nearly. What epsilon lacks to outweigh rounding is added."""
    multiply = functools.partial(jnp.matmul, precision=EXACT)
    trace = jnp.real(jnp.trace(a, axis1=1, axis2=2))[:, None, None]
    lacks = 2 * float(jnp.finfo(a.dtype).eps) - jnp.asarray(epsilon, trace.dtype) / trace
    s = a / trace.astype(a.dtype) + jnp.maximum(lacks, 0).astype(a.dtype) * unit

    def step(_: int, yz: tuple[Array, Array]) -> tuple[Array, Array]:
        y, z = yz
        r = 1.5 * unit - 0.5 * multiply(z, y)
        return multiply(y, r), multiply(r, z)

    first = 1.5 * unit - 0.5 * s
    _, z = lax.fori_loop(1, steps, step, (multiply(s, first), first))
    return z * lax.rsqrt(trace).astype(a.dtype)


@functools.partial(jax.jit, static_argnames=("features", "reduced", "dtype"))
@functools.partial(jax.checkpoint, static_argnums=(5, 6, 7))
def _whitened(
    x: Array,
    m: CovMoments,
    scale: Array | None,
    bias: Array | None,
    w: Array | None,
    features: Shape,
    reduced: Shape,
    dtype: DTypeLike,
) -> Array:
    """y, where m.cov is the factor W. Recomputed in the backward pass: x alone is kept."""
    dtypes = [p.dtype for p in (x, scale, bias) if p is not None]
    mean = jnp.asarray(m.mean, promote(jnp.result_type(m.mean), *dtypes))
    factor = m.cov.astype(mean.dtype)
    c = lax.stop_gradient(mean)
    m1 = (mean - c) + jnp.broadcast_to(m.remainder, mean.shape).astype(mean.dtype)

    def ranked(p: Array) -> Array:
        return expand(p.astype(mean.dtype), x.ndim, reduced)

    d = _masks.hide(x.astype(c.dtype) - ranked(c), w, ranked(m1))
    d = grouped(d, features, reduced, factor.shape[-1])
    z = jnp.einsum("g...j,gij->g...i", d, factor, precision=EXACT)
    y = ungrouped(z, features, reduced, x.shape)
    shift = jnp.einsum("gij,gj->gi", factor, m1.reshape(factor.shape[:2]), precision=EXACT)
    add = -ranked(shift.reshape(mean.shape))
    if scale is not None:
        y, add = y * ranked(scale), add * ranked(scale)
    if bias is not None:
        add = add + ranked(bias)
    return (y + add).astype(dtype)
