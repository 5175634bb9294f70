"""Measure: batch statistics as a value that merges exactly."""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
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
from bnjax._rounding import abs2, near, once, real_dtype, two_sum

if TYPE_CHECKING:
    from bnjax._covariance import CovMoments

AxisName = Hashable | tuple[Hashable, ...]
Groups = Sequence[Sequence[int]] | None
MOMENTS_NAME = "bnjax_moments"  # what policies of `jax.checkpoint` know the statistics by


class Moments(NamedTuple):
    """Mean, variance and count of each feature: under `merge`, a commutative monoid.

    Attributes:
      mean: `[*features]`, at least float32.
      var: `[*features]`, real, biased: the weighted mean of |x - mean|^2.
      count: the sum of the weights, `[*features]` or a scalar. Zero is neutral in
        `merge` and `ema`, and suits statistics that are only applied.
      remainder: what the mean's dtype could not hold, `[*features]` or a scalar: the
        true mean is `mean + remainder`. Zero for statistics from a checkpoint.
    """

    mean: Any
    var: Any
    count: Any = 0.0
    remainder: Any = 0.0

    # What `merge` and its kin need to know of a second moment; a covariance has its own.
    @staticmethod
    def _square(d: Array, like: Array) -> Array:
        return abs2(d)

    @staticmethod
    def _central(m2: Array, m1: Array) -> Array:
        return jnp.maximum(m2 - abs2(m1), 0)

    @staticmethod
    def _unit(like: Array) -> ArrayLike:
        return 1


M = TypeVar("M", bound="Moments | CovMoments")


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


def merge(a: M, b: M) -> M:
    """The moments of two batches together (Chan, Golub and LeVeque, 1983).

    With n = n_a + n_b and delta = mean_b - mean_a:

      mean = mean_a + delta n_b / n,  var = (n_a var_a + n_b var_b) / n + |delta|^2 n_a n_b / n^2

    Associative and commutative to rounding. An operand with count 0 changes nothing, whatever
    else it holds. Microbatches, shards and the batches of a data set all merge like this.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> a = bnjax.moments(jnp.array([[1.0]]))
      >>> b = bnjax.moments(jnp.array([[4.0], [5.0], [6.0]]))
      >>> m = bnjax.merge(a, b)
      >>> print(m.mean, m.var, m.count)
      [4.] [3.5] 4.0
    """
    dtype = promote(jnp.result_type(a.mean), jnp.result_type(b.mean))
    a, b = _cast(a, dtype), _cast(b, dtype)
    has_a, has_b, n = a.count > 0, b.count > 0, a.count + b.count
    share_a, share_b = a.count / jnp.where(n > 0, n, 1), b.count / jnp.where(n > 0, n, 1)
    delta = jnp.where(has_a & has_b, (b.mean - a.mean) + (b.remainder - a.remainder), 0)
    base = jnp.where(has_a, a.mean, jnp.where(has_b, b.mean, 0))
    rest = jnp.where(has_a, a.remainder, jnp.where(has_b, b.remainder, 0))
    mean, remainder = two_sum(base, rest + share_b.astype(dtype) * delta)
    within = share_a * jnp.where(has_a, a[1], 0) + share_b * jnp.where(has_b, b[1], 0)
    second = within + share_a * share_b * a._square(delta, a[1])
    return type(a)(mean, jnp.where(n > 0, second, a._unit(second)), n, remainder)


def pmerge(m: M, axis_name: AxisName, *, axis_index_groups: Groups = None) -> M:
    """`merge` over a mapped axis: every replica gets the moments of all, weighted by count.

    Takes two all-reduces: the replicas agree on a pivot, then add up their deviations from it.
    So it is as accurate as one device on the whole batch, and count 0 takes no part.

    Args:
      m: this replica's moments.
      axis_name: a mapped axis or a tuple of them, as in `jax.lax.psum`.
      axis_index_groups: as in `jax.lax.psum`, where JAX supports it.

    Raises:
      NameError: for an `axis_name` that is not mapped.
      NotImplementedError: for `axis_index_groups` where JAX has none.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [11.0]]])  # two replicas of two rows
      >>> f = lambda x: bnjax.pmerge(bnjax.moments(x), "batch")
      >>> m = jax.vmap(f, axis_name="batch")(x)
      >>> print(m.mean[0], m.mean[1], m.var[0], m.count[0])
      [5.] [5.] [14.] 4.0
    """
    return _pmerge(_cast(m, promote(jnp.result_type(m.mean))), axis_name, axis_index_groups, None)


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


def _about(kind: type[M], c: Array, m1: Array, m2: Array, count: Array, n: Array) -> M:
    """Moments from a pivot c and the weighted means of x - c and of its square."""
    mean, remainder = two_sum(c, m1)
    second = kind._central(m2, m1)
    if n is not count:
        second = jnp.where(count > 0, second, kind._unit(second))
    return kind(mean, second, count, remainder)


def merge_parts(m: M) -> M:
    """`merge` along the first axis, which may be sharded: `pmerge` with sums for collectives."""

    def at(p: Array, like: Array) -> Array:
        """p with the rank of the other: one count may be all features'."""
        return p.reshape(p.shape + (1,) * (like.ndim - p.ndim)).astype(like.dtype)

    n = at(m.count, m.mean)
    s, total = (jnp.sum(p, 0, keepdims=True) for p in lax.stop_gradient((n * m.mean, n)))
    pivot = near(s / jnp.where(total != 0, total, 1))
    delta = (m.mean - pivot) + at(m.remainder, m.mean)
    second = m[1] + m._square(delta, m[1])
    s1, s2 = jnp.sum(n * delta, 0), jnp.sum(at(m.count, second) * second, 0)
    count = jnp.sum(m.count, 0)
    n = jnp.where(count > 0, count, 1)
    return _about(
        type(m), pivot.squeeze(0), s1 / n.astype(s1.dtype), s2 / n.astype(s2.dtype), count, n
    )


def _pmerge(m: M, axis_name: AxisName, groups: Groups, pivot: Array | None) -> M:
    n = m.count.astype(m.mean.dtype)
    if pivot is None:
        s, total = _psum(lax.stop_gradient((n * m.mean, n)), axis_name, groups)
        pivot = near(s / jnp.where(total != 0, total, 1))
    delta = (m.mean - pivot) + m.remainder
    second = m[1] + m._square(delta, m[1])
    parts = n * delta, m.count.astype(second.dtype) * second, m.count
    s1, s2, count = _psum(parts, axis_name, groups)
    count = jnp.real(count)
    s2 = s2 if jnp.iscomplexobj(second) else jnp.real(s2)
    n = jnp.where(count > 0, count, 1)
    return _about(type(m), pivot, s1 / n.astype(s1.dtype), s2 / n.astype(s2.dtype), count, n)


def _psum(parts: tuple[Array, ...], axis_name: AxisName, groups: Groups) -> list[Array]:
    """One all-reduce for all the parts, in the dtype of the first."""
    flat = jnp.concatenate([p.astype(parts[0].dtype).reshape(-1) for p in parts])
    try:
        flat = _saved(lax.psum(flat, axis_name, axis_index_groups=groups))
    except NameError as error:
        raise NameError(
            f"axis_name is {axis_name!r}, but no such axis is mapped here ({error}). "
            "Call this under jax.pmap, jax.shard_map or jax.vmap with that axis name, or "
            "leave axis_name out: plain jit over sharded arrays needs none."
        ) from None
    except NotImplementedError as error:
        raise NotImplementedError(
            f"axis_index_groups is {groups}, and JAX has no groups under this transformation. "
            "Use jax.pmap or jax.shard_map(check_vma=False), or a mesh with one more axis."
        ) from error
    ends, out = 0, []
    for p in parts:
        out.append(flat[ends : ends + p.size].reshape(p.shape))
        ends += p.size
    return out


def _saved(tree: Any) -> Any:
    """The same, by the name that policies know: what a reduction or a collective gave."""
    return jax.tree.map(lambda a: checkpoint_name(a, MOMENTS_NAME), tree)


def _cast(m: M, dtype: DTypeLike) -> M:
    """Mean and remainder in `dtype`, var and count in its real counterpart, cov in `dtype`."""
    real = real_dtype(dtype)
    return type(m)(
        jnp.asarray(m.mean, dtype),
        jnp.asarray(m[1], real if isinstance(m, Moments) else dtype),
        jnp.asarray(m.count, real),
        jnp.asarray(m.remainder, dtype),
    )
