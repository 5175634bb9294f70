"""Folding whole models, linen and NNX: which layer feeds a batch norm, and which axes meet."""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from bnjax._arguments import Axes, Shape, split_axes
from bnjax._fold import fold
from bnjax._moments import Moments

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
