"""The two sums that a variance needs, about a pivot chosen for each backend.

With weights w (1 without a mask) and a pivot c, a constant near the mean:

  s1 = sum(w (x - c)),  s2 = sum(w |x - c|^2)

| pivot | TPU | CPU | GPU |
|---|---|---|---|
| "batch" | the mean | the mean | a sample's mean, else the mean |
| "running" | the given one, guarded | as on a TPU | as on a TPU |
| "auto" | the given one, guarded | a sample's mean, else the given one, guarded | as "batch" |

With an axis name "auto" is "running" everywhere. A sample is of unmasked feature maps only.
Guarded: where the sums show that the given pivot was too far from the mean, a branch measures
again about the batch's mean. Autodiff of a branch would write zeros as large as x, so the pair of
sums has a derivative rule: the derivative about the pivot that was chosen. It is linear in the
tangents and itself differentiated.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from bnjax import _masks
from bnjax._arguments import Shape
from bnjax._rounding import abs2, near
from bnjax._statistic import AxisName, Groups, psum
from bnjax._xla import apart, derivative, moving_of, once, per_backend, saved, sharded_axes, varies

FAR = 2.0  # variances; a mean farther from the pivot would cost the variance digits

Pivot = Literal["auto", "batch", "running"]
Sums = tuple[Array, Array, Array, Array]  # the pivot, s1, s2 and the count
# Of x, c, w and the reduced axes: the pivot as it was used, s1 and s2.
Both = Callable[[Array, Array, Array | None, Shape], tuple[Array, Array, Array]]


class Guess(NamedTuple):
    """Where the mean may be.

    Attributes:
      mean: `[*features]`, the same on all replicas; anything, NaN too.
      pivot: the program for it.
      slack: what is added to the variance later, so that the guard need not be more exact.
      name: what errors call it.
    """

    mean: ArrayLike
    pivot: Pivot = "running"
    slack: ArrayLike = 0.0
    name: str = "pivot"


class Program(NamedTuple):
    """What is decided before x is seen."""

    reduced: Shape
    pivot: Pivot = "batch"
    axis_name: AxisName | None = None
    groups: Groups = None

    def shared(self, *parts: Array) -> tuple[Array, ...]:
        """The sums over all replicas."""
        return parts if self.axis_name is None else psum(parts, self.axis_name, self.groups)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def sums(
    program: Program, x: Array, c: Array | None, w: Array | None, count: Array, slack: Array
) -> Sums:
    """The chosen pivot, s1 and s2 about it, and the count, over all replicas.

    `slack` is added to the variance where the guard compares the two.
    """
    measure = functools.partial(_pivoted_sums, program)
    return per_backend(
        x,
        c,
        w,
        count,
        slack,
        cpu=functools.partial(measure, _apart, near, samples=("auto",)),
        gpu=functools.partial(measure, _staged, near, samples=get_args(Pivot), guards=False),
        # There a pivot that is computed is a kernel more, whoever gives it.
        tpu=functools.partial(measure, _together, lax.optimization_barrier),
    )


def _rule(program: Program, primals: Any, tangents: Any) -> Any:
    x, _, w, _, _ = primals
    c, s1, s2, count = saved(sums(program, *primals))
    moving = moving_of(tangents)
    dcount = moving.pop(3, jnp.zeros_like(count))

    def pair(x: Array, c: Array, w: Array | None) -> tuple[Array, Array]:
        return _together(x, c, w, program.reduced)[1:]

    d1, d2 = derivative(pair, (x, c, w), moving)
    d1, d2, dcount = program.shared(d1, d2, dcount)
    return (c, s1, s2, count), (jnp.zeros_like(c), *once(s2, d1, d2), dcount)


sums.defjvp(_rule, symbolic_zeros=True)


def _together(
    x: Array, c: Array, w: Array | None, reduced: Shape, kept: Shape = ()
) -> tuple[Array, Array, Array]:
    d = _masks.hide(x.astype(c.dtype) - lax.expand_dims(c, (*kept, *reduced)), w)
    weighted = _masks.weigh(d, w)
    return c, jnp.sum(weighted, reduced), jnp.sum(jnp.real(weighted * jnp.conj(d)), reduced)


def _apart(x: Array, c: Array, w: Array | None, reduced: Shape) -> tuple[Array, Array, Array]:
    """The same for XLA's CPU backend, which writes out a difference that two sums share."""
    c1, c2 = apart(c)
    return c1, _together(x, c1, w, reduced)[1], _together(x, c2, w, reduced)[2]


def _staged(x: Array, c: Array, w: Array | None, reduced: Shape) -> tuple[Array, Array, Array]:
    """The same for XLA's GPU backend, which writes x - c out where the sums have few terms.

    Cut into 32 parts each they have enough blocks to run in, and x - c stays inside of them.
    """
    if not reduced:
        return _together(x, c, w, reduced)
    first = reduced[0]
    rows, terms = x.shape[first], math.prod(x.shape[i] for i in reduced)
    fixed = isinstance(terms, int) and first not in sharded_axes(x)
    if not fixed or terms > 2**14 or rows % 32:
        return _together(x, c, w, reduced)

    def in_parts(a: Array) -> Array:
        rows = a.shape[first]  # 1 if weights are shared by all
        parts = 32 if rows > 1 else 1
        return a.reshape(*a.shape[:first], parts, rows // parts, *a.shape[first + 1 :])

    w = None if w is None else in_parts(w)
    partial = _together(in_parts(x), c, w, tuple(i + 1 for i in reduced), kept=(first,))
    s1, s2 = lax.optimization_barrier(partial[1:])
    return c, jnp.sum(s1, first), jnp.sum(s2, first)


def _pivoted_sums(
    program: Program,
    both: Both,
    hold: Callable[[Array], Array],
    x: Array,
    c: Array | None,
    w: Array | None,
    count: Array,
    slack: Array,
    *,
    samples: tuple[Pivot, ...] = (),
    guards: bool = True,
) -> Sums:
    sampled = program.pivot in samples and w is None
    sample = _sample(x, program.reduced) if sampled else None

    def about(c: Array) -> Sums:
        c, *pair = both(x, c, w, program.reduced)
        s1, s2, n = program.shared(*pair, count)
        return c, s1, s2, n

    def about_mean(like: ArrayLike = 0.0) -> Sums:
        part, n = x, count
        if sample is not None:
            part = x[sample]
            n = _masks.count(part, None, (), program.reduced, count.dtype)
        s, n = program.shared(_masks.weighted_sum(part, w, program.reduced), n)
        return about(near(s / _masks.divisor(n).astype(s.dtype) + like))

    alone = program.axis_name is None
    unguarded = program.pivot == "auto" and alone and (sample is not None or not guards)
    if c is None or program.pivot == "batch" or unguarded:
        return about_mean()
    if w is not None:  # else what is not finite makes the guard fire
        c = jnp.where(jnp.isfinite(c), c, 0)
    c = hold(c)
    if sharded_axes(x):  # make c lie as the sums do
        c = c + jnp.sum(jnp.zeros_like(x, c.dtype), program.reduced)
    c, s1, s2, n = about(c)
    far = _is_far(s1, s2, n, slack)

    def again(c: Array, *_: Array) -> tuple[Array, Array, Array]:
        zero = jnp.where(c == c, 0.0, 0.0)  # of c's type, whatever axes that varies over
        return about_mean(like=zero)[:3]

    def as_given(c: Array, s1: Array, s2: Array) -> tuple[Array, Array, Array]:
        # s1 is finite here; a shared pivot must vary as the sums of replicas of their own do.
        return (c if varies(c) == varies(s1) else c + (s1 - s1)), s1, s2

    return *lax.cond(far, again, as_given, c, s1, s2), n


def _is_far(s1: Array, s2: Array, count: Array, slack: Array) -> Array:
    """Whether of any feature the pivot is far from the mean, or the sums cannot tell."""
    n = _masks.divisor(count)
    m1, m2 = abs2(s1 / n.astype(s1.dtype)), s2 / n
    is_near = (m1 <= FAR * (m2 - m1 + slack)) & jnp.isfinite(m2)
    return jnp.any((count > 0) & ~is_near)


def _sample(x: Array, reduced: Shape) -> tuple[slice, ...] | None:
    """At least a sixteenth of the positions of a feature map, if there is one that can be sliced.

    A share p of any data has a mean within sqrt((1 - p) / p) standard deviations of the mean of
    all: within four, which the variance bears. The first axis, the batch's, stays whole, since it
    may be sharded; an axis that is sharded on an explicit mesh cannot be sliced.
    """
    axes = [i for i in reduced[1:] if i not in sharded_axes(x)][-2:]
    if not axes:
        return None
    step = 16 if len(axes) == 1 else 4
    return tuple(slice(None, None, step if i in axes else None) for i in range(x.ndim))
