"""What a statistic is, and what works on every one: merging, also over replicas."""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import promote
from bnjax._masks import divisor
from bnjax._rounding import moved, near, real_dtype, total
from bnjax._xla import saved

AxisName = Hashable | tuple[Hashable, ...]
Groups = Sequence[Sequence[int]] | None


class Statistic(Protocol):
    """Mean, second moment and count of features, a pytree that merges exactly.

    The second moment is of the deviations from the mean, weighted by the count: a variance, a
    covariance, a variance that features share. What the sums of two batches do not determine,
    such as a median or a trimmed mean, cannot be a statistic.
    """

    @property
    def mean(self) -> Any:
        """`[*features]`, at least float32."""

    @property
    def count(self) -> Any:
        """The sum of the weights, a scalar or as wide as the weights may vary."""

    @property
    def remainder(self) -> Any:
        """What the mean's dtype could not hold: the true mean is mean + remainder."""

    @property
    def second(self) -> Any:
        """The second moment, divided by count."""

    @property
    def var(self) -> Any:
        """The variance of each feature, `[*features]`, real."""

    @classmethod
    def make(
        cls, mean: Any, second: Any, count: ArrayLike = 0.0, remainder: ArrayLike = 0.0
    ) -> Self:
        """One of these, whatever its second moment is called."""

    @staticmethod
    def second_name() -> str:
        """What the second moment is called, as a field and as a leaf of `batch_stats`."""

    @staticmethod
    def second_dtype(dtype: DTypeLike) -> DTypeLike:
        """The second moment's dtype where the mean has this one."""

    @staticmethod
    def shift(delta: Array, like: Array) -> Array:
        """What a shift of the mean by delta adds to a second moment of the shape of `like`."""

    @staticmethod
    def central(m2: Array, m1: Array) -> Array:
        """The second moment about the mean from that about a pivot, where m1 is mean - pivot."""

    @staticmethod
    def unseen(like: Array) -> ArrayLike:
        """The second moment of nothing, which broadcasts to the shape of `like`."""


M = TypeVar("M", bound=Statistic)


def check_statistic(name: str, m: Any) -> None:
    """Refuses what is no statistic."""
    if not (isinstance(m, tuple) and hasattr(m, "second_name")):
        raise TypeError(
            f"{name} is of type {type(m).__name__}, but bnjax.Moments or another statistic is "
            "needed. Measure it with bnjax.moments, or write bnjax.Moments(mean, var)."
        )


def check_kinds(names: tuple[str, str], a: Any, b: Any) -> None:
    """Refuses what is no statistic, and two of different kinds."""
    for name, m in zip(names, (a, b), strict=True):
        check_statistic(name, m)
    if type(a) is not type(b):
        raise TypeError(
            f"{names[0]} is a {type(a).__name__}, but {names[1]} is a {type(b).__name__}. "
            "Measure both with the same function."
        )


def check_alike(names: tuple[str, str], a: Statistic, b: Statistic) -> None:
    """Refuses statistics of two kinds, or of other features."""
    check_kinds(names, a, b)
    for field in ("mean", a.second_name()):
        sizes = np.shape(getattr(a, field)), np.shape(getattr(b, field))
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{names[0]}.{field} has shape {sizes[0]}, but {names[1]}.{field} has shape "
                f"{sizes[1]}. Take both from the same features."
            )


def static_groups(groups: Groups) -> Groups:
    """The groups as a part of a program's key."""
    return None if groups is None else tuple(tuple(map(int, group)) for group in groups)


def static_name(axis_name: AxisName | None) -> AxisName | None:
    """The name, or the names as a part of a program's key."""
    return tuple(axis_name) if isinstance(axis_name, list) else axis_name


def merge(a: M, b: M) -> M:
    """The moments of two batches together (Chan, Golub and LeVeque, 1983).

    With n = n_a + n_b and delta = mean_b - mean_a:

      mean = mean_a + delta n_b / n,  var = (n_a var_a + n_b var_b) / n + |delta|^2 n_a n_b / n^2

    computed as a step from the operand with the larger count, so that a long chain of merges
    adds up no rounding. Associative and commutative to rounding. An operand with count 0 changes
    nothing, whatever else it holds, so `m._replace(count=jnp.where(finite, m.count, 0))` leaves
    a bad batch out. Microbatches, shards and the batches of a data set all merge like this; a
    scan over them starts from `Moments.initial`.

    Raises:
      TypeError: for what is no statistic, and for two of different kinds.
      ValueError: for statistics of other features.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> a = bnjax.moments(jnp.array([[1.0]]))
      >>> b = bnjax.moments(jnp.array([[4.0], [5.0], [6.0]]))
      >>> m = bnjax.merge(a, b)
      >>> print(m.mean, m.var, m.count)
      [4.] [3.5] 4.0
    """
    check_alike(("a", "b"), a, b)
    return _merged(a, b)


@jax.jit
def _merged(a: M, b: M) -> M:
    dtype = promote(jnp.result_type(a.mean), jnp.result_type(b.mean))
    a, b = cast(a, dtype), cast(b, dtype)
    n, swap = a.count + b.count, b.count > a.count
    large = jax.tree.map(lambda p, q: jnp.where(swap, q, p), a, b)
    small = jax.tree.map(lambda p, q: jnp.where(swap, p, q), a, b)
    any_large, any_small = large.count > 0, small.count > 0
    share = small.count / jnp.where(any_large, n, 1)
    gap = (small.mean - large.mean) + (small.remainder - large.remainder)
    delta, base = jnp.where(any_small, gap, 0), jnp.where(any_large, large.mean, 0)
    rest = jnp.where(any_large, large.remainder, 0)
    mean, remainder = moved(base, rest, share.astype(dtype) * delta)
    share = share.astype(a.second.dtype)
    change = jnp.where(any_small, small.second - large.second, 0)
    second = large.second + share * (change + (1 - share) * a.shift(delta, change))
    return a.make(mean, jnp.where(any_large, second, a.unseen(second)), n, remainder)


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
    check_statistic("m", m)
    axis_name = static_name(axis_name)
    m = cast(m, promote(jnp.result_type(m.mean)))
    n, seen = m.count.astype(m.mean.dtype), m.count > 0
    s = jnp.where(seen, n * m.mean, 0)
    with explained(axis_name, axis_index_groups):
        s, n_all = saved(psum(lax.stop_gradient((s, n)), axis_name, axis_index_groups))
    pivot = near(s / jnp.where(n_all != 0, n_all, 1))
    delta = jnp.where(seen, (m.mean - pivot) + m.remainder, 0)
    second = jnp.where(seen, m.second, 0) + m.shift(delta, m.second)
    parts = n * delta, m.count.astype(second.dtype) * second, m.count
    s1, s2, count = saved(psum(parts, axis_name, axis_index_groups))
    return from_sums(type(m), pivot, s1, s2, count)


@jax.jit
def merge_parts(m: M) -> M:
    """`merge` along the first axis, which may be sharded: `pmerge` with sums for collectives."""

    def ranked(p: Array, like: Array) -> Array:
        """p with the rank of the other: one count may be all features'."""
        return p.reshape(p.shape + (1,) * (like.ndim - p.ndim)).astype(like.dtype)

    n, n2 = ranked(m.count, m.mean), ranked(m.count, m.second)
    s = jnp.where(n != 0, n * m.mean, 0)
    s, n_all = (jnp.sum(p, 0, keepdims=True) for p in lax.stop_gradient((s, n)))
    pivot = near(s / jnp.where(n_all != 0, n_all, 1))
    delta = jnp.where(n != 0, (m.mean - pivot) + ranked(m.remainder, m.mean), 0)
    second = jnp.where(n2 != 0, m.second, 0) + m.shift(delta, m.second)
    s1, s2 = jnp.sum(n * delta, 0), jnp.sum(n2 * second, 0)
    return from_sums(type(m), pivot.squeeze(0), s1, s2, jnp.sum(m.count, 0))


def from_sums(kind: type[M], c: Array, s1: Array, s2: Array, count: Array) -> M:
    """Moments from a pivot c and the weighted sums of x - c and of its square."""
    n = divisor(count)
    m1, m2 = s1 / n.astype(s1.dtype), s2 / n.astype(s2.dtype)
    mean, remainder = total(c, m1)
    second = kind.central(m2, m1)
    return kind.make(mean, jnp.where(count > 0, second, kind.unseen(second)), count, remainder)


def cast(m: M, dtype: DTypeLike) -> M:
    """Mean and remainder in `dtype`, the second moment in its counterpart, a real count."""
    return m.make(
        jnp.asarray(m.mean, dtype),
        jnp.asarray(m.second, m.second_dtype(dtype)),
        jnp.asarray(m.count, real_dtype(dtype)),
        jnp.asarray(m.remainder, dtype),
    )


@contextlib.contextmanager
def explained(axis_name: AxisName | None, groups: Groups) -> Iterator[None]:
    """Says in words what JAX cannot share. In a staged program that comes when it is called."""
    try:
        if axis_name is not None:
            lax.psum(1, axis_name)
        yield
    except NameError as error:
        raise NameError(
            f"axis_name is {axis_name!r}, but no such axis is mapped here ({error}). "
            "Call this under jax.pmap, jax.shard_map or jax.vmap with that axis name, or "
            "leave axis_name out: plain jit over sharded arrays needs none."
        ) from None
    except NotImplementedError as error:
        if groups is None:
            raise
        raise NotImplementedError(
            f"axis_index_groups is {groups}, and JAX has no groups under this transformation. "
            "Use jax.pmap or jax.shard_map(check_vma=False), or a mesh with one more axis."
        ) from error


def psum(parts: tuple[Array, ...], axis_name: AxisName, groups: Groups) -> tuple[Array, ...]:
    """One all-reduce for all the parts, in the dtype of the first; each returns in its own."""
    flat = jnp.concatenate([p.astype(parts[0].dtype).reshape(-1) for p in parts])
    flat = lax.psum(flat, axis_name, axis_index_groups=groups)
    ends, shared = 0, []
    for p in parts:
        own = flat[ends : ends + p.size].reshape(p.shape)
        shared.append((own if jnp.iscomplexobj(p) else jnp.real(own)).astype(p.dtype))
        ends += p.size
    return tuple(shared)
