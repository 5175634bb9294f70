"""Remember: running averages of batch statistics."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.dtypes import canonicalize_dtype
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import check_features, check_momentum, is_static, promote, read_ddof
from bnjax._rounding import moved, real_dtype
from bnjax._statistic import M, Statistic, cast, check_kinds

Momentum = ArrayLike | Callable[[ArrayLike], ArrayLike] | None
Stats = dict[str, Array]  # of one layer: mean, var or cov, and steps where updates are counted


def ema(
    running: M,
    batch: M,
    *,
    momentum: Momentum,
    steps: ArrayLike | None = None,
    debias: bool = False,
    ddof: int = 0,
) -> M:
    """Remembers: an exponential moving average of the mean and of the variance.

      mean = momentum * running.mean + (1 - momentum) * batch.mean, and so for var

    The count becomes the number of values seen so far; features that `batch` has no value of
    stay as they were. Every field keeps the shape, the dtype and (on an explicit mesh) the
    sharding that it has in `running`, so `lax.scan` can carry the result. A remainder as long
    as the mean is kept up to date; a scalar one stays zero. A scalar count takes the largest of
    the batch's counts.

    Args:
      running: the statistics so far, to start with `Moments.initial`, or
        `Moments(zeros, ones)` as a layer does.
      batch: from `moments`, `merge` or `pmerge`.
      momentum: the share that is kept, a scalar in [0, 1] (PyTorch's momentum is 1 minus it);
        or a schedule, a function of `steps` as in optax; or None for the plain average over
        the steps, where every batch counts alike (PyTorch's `momentum=None`).
      steps: the number of updates before this one, which None, a schedule and `debias` need.
      debias: whether to divide by the total of the weights, as Adam does (Kingma and Ba, 2015):
        (1 - momentum) / (1 - momentum^(steps + 1)) takes the place of 1 - momentum. So the
        first step gives the batch's statistics and no step remembers the zeros and ones.
        `steps` is one number for all features: one that a mask leaves out of early steps
        keeps some of its start, here and with momentum=None.
      ddof: 1 remembers the unbiased variance, var * count / (count - 1), as PyTorch does;
        features whose count is not above `ddof` keep their variance.

    Raises:
      TypeError: for what is no statistic, and for two of different kinds.
      ValueError: for a momentum outside [0, 1], missing steps, a `debias` with a schedule, for
        shapes that differ, and for complex statistics where the running mean is real.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> running = bnjax.Moments(jnp.zeros(1), jnp.ones(1))
      >>> batch = bnjax.moments(jnp.array([[2.0], [6.0]]))
      >>> running = bnjax.ema(running, batch, momentum=0.75)
      >>> print(running.mean, running.var, running.count)
      [1.] [1.75] 2.0
    """
    ddof = read_ddof(ddof)
    check_kinds(("running", "batch"), running, batch)
    fields = running.mean, running.second, running.count, running.remainder
    kept = running.make(*map(jnp.asarray, fields))
    features, second = np.shape(batch.mean), np.shape(batch.second)
    check_features("running.mean", kept.mean.shape, features)
    name = f"running.{kept.second_name()}"
    if second == features:
        check_features(name, kept.second.shape, features)
    elif kept.second.shape != second:
        raise ValueError(
            f"{name} has shape {kept.second.shape}, but the batch's has shape "
            f"{second}. Measure both with the same group_size."
        )
    if jnp.iscomplexobj(batch.mean) and not jnp.iscomplexobj(kept.mean):
        raise ValueError(
            f"running.mean is {kept.mean.dtype}, which cannot hold a mean of complex input. "
            "Initialize the running statistics with complex input."
        )
    dtype = promote(kept.mean.dtype, jnp.result_type(batch.mean))
    share = _share(momentum, steps, debias, real_dtype(dtype))
    return _step(kept, batch, share, ddof=ddof)


def remember(
    stats: Stats, m: Statistic, *, momentum: Momentum, debias: bool = False, ddof: int = 0
) -> Stats:
    """`ema` for one layer's variables: the new mean and second moment, and one step more."""
    steps = as_steps(stats["steps"]) if "steps" in stats else None
    running = m.make(stats["mean"], stats[m.second_name()])
    new = ema(running, m, momentum=momentum, steps=steps, debias=debias, ddof=ddof)
    updated = {"mean": new.mean, m.second_name(): new.second}
    if steps is not None:
        counted = steps + jnp.any(m.count > 0).astype(steps.dtype)
        updated["steps"] = jnp.maximum(steps, counted)  # stays at the largest integer
    return updated


def as_steps(given: ArrayLike) -> Array:
    """A number of updates as an array of its dtype: files and other libraries give numbers, too.

    An integer beyond what the dtype holds is the largest that it does.
    """
    if isinstance(given, Array):
        return given
    dtype = canonicalize_dtype(np.int32 if isinstance(given, int) else np.asarray(given).dtype)
    if np.issubdtype(dtype, np.integer):
        given = np.minimum(given, np.iinfo(dtype).max)
    return jnp.asarray(given, dtype)


def _share(
    momentum: Momentum, steps: ArrayLike | None, debias: bool, dtype: DTypeLike
) -> ArrayLike:
    """How far this step goes towards the batch.

    With debias (1 - m) / (1 - m^t) at step t; from m = 1/2 on by way of log m, as powers lose
    digits near 1. The plain average, 1 / t, is its limit for m towards 1.
    """
    if debias and callable(momentum):
        raise ValueError(
            "debias is True and momentum is a schedule, but debiasing needs one momentum for "
            "all steps. Leave one of the two out."
        )
    if (debias or momentum is None or callable(momentum)) and steps is None:
        raise ValueError(
            "steps is None, but momentum=None, a schedule and debias=True depend on the number "
            "of updates so far. Pass it as steps, or give the running statistics that leaf."
        )
    if callable(momentum):
        momentum = momentum(jnp.asarray(steps))
    if momentum is not None:
        check_momentum(momentum)
        if not debias:
            return 1 - momentum
    t = jnp.asarray(steps, dtype) + 1
    if momentum is None:
        return 1 / t
    m = jnp.asarray(momentum, dtype)
    low, high = jnp.where(m < 0.5, m, 0), jnp.where(m < 0.5, 0.5, m)
    if is_static(momentum):  # in double precision
        log = jnp.asarray(np.log(np.maximum(np.asarray(momentum, np.float64), 0.5)), dtype)
    else:
        log = jnp.log(high)
    plain = (log == 0) | (t == 1)
    log = jnp.where(log == 0, -1, log)
    later = jnp.where(t == 1, 2, t)  # 0^0 has no second derivative
    by_powers, by_log = (1 - low) / (1 - low**later), jnp.expm1(log) / jnp.expm1(t * log)
    return jnp.where(plain, 1 / t, jnp.where(m < 0.5, by_powers, by_log))


@functools.partial(jax.jit, static_argnames="ddof")
def _step(kept: M, batch: M, share: ArrayLike, *, ddof: int) -> M:
    """old + share (new - old), with the rounding errors of all steps in the mean's remainder.

    Where nothing was seen everything stays.
    """
    dtype = promote(kept.mean.dtype, jnp.result_type(batch.mean))
    old, new = cast(kept, dtype), _like(cast(batch, dtype), kept)
    share = jnp.asarray(share, real_dtype(dtype))
    seen, above = new.count > 0, new.count > ddof
    gap = jnp.where(seen, (new.mean - old.mean) + (new.remainder - old.remainder), 0)
    pairs = (old.mean, new.mean), (old.remainder, new.remainder)
    (base, rest), step = _shorter_way(pairs, gap, jnp.where(seen, share, 0))
    mean, remainder = moved(base, rest, step)
    target = unbiased(new, ddof)
    change = jnp.where(above, target - old.second, 0)
    (base,), step = _shorter_way([(old.second, target)], change, jnp.where(above, share, 0))
    second = base + step
    count = old.count + (new.count if old.count.ndim else jnp.max(new.count, initial=0))
    if kept.remainder.shape != kept.mean.shape:
        mean, remainder = mean + remainder, kept.remainder
    return kept.make(
        mean.astype(kept.mean.dtype),
        second.astype(kept.second.dtype),
        count.astype(kept.count.dtype),
        remainder.astype(kept.remainder.dtype),
    )


def _shorter_way(
    pairs: Iterable[tuple[Array, Array]], gap: Array, share: Array
) -> tuple[list[Array], Array]:
    """Where to start from, old or new, and the step from there: share (new - old) beyond old.

    It is at most half of the gap, so that many steps add up no rounding, and a share of 1 gives
    the new values to the last bit.
    """
    from_old = share < 0.5
    step = jnp.where(from_old, share, share - 1).astype(gap.dtype) * gap
    return [jnp.where(from_old, old, new) for old, new in pairs], step


def _like(new: M, old: M) -> M:
    """The new statistic where the old one lies, on a mesh whose axes are explicit."""

    def place(p: Array, like: Array) -> Array:
        like = like if p.shape == like.shape else old.mean  # where a scalar is every feature's
        here, there = jax.typeof(p).sharding, jax.typeof(like).sharding
        if p.shape != like.shape or here == there or here.mesh != there.mesh:
            return p
        return jax.sharding.reshard(p, there)

    return jax.tree.map(place, new, old)


def unbiased(m: Statistic, ddof: int) -> Array:
    """The second moment divided by count - ddof, where the count is above that."""
    above, dtype = m.count > ddof, m.second.dtype
    divisor = jnp.where(above, m.count - ddof, 1).astype(dtype)
    return jnp.where(above, m.second * m.count.astype(dtype) / divisor, m.second)
