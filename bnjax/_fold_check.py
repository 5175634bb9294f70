"""Whether a model with folded batch norms is the same function: what a batch norm and the model
return is tried with other variables than the trained ones."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax._arguments import Axes, promote, split_axes
from bnjax._fold import check_statistics
from bnjax._fold_model import Call, Fit, Norm, Pairs
from bnjax._moments import Moments
from bnjax._normalize import affine, normalize


class Share(NamedTuple):
    """A batch norm as (y - shift) * mul + add, whose layer has taken over * factor + shift."""

    factor: Array
    shift: Array
    mul: Array
    add: Array


def check_norm(
    pair: tuple[str, str], norm: Norm, axis: Axes, fit: Fit, apply: Callable[[Norm, Call], Array]
) -> None:
    """Refuses statistics that cannot be, and what does not apply its statistics and nothing else.

    Tried with variables of order 1 and inputs four standard deviations to both sides of the
    mean: the trained ones may hide an activation, or drown it in rounding errors.
    """
    check_statistics(Moments(norm.mean, norm.var), f"The batch norm {pair[1]!r}")
    drawn = perturb(_fresh(norm))
    m, given = Moments(drawn.mean, drawn.var), [p for p in drawn[:4] if p is not None]
    for call in fit.norm_calls:
        _, others = split_axes(axis, call.x.shape)
        mean, var = (lax.expand_dims(p, others).astype(call.x.dtype) for p in m[:2])
        sides = np.random.default_rng(0).choice([-4.0, 4.0], call.x.shape)
        for side in (sides, -sides):
            x = mean + jnp.asarray(side, call.x.dtype) * jnp.sqrt(var)
            ours = apply(drawn, call._replace(x=x))
            dtype = promote(ours.dtype, *(p.dtype for p in given))
            true = normalize(
                x, m, *drawn[2:4], feature_axis=axis, epsilon=norm.epsilon, dtype=dtype
            )
            eps = max(float(jnp.finfo(p.dtype).eps) for p in (ours, *given))
            if not jnp.all(jnp.abs(ours.astype(dtype) - true) <= 16 * eps * (1 + jnp.abs(true))):
                raise refuse([pair])


def _fresh(norm: Norm) -> Norm:
    """As at the start of training."""
    return norm._replace(
        mean=jnp.zeros_like(norm.mean),
        var=jnp.ones_like(norm.var),
        scale=None if norm.scale is None else jnp.ones_like(norm.scale),
        bias=None if norm.bias is None else jnp.zeros_like(norm.bias),
    )


def perturb(norm: Norm) -> Norm:
    """The same batch norm, otherwise trained: fresh variables or a scale of 0 would hide faults."""
    rng = np.random.default_rng(0)

    def draw(p: Array, low: float) -> Array:
        return jnp.asarray(rng.uniform(low, low + 1.5, p.shape), p.dtype)

    mean, var, scale, bias, epsilon = norm
    mean = mean + draw(mean, -0.75) * jnp.sqrt(var).astype(mean.dtype)
    if scale is not None:
        scale = jnp.where(scale == 0, 1, scale) * draw(scale, 0.5)
    if bias is not None:
        bias = bias + draw(bias, -0.75)
    return Norm(mean, var * draw(var, 0.5), scale, bias, epsilon)


def check_use(
    norms: Mapping[str, Norm],
    fits: Mapping[str, Fit],
    pairs: Pairs,
    run: Callable[[Mapping[str, Share]], Any],
    *,
    shifts: bool,
) -> None:
    """Refuses pairs where anything but the batch norm sees the layer or its variables.

    Each batch norm becomes y * mul + add. Then its layer takes over a factor: its kernel and bias
    are multiplied, mul is divided. Powers of two commute with every rounding, so by the same
    program the model returns the same bits, whatever its dtypes, depth and condition, unless
    something else depends on what was multiplied. Large and small ones, of both signs, show it
    also behind an activation; in float16, which they may overflow, there is the sign alone.
    Where layers take over shifts, too, these are tried with kernels of zero: then they are exact.
    """
    rng = np.random.default_rng(0)
    powers = {}
    for path, norm in norms.items():
        exponents = 20 * fits[path].is_wide * rng.choice([-1, 1], norm.mean.shape)
        powers[path] = 2.0**exponents * rng.choice([-1, 1], norm.mean.shape)
    perturbed = {path: perturb(norm) for path, norm in norms.items()}
    tries = [functools.partial(_outputs, run, sample) for sample in (norms, perturbed)]
    known = [outputs({}, {}) for outputs in tries]
    if not any(np.isfinite(y).any() for true in known for y in true):
        raise ValueError(
            "The model returns no finite number, and with NaN nothing can be checked. "
            "Give a sample input like those that it was trained with."
        )

    def changes(moved: Pairs) -> bool:
        for sign, true, outputs in zip((1, -1), known, tries, strict=True):
            some = {path: sign * powers[path] for path in moved.values()}
            others = {path: 1 / p if fits[path].is_wide else -p for path, p in some.items()}
            zeros = {path: 0 * p for path, p in some.items()}
            if not all(_same(true, outputs(factors, {})) for factors in (some, others)):
                return True
            if shifts:
                true = outputs(zeros, {})
                if not all(_same(true, outputs(zeros, taken)) for taken in (some, others)):
                    return True
        return False

    if changes(pairs):
        alone = ([pair] for pair in pairs.items())
        raise refuse(next((pair for pair in alone if changes(dict(pair))), [*pairs.items()]))


def _outputs(
    run: Callable[[Mapping[str, Share]], Any],
    norms: Mapping[str, Norm],
    factors: Mapping[str, np.ndarray],
    shifts: Mapping[str, np.ndarray],
) -> list[np.ndarray]:
    """What the model returns where some batch norms have given factors and shifts away."""
    shares = {}
    for path, norm in norms.items():
        mul, add = affine(Moments(norm.mean, norm.var), norm.scale, norm.bias, epsilon=norm.epsilon)
        factor = jnp.asarray(factors.get(path, np.ones(mul.shape)), jnp.float32)
        shift = jnp.asarray(shifts.get(path, np.zeros(mul.shape)), jnp.float32)
        mul /= jnp.where(factor == 0, 1, factor).astype(mul.dtype)
        shares[path] = Share(factor, shift, mul, add)
    return [*map(np.asarray, jax.tree.leaves(run(shares)))]


def _same(outputs: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Whether all values are equal, NaN to NaN."""
    return all(
        np.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.inexact))
        for a, b in zip(outputs, others, strict=True)
    )


def refuse(pairs: Sequence[tuple[str, str]]) -> ValueError:
    """The error for pairs whose folding changes what the model returns."""
    names = ", ".join(f"{norm!r} into {layer!r}" for layer, norm in pairs)
    return ValueError(
        f"Folding {names} changes what the model returns. Leave out layers whose output is used "
        "elsewhere, too, and call the model as in evaluation."
    )
