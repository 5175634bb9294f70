"""What a Flax linen layer does in one call: variables, arithmetic, and what becomes of moments."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList
from flax.linen.dtypes import canonicalize_dtype
from jax import Array
from jax.typing import ArrayLike

from bnjax._arguments import Shape, as_array, promote, split_axes
from bnjax._layer import call, counts_steps, remember
from bnjax._rounding import real_dtype
from bnjax._statistic import merge


def call_linen(
    layer: Any,
    x: ArrayLike,
    use_running_average: bool | None,
    mask: ArrayLike | None,
    second: tuple[str, Callable[[Shape, Any], Array]],
    **verbs: Callable[..., Any],
) -> Array:
    """The output. `second` is the name and the start of the running second moment."""
    use_running_average = nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )
    x = as_array(x)
    sizes = tuple(x.shape[i] for i in split_axes(layer.axis, x.shape)[0])
    kept = promote(x.dtype)
    name, start = second
    stats = {
        "mean": layer.variable("batch_stats", "mean", jnp.zeros, sizes, kept),
        name: layer.variable("batch_stats", name, start, sizes, kept),
    }
    if counts_steps(layer):
        stats["steps"] = layer.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
    running = {name: variable.value for name, variable in stats.items()}
    scale = bias = None
    if layer.use_scale:
        scale = layer.param("scale", layer.scale_init, sizes, layer.param_dtype)
    if layer.use_bias:
        bias = layer.param("bias", layer.bias_init, sizes, layer.param_dtype)
    with jax.numpy_dtype_promotion("standard"):
        dtype = canonicalize_dtype(x, scale, bias, dtype=layer.dtype)
    y, m = call(
        layer,
        x,
        running,
        scale,
        bias,
        mask,
        dtype,
        use_running_average=use_running_average,
        initializing=layer.is_initializing(),
        **verbs,
    )
    if m is None:
        return y
    emits = _emits_moments(layer)
    if not emits or layer.is_mutable_collection("batch_stats"):
        for name, value in remember(layer, running, m).items():
            stats[name].value = value
    if emits:
        before = layer.get_variable("moments", "moments")
        layer.put_variable("moments", "moments", m if before is None else merge(before, m))
    return y


def unit_variance(sizes: Shape, dtype: Any) -> Array:
    """Where a running variance starts."""
    return jnp.ones(sizes, real_dtype(dtype))


def _emits_moments(layer: Any) -> bool:
    """Whether `apply` names the collection; `mutable=True` must give what flax gives."""
    named = layer.scope and not isinstance(layer.scope.mutable, bool | DenyList)
    return bool(named) and layer.is_mutable_collection("moments")
