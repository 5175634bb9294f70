"""What a layer does in one call, for linen and NNX alike: choose the moments, apply, remember."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import split_axes
from bnjax._average import Stats
from bnjax._average import remember as remember_one
from bnjax._ghost import in_ghosts
from bnjax._moments import Moments, moments
from bnjax._normalize import normalize
from bnjax._renormalize import renormalize
from bnjax._statistic import Statistic, pmerge
from bnjax._trees import statistic_of

Limit = ArrayLike | Callable[[ArrayLike], ArrayLike]


def call(
    layer: Any,
    x: Array,
    stats: Stats,
    scale: Array | None,
    bias: Array | None,
    mask: ArrayLike | None,
    dtype: DTypeLike,
    *,
    use_running_average: bool,
    initializing: bool = False,
    measure: Callable[..., Any] = moments,
    apply: Callable[..., Array] = normalize,
) -> tuple[Array, Any]:
    """The output, and in training the moments. `layer` holds flax's fields and bnjax's."""
    if layer.pivot not in ("batch", "running"):
        raise ValueError(f"pivot is {layer.pivot!r}. Choose 'batch' or 'running'.")
    settings = {"feature_axis": layer.axis, "epsilon": layer.epsilon, "dtype": dtype}
    kind = statistic_of(stats)
    running = kind.make(stats["mean"], stats[kind.second_name()])
    if use_running_average or (initializing and x.size == 0):
        return apply(x, running, scale, bias, where=mask, **settings), None
    if hasattr(layer, "r_max"):
        running = Moments(stats["mean"], stats["var"])
        apply = functools.partial(renormalize, running=running, **_limits(layer, stats))

    def train(x: Array, mask: ArrayLike | None, **shared: Any) -> tuple[Array, Any]:
        m = measure(x, feature_axis=layer.axis, where=mask, **shared)
        return apply(x, m, scale, bias, where=mask, **settings), m

    if initializing:
        return train(x, mask)[0], None
    pivot = stats["mean"] if layer.pivot == "running" else None
    shared = {"axis_name": layer.axis_name, "axis_index_groups": layer.axis_index_groups}
    size = getattr(layer, "ghost_batch_size", None)
    if size is None:
        y, m = train(x, mask, pivot=pivot, **shared)
        _warn_of_single_values(x.shape, layer.axis, layer.axis_name)
        return y, m
    y, m = in_ghosts(functools.partial(train, pivot=pivot), x, mask, size, layer.axis)
    _warn_of_single_values((size, *x.shape[1:]), layer.axis, None)
    return y, m if layer.axis_name is None else pmerge(m, **shared)


def _limits(layer: Any, stats: Stats) -> dict[str, Any]:
    """Those of batch renormalization at this step."""
    limits = {"r_max": layer.r_max, "d_max": layer.d_max}
    return {name: p(stats["steps"]) if callable(p) else p for name, p in limits.items()}


def counts_steps(layer: Any) -> bool:
    """Whether something in the layer depends on the number of updates before."""
    limits = getattr(layer, "r_max", None), getattr(layer, "d_max", None)
    return layer.debias or layer.momentum is None or any(map(callable, (layer.momentum, *limits)))


def remember(layer: Any, stats: Stats, m: Statistic) -> Stats:
    """The running statistics after a training call."""
    return remember_one(stats, m, momentum=layer.momentum, debias=layer.debias, ddof=layer.ddof)


def _warn_of_single_values(shape: tuple[int, ...], axis: Any, axis_name: Any) -> None:
    replicas = 1 if axis_name is None else lax.psum(1, axis_name)
    _, reduced = split_axes(axis, shape)
    if math.prod(shape[i] for i in reduced) * replicas == 1:
        warnings.warn(
            f"x has shape {shape}, one value per feature, so the output is the bias. "
            "Train with more examples, or pass use_running_average=True.",
            stacklevel=4,
        )
