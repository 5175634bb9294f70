"""One training step of each implementation, all with the same signature.

`step(x, scale, bias, **settings) -> Step(y, mean, var)`: the batch is normalized with its own
moments, and `mean, var` are the running statistics after it. They start at `running` (zeros and
ones by default), and with the default momentum of 0 they end at the batch's.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx


class Step(NamedTuple):
    """What a training step returns."""

    y: Any
    mean: Any
    var: Any


def start(x, feature_axis=-1):
    """Running statistics as a layer begins with them: zeros and ones, at least float32."""
    axes = (feature_axis,) if isinstance(feature_axis, int) else feature_axis
    sizes = tuple(x.shape[a] for a in sorted(a % x.ndim for a in axes))
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.zeros(sizes, dtype), jnp.ones(sizes, jnp.finfo(dtype).dtype)


def _of_functions(apply):
    """A step over the functions, where `apply` returns the output and the batch's moments."""

    def step(x, scale=None, bias=None, *, running=None, momentum=0.0, pivot="batch", **settings):
        feature_axis = settings.get("feature_axis", -1)
        old = bnjax.Moments(*(start(x, feature_axis) if running is None else running))
        settings["pivot"] = old.mean if pivot == "running" else None
        y, m = apply(x, scale, bias, **settings)
        new = bnjax.ema(old, m, momentum=momentum)
        return Step(y, new.mean, new.var)

    return step


def _measure_then_apply(
    x,
    scale,
    bias,
    *,
    pivot,
    axis_name=None,
    axis_index_groups=None,
    epsilon=1e-5,
    dtype=None,
    **both,
):
    m = bnjax.moments(
        x, axis_name=axis_name, axis_index_groups=axis_index_groups, pivot=pivot, **both
    )
    return bnjax.normalize(x, m, scale, bias, epsilon=epsilon, dtype=dtype, **both), m


def linen_layer(
    x,
    scale=None,
    bias=None,
    *,
    running=None,
    momentum=0.0,
    feature_axis=-1,
    where=None,
    kind=bnjax.linen.BatchNorm,
    **fields,
):
    """A step of `bnjax.linen.BatchNorm`, or of flax's."""
    mean, var = start(x, feature_axis) if running is None else running
    given = {"scale": scale, "bias": bias}
    layer = kind(
        use_running_average=False,
        axis=feature_axis,
        momentum=momentum,
        use_scale=scale is not None,
        use_bias=bias is not None,
        **fields,
    )
    variables = {
        "params": {name: p for name, p in given.items() if p is not None},
        "batch_stats": {"mean": mean, "var": var},
    }
    y, updates = layer.apply(variables, x, mask=where, mutable=["batch_stats"])
    return Step(y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"])


def nnx_layer(
    x,
    scale=None,
    bias=None,
    *,
    running=None,
    momentum=0.0,
    feature_axis=-1,
    where=None,
    kind=bnjax.nnx.BatchNorm,
    **fields,
):
    """A step of `bnjax.nnx.BatchNorm`, or of flax's."""
    mean, var = start(x, feature_axis) if running is None else running
    layer = kind(
        mean.size if mean.ndim == 1 else mean.shape,  # flax's takes an integer
        axis=feature_axis,
        momentum=momentum,
        use_scale=scale is not None,
        use_bias=bias is not None,
        rngs=nnx.Rngs(0),
        **fields,
    )
    layer.mean = nnx.BatchStat(jnp.asarray(mean))
    layer.var = nnx.BatchStat(jnp.asarray(var))
    if scale is not None:
        layer.scale = nnx.Param(scale)
    if bias is not None:
        layer.bias = nnx.Param(bias)
    y = layer(x, mask=where)
    return Step(y, layer.mean[...], layer.var[...])


LAYERS = {"linen": linen_layer, "nnx": nnx_layer}
FLAXS = {linen_layer: nn.BatchNorm, nnx_layer: nnx.BatchNorm}
IMPLEMENTATIONS = {
    "batch_norm": _of_functions(bnjax.batch_norm),
    "moments, normalize": _of_functions(_measure_then_apply),
    **LAYERS,
}


def _over(names):
    return pytest.mark.parametrize("step", [IMPLEMENTATIONS[name] for name in names], ids=names)


every_implementation = _over([*IMPLEMENTATIONS])
every_layer = _over([*LAYERS])
# `batch_norm` is moments and normalize, and the layers share all that they call: one function and
# one layer stand for all four where it is not their own code that is tested.
one_of_each = _over(["batch_norm", "nnx"])
the_others = _over(["moments, normalize", "linen"])


def alternating(names, values):
    """Runs a test on each value with one function and one layer, in turn with the others."""
    if isinstance(names, str):
        names, values = (names,), [(value,) for value in values]
    steps = [*IMPLEMENTATIONS.values()]
    rows = [
        (step, *value)
        for i, value in enumerate(values)
        for step in (steps[i % 2], steps[3 - i % 2])
    ]
    return pytest.mark.parametrize(("step", *names), rows)


def pull_back(step, x, scale, bias, dy, **settings):
    """The step, and the gradients of sum(dy * y) with respect to x, scale and bias."""

    def output(x, scale, bias):
        out = step(x, scale, bias, **settings)
        return out.y, out

    _, pull, out = jax.vjp(output, x, scale, bias, has_aux=True)
    return out, pull(dy)
