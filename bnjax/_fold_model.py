"""Folding whole models, in linen and NNX alike: which axes meet, and what must hold."""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from bnjax._arguments import Axes, Shape, promote, split_axes
from bnjax._fold import check_statistics, fold
from bnjax._moments import Moments
from bnjax._normalize import affine, normalize

Pairs = Mapping[str, str]  # the path of a layer -> that of the batch norm that it feeds
Module = TypeVar("Module")


@runtime_checkable
class BatchNorm(Protocol):
    """The module of a batch norm, flax's or ours."""

    axis: Axes
    epsilon: float


class Norm(NamedTuple):
    """What a batch norm applies in inference; arrays `[*features]`."""

    mean: Array
    var: Array
    scale: Array | None
    bias: Array | None
    epsilon: float


class Call(NamedTuple):
    """A call of a module: input, output, and what else it was given."""

    x: Array
    y: Array
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Calls = Mapping[str, list[Call]]  # of each module, by path


class Kernel(NamedTuple):
    """Which axes of a layer's output are also axes of its kernel.

    Attributes:
      ndim, dtype: the kernel's.
      batch: so many first axes of the output are the kernel's first.
      features: so many last axes of the output are the kernel's last.
      transposed: or those before the last.
    """

    ndim: int
    dtype: DTypeLike
    batch: int = 0
    features: int = 1
    transposed: bool = False


class Fit(NamedTuple):
    """How a batch norm sits on its layer.

    Attributes:
      output_axes, kernel_axes: those of the layer's features in its output and in its kernel.
      missing: which of these features, by number, the batch norm does not tell apart.
      is_wide: whether kernel and output have the range of float32.
      layer_calls, norm_calls: how both are called.
    """

    output_axes: Shape
    kernel_axes: Shape
    missing: Shape
    is_wide: bool
    layer_calls: list[Call]
    norm_calls: list[Call]


class Share(NamedTuple):
    """A batch norm as (y - shift) * mul + add, whose layer has taken over * factor + shift."""

    factor: Array
    shift: Array
    mul: Array
    add: Array


def find(path: str, modules: Mapping[str, Module]) -> Module:
    """The module at this path."""
    if path not in modules:
        similar = difflib.get_close_matches(path, modules, cutoff=0)
        raise ValueError(
            f"No module is called {path!r}. Similar ones are {', '.join(map(repr, similar))}. "
            "Write a path with / between its names."
        )
    return modules[path]


def refuse_layer(path: str, module: object, kinds: tuple[type, ...]) -> ValueError:
    """The error for a module that is not linear in its input, as far as we know."""
    names = ", ".join(kind.__name__ for kind in kinds)
    return ValueError(
        f"{path!r} is a {type(module).__name__}, but batch norms fold into {names}. "
        "Fold the arrays of another linear layer with bnjax.fold."
    )


def refuse_norm(path: str, module: object) -> ValueError:
    """The error for a module that is no batch norm."""
    return ValueError(
        f"{path!r} is a {type(module).__name__} without running mean and variance. "
        "Give pairs of a layer and the batch norm after it."
    )


def check_pairs(pairs: Pairs) -> None:
    """Refuses a batch norm that several layers feed."""
    norms = list(pairs.values())
    for path in norms:
        if norms.count(path) > 1:
            raise ValueError(
                f"{path!r} is named twice. Leave out a batch norm that two layers feed."
            )


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A module's input, however it was passed."""
    return next(iter((*args, *kwargs.values())))


def record(args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Array) -> Call:
    """A call to look at later: without masks, which may be traced, and do nothing in inference."""

    def keep(a: Any) -> Any:
        return None if isinstance(a, Array) else a

    rest = [*kwargs.items()][not args :]
    return Call(first(args, kwargs), y, (*map(keep, args[1:]),), {k: keep(a) for k, a in rest})


def see_fit(pair: tuple[str, str], calls: Calls, axis: Axes, kernel: Kernel) -> Fit:
    """Where the features of the batch norm are in the kernel, if its layer alone feeds it."""
    layer, norm = pair
    # The very array, not an equal one: relu may have nothing to do, and under jit none has values.
    outputs = [call.y for call in calls[layer]]
    strange = [call.x for call in calls[norm] if not any(call.x is y for y in outputs)]
    if strange or not calls[norm]:
        raise ValueError(
            f"The input of {norm!r}, {_shape(strange)}, is not the output of {layer!r}, "
            f"{_shape(outputs)}. Name the layer right before the batch norm, with no activation "
            "in between."
        )
    shape, end = calls[norm][0].x.shape, kernel.ndim - kernel.transposed
    places = {i: i for i in range(kernel.batch)}
    places |= {len(shape) - i: end - i for i in range(kernel.features, 0, -1)}
    axes, _ = split_axes(axis, shape)
    if not set(axes) <= set(places):
        raise ValueError(
            f"{norm!r} has its features on axes {axes} of shape {shape}, but {layer!r} on "
            f"{tuple(places)}. Statistics of positions do not fold."
        )
    missing = tuple(i for i, place in enumerate(places) if place not in axes)
    is_wide = all(jnp.finfo(p.dtype).maxexp >= 128 for p in (kernel, calls[layer][0].y))
    return Fit(tuple(places), tuple(places.values()), missing, is_wide, calls[layer], calls[norm])


def _shape(arrays: list[Array]) -> str:
    return f"of shape {arrays[0].shape}" if arrays else "never called"


def fold_pair(
    fit: Fit, kernel: Array, kernel_bias: Array | None, norm: Norm
) -> tuple[Array, Array]:
    """`fold` of a layer in a model."""
    mean, var, scale, bias = (p if p is None else spread(fit, kernel, p) for p in norm[:4])
    return fold(
        kernel,
        kernel_bias,
        Moments(mean, var),
        scale,
        bias,
        feature_axis=fit.kernel_axes,
        epsilon=norm.epsilon,
    )


def multiply(
    fit: Fit, kernel: Array, kernel_bias: Array | None, factor: Array
) -> tuple[Array, Array | None]:
    """A layer's kernel and bias times a factor `[*features]`, in their dtypes."""
    factor = spread(fit, kernel, factor)
    _, others = split_axes(fit.kernel_axes, kernel.shape)
    multiplied = kernel * lax.expand_dims(factor.astype(kernel.dtype), others)
    if kernel_bias is None:
        return multiplied, None
    return multiplied, kernel_bias * factor.astype(kernel_bias.dtype)


def spread(fit: Fit, kernel: Array, p: Array) -> Array:
    """p for each of the layer's features, of which the batch norm may tell fewer apart."""
    sizes = tuple(kernel.shape[i] for i in fit.kernel_axes)
    return jnp.broadcast_to(lax.expand_dims(p, fit.missing), sizes)


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
