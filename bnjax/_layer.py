"""What a layer does in one call, for linen and NNX alike: choose the moments, apply, remember."""

import math
import warnings
from collections.abc import Callable
from typing import Any

from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax._inputs import split_axes
from bnjax._moments import moments
from bnjax._normalize import normalize
from bnjax._trees import AnyMoments, Stats, as_moments, update_stats


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
    measured = None
    if not use_running_average and not (initializing and x.size == 0):
        measured = measure(
            x,
            feature_axis=layer.axis,
            where=mask,
            axis_name=None if initializing else layer.axis_name,
            axis_index_groups=layer.axis_index_groups,
            pivot=stats["mean"] if layer.pivot == "running" and not initializing else None,
        )
        if not initializing:
            _warn_of_single_values(x.shape, layer.axis, layer.axis_name)
    y = apply(
        x,
        as_moments(stats) if measured is None else measured,
        scale,
        bias,
        feature_axis=layer.axis,
        where=mask,
        epsilon=layer.epsilon,
        dtype=dtype,
    )
    return y, None if initializing else measured


def counts_steps(layer: Any) -> bool:
    """Whether the running average of the layer depends on the number of updates before."""
    return layer.debias or layer.momentum is None or callable(layer.momentum)


def remember(layer: Any, stats: Stats, m: AnyMoments) -> Stats:
    """The running statistics after a training call."""
    return update_stats(stats, m, momentum=layer.momentum, debias=layer.debias, ddof=layer.ddof)


def _warn_of_single_values(shape: tuple[int, ...], axis: Any, axis_name: Any) -> None:
    replicas = 1 if axis_name is None else lax.psum(1, axis_name)
    _, reduced = split_axes(axis, shape)
    if math.prod(shape[i] for i in reduced) * replicas == 1:
        warnings.warn(
            f"x has shape {shape}, one value per feature, so the output is the bias. "
            "Train with more examples, or pass use_running_average=True.",
            stacklevel=4,
        )
