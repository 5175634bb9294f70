"""What a layer does in one call, for linen and NNX alike: choose the moments, apply, remember."""

import math
import warnings
from typing import Any

from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax._inputs import split_axes
from bnjax._moments import Moments, ema, moments
from bnjax._normalize import normalize


def call(
    layer: Any,
    x: Array,
    running: Moments,
    scale: Array | None,
    bias: Array | None,
    mask: ArrayLike | None,
    dtype: DTypeLike,
    *,
    use_running_average: bool,
    initializing: bool = False,
) -> tuple[Array, Moments]:
    """The output and the running statistics after it. `layer` holds flax's fields and `pivot`."""
    if layer.pivot not in ("batch", "running"):
        raise ValueError(f"pivot is {layer.pivot!r}. Choose 'batch' or 'running'.")
    if use_running_average or (initializing and x.size == 0):
        m = running
    else:
        m = moments(
            x,
            feature_axis=layer.axis,
            where=mask,
            axis_name=None if initializing else layer.axis_name,
            axis_index_groups=layer.axis_index_groups,
            pivot=running.mean if layer.pivot == "running" and not initializing else None,
        )
        if not initializing:
            _warn_of_single_values(x.shape, layer.axis, layer.axis_name)
            running = ema(running, m, momentum=layer.momentum)
    y = normalize(
        x,
        m,
        scale,
        bias,
        feature_axis=layer.axis,
        where=mask,
        epsilon=layer.epsilon,
        dtype=dtype,
    )
    return y, running


def _warn_of_single_values(shape: tuple[int, ...], axis: Any, axis_name: Any) -> None:
    replicas = 1 if axis_name is None else lax.psum(1, axis_name)
    _, reduced = split_axes(axis, shape)
    if math.prod(shape[i] for i in reduced) * replicas == 1:
        warnings.warn(
            f"x has shape {shape}, one value per feature, so the output is the bias. "
            "Train with more examples, or pass use_running_average=True.",
            stacklevel=4,
        )
