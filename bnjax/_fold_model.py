"""What folding a whole model takes in linen and NNX alike: which axes meet, and the checks."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax._arguments import Shape, split_axes
from bnjax._fold import fold
from bnjax._moments import Moments

Pairs = Mapping[str, str]  # the path of a layer -> that of the batch norm that it feeds
Calls = Mapping[str, list[tuple[Any, Any]]]  # path -> input and output of each call, in one run


class Norm(NamedTuple):
    """What a batch norm applies in inference; arrays `[*features]`."""

    mean: Any
    var: Any
    scale: Any
    bias: Any
    epsilon: Any


class Fit(NamedTuple):
    """How a batch norm sits on its layer.

    Attributes:
      kernel_axes: those of the layer's output features, ascending.
      missing: which of these features, by number, the batch norm does not tell apart.
      dtype: of the batch norm's output.
      eps: of the coarser of the two outputs.
    """

    kernel_axes: Shape
    missing: Shape
    dtype: Any
    eps: float


def find(path: str, modules: Mapping[str, Any]) -> Any:
    """The module at this path."""
    if path not in modules:
        near = difflib.get_close_matches(path, modules, cutoff=0)
        raise ValueError(
            f"No module is called {path!r}. Similar ones are {', '.join(map(repr, near))}. "
            "Write a path with / between its names."
        )
    return modules[path]


def check_layer(path: str, layer: Any, kinds: tuple[type, ...]) -> None:
    """Refuses a module that is not linear in its input, as far as we know."""
    if not isinstance(layer, kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"{path!r} is a {type(layer).__name__}, but batch norms fold into {names}. "
            "Fold the arrays of another linear layer with bnjax.fold."
        )


def check_norm(path: str, norm: Any, has_statistics: bool, pairs: Pairs) -> None:
    """Refuses a module that is not a batch norm, and one that several layers feed."""
    if not (has_statistics and hasattr(norm, "axis") and hasattr(norm, "epsilon")):
        raise ValueError(
            f"{path!r} is a {type(norm).__name__} without running mean and variance. "
            "Give pairs of a layer and the batch norm after it."
        )
    if list(pairs.values()).count(path) > 1:
        raise ValueError(f"{path!r} is named twice. Leave out a batch norm that two layers feed.")


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A module's input, however it was passed."""
    return next(iter((*args, *kwargs.values())))


def see_fit(
    pair: tuple[str, str],
    calls: Calls,
    axis: Any,
    kernel_ndim: int,
    *,
    batch: int = 0,
    features: int = 1,
    transposed: bool = False,
) -> Fit:
    """Where the features of the batch norm are in the kernel, if its layer alone feeds it.

    Of the layer's output the first `batch` axes and the last `features` ones are also axes of
    the kernel: its first and last, or before the last where the kernel is transposed.
    """
    layer, norm = pair
    # The very array, not an equal one: relu may have nothing to do, and under jit none has values.
    outputs = [y for _, y in calls[layer]]
    strange = [x for x, _ in calls[norm] if not any(x is y for y in outputs)]
    if strange or not calls[norm]:
        raise ValueError(
            f"The input of {norm!r}, {_shape(strange)}, is not the output of {layer!r}, "
            f"{_shape(outputs)}. Name the layer right before the batch norm, with no activation "
            "in between."
        )
    x, y = calls[norm][0]
    end = kernel_ndim - transposed
    places = {i: i for i in range(batch)}
    places |= {x.ndim - i: end - i for i in range(features, 0, -1)}
    axes, _ = split_axes(axis, x.shape)
    if not set(axes) <= set(places):
        raise ValueError(
            f"{norm!r} has its features on axes {axes} of shape {x.shape}, but {layer!r} on "
            f"{tuple(places)}. Statistics of positions do not fold."
        )
    missing = tuple(i for i, place in enumerate(places) if place not in axes)
    eps = max(float(jnp.finfo(p.dtype).eps) for p in (x, y))
    return Fit(tuple(places.values()), missing, y.dtype, eps)


def _shape(arrays: list[Any]) -> str:
    return f"of shape {np.shape(arrays[0])}" if arrays else "never called"


def fold_pair(
    fit: Fit, kernel: Array, kernel_bias: Array | None, norm: Norm
) -> tuple[Array, Array]:
    """`fold`, where the layer may have more features than the batch norm tells apart."""
    sizes = tuple(kernel.shape[i] for i in fit.kernel_axes)

    def spread(p: Array | None) -> Array | None:
        return None if p is None else jnp.broadcast_to(jnp.expand_dims(p, fit.missing), sizes)

    mean, var, scale, bias = map(spread, norm[:4])
    return fold(
        kernel,
        kernel_bias,
        Moments(mean, var),
        scale,
        bias,
        feature_axis=fit.kernel_axes,
        epsilon=norm.epsilon,
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


def check(
    pairs: Pairs,
    fits: Mapping[str, Fit],
    run: Callable[[], Any],
    run_folded: Callable[[Pairs], Any],
) -> None:
    """Refuses the pairs whose folding changes what the model returns, and names the first."""
    eps = max((fit.eps for fit in fits.values()), default=0.0)
    with jax.default_matmul_precision("highest"):  # accelerators round products, too
        outputs = run()
        if _agree(outputs, run_folded(pairs), eps):
            return
        alone = ({layer: norm} for layer, norm in pairs.items())
        blamed = next((p for p in alone if not _agree(outputs, run_folded(p), eps)), pairs)
    names = ", ".join(f"{norm!r} into {layer!r}" for layer, norm in blamed.items())
    raise ValueError(
        f"Folding {names} changes what the model returns. Leave out layers whose output is used "
        "elsewhere, too, and call the model as in evaluation."
    )


def _agree(outputs: Any, others: Any, eps: float) -> bool:
    """Whether all leaves are the same, up to half of the digits that the coarsest dtype has."""

    def close(a: Any, b: Any) -> bool:
        inexact = jnp.issubdtype(a.dtype, jnp.inexact)
        tolerance = max(eps, float(jnp.finfo(a.dtype).eps)) ** 0.5 if inexact else 0
        wide = np.complex128 if jnp.iscomplexobj(a) else np.float64
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        return bool(np.all(np.abs(a - b) <= tolerance * np.abs(a).max(initial=0)))

    return all(jax.tree.leaves(jax.tree.map(close, outputs, others)))
