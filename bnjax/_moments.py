"""Moments: batch statistics as a value that merges exactly, also over replicas."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from bnjax._inputs import promote
from bnjax._rounding import abs2, near, real_dtype, two_sum

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
        var = m2 - abs2(m1)
        return jnp.where(var < 0, 0, var)  # `maximum` may hide a NaN on some backends

    @staticmethod
    def _unit(like: Array) -> ArrayLike:
        return 1


M = TypeVar("M", bound="Moments | CovMoments")


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
    share_a, share_b = (p.astype(a[1].dtype) for p in (share_a, share_b))  # a cov may be complex
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
