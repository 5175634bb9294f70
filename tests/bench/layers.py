"""The layer alone, in each JAX library: training forward, forward and backward, inference.

A library is a function from an input to a `Layer`. Every layer has momentum 0.99, epsilon 1e-5,
scale and bias, and gets its input in the layout it is made for: channels first for equinox,
channels last for all others. Its output has the input's dtype; parameters and statistics are
float32 wherever the library allows it (haiku has no choice, equinox would return float32).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from work import Case, Work, compiled, normal

MODES = ("forward", "forward_backward", "inference")


class Layer(NamedTuple):
    """Parameters and statistics, and the pure functions of them and the input."""

    params: Any
    state: Any
    train: Callable[..., Any]  # (params, state, x) -> (y, new state)
    infer: Callable[..., Any]  # (params, state, x) -> y
    module: Any = None  # where it is an object with a state, which is called outside jit


def linen(module: Any, x: jax.Array) -> Layer:
    variables = module.init(jax.random.key(0), x, use_running_average=False)

    def train(params, state, x):
        return module.apply(
            {"params": params, **state}, x, use_running_average=False, mutable=["batch_stats"]
        )

    def infer(params, state, x):
        return module.apply({"params": params, **state}, x, use_running_average=True)

    return Layer(variables["params"], {"batch_stats": variables["batch_stats"]}, train, infer)


def nnx(module: Any) -> Layer:
    from flax import nnx

    graph, params, state = nnx.split(module, nnx.Param, nnx.BatchStat)

    def train(params, state, x):
        copied = jax.tree.map(lambda leaf: leaf, state)  # variables made here may be updated here
        layer = nnx.merge(graph, params, copied)
        return layer(x, use_running_average=False), nnx.state(layer, nnx.BatchStat)

    def infer(params, state, x):
        return nnx.merge(graph, params, state)(x, use_running_average=True)

    return Layer(params, state, train, infer, module)


def _bnjax(x: jax.Array, **fields: Any) -> Layer:
    import bnjax.linen

    return linen(bnjax.linen.BatchNorm(dtype=x.dtype, **fields), x)


def _bnjax_nnx(x: jax.Array) -> Layer:
    import flax.nnx

    import bnjax.nnx

    return nnx(bnjax.nnx.BatchNorm(x.shape[-1], dtype=x.dtype, rngs=flax.nnx.Rngs(0)))


def _flax(x: jax.Array) -> Layer:
    import flax.linen

    return linen(flax.linen.BatchNorm(dtype=x.dtype), x)


def _flax_nnx(x: jax.Array) -> Layer:
    import flax.nnx

    return nnx(flax.nnx.BatchNorm(x.shape[-1], dtype=x.dtype, rngs=flax.nnx.Rngs(0)))


def _haiku(x: jax.Array) -> Layer:
    import haiku

    layer = haiku.transform_with_state(
        lambda x, is_training: haiku.BatchNorm(True, True, 0.99)(x, is_training)
    )
    params, state = layer.init(None, x, True)

    def train(params, state, x):
        return layer.apply(params, state, None, x, True)

    def infer(params, state, x):
        return layer.apply(params, state, None, x, False)[0]

    return Layer(params, state, train, infer)


def _equinox(x: jax.Array) -> Layer:
    import equinox

    module, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        x.shape[1], "batch", dtype=x.dtype, mode="batch"
    )
    params, rest = equinox.partition(module, equinox.is_inexact_array)

    def train(params, state, x):
        layer = jax.vmap(
            equinox.combine(params, rest),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )
        return layer(x, state)

    def infer(params, state, x):
        layer = equinox.nn.inference_mode(equinox.combine(params, rest))
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None))(x, state)[0]

    return Layer(params, state, train, infer)


def _keras(x: jax.Array) -> Layer:
    import keras

    dtype = x.dtype.name if x.dtype == jnp.float32 else f"mixed_{x.dtype.name}"
    layer = keras.layers.BatchNormalization(momentum=0.99, epsilon=1e-5, dtype=dtype)
    layer.build(x.shape)

    def train(params, state, x):
        return layer.stateless_call(params, state, x, training=True)

    def infer(params, state, x):
        return layer.stateless_call(params, state, x, training=False)[0]

    params = [v.value for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]
    return Layer(params, state, train, infer)


LAYERS: dict[str, Callable[[jax.Array], Layer]] = {
    "bnjax": _bnjax,
    "bnjax-batch": functools.partial(_bnjax, pivot="batch"),
    "bnjax-running": functools.partial(_bnjax, pivot="running"),
    "bnjax-policy": _bnjax,
    "bnjax-nnx": _bnjax_nnx,
    "flax": _flax,
    "flax-nnx": _flax_nnx,
    "haiku": _haiku,
    "equinox": _equinox,
    "keras": _keras,
}


def layer_work(library: str, case: Case) -> Work:
    """The layer, and the relu if the case has one, compiled for one mode."""
    x, dy = (_input(library, case, seed) for seed in (0, 1))
    layer = LAYERS[library](x)
    train, infer = _functions(library, layer, case["relu"])

    def forward_backward(params, state, x, dy):
        # y is an output as in a network, where the next layer reads it: were it none, XLA would
        # leave half of the forward pass out.
        y, pullback, state = jax.vjp(
            lambda params, x: train(params, state, x), params, x, has_aux=True
        )
        return y, pullback(dy), state

    function = {"forward": train, "forward_backward": forward_backward, "inference": infer}
    args = (layer.params, layer.state, x)
    if case["mode"] == "forward_backward":
        args += (dy,)
    program, figures = compiled(function[case["mode"]], *args)
    figures["input_bytes"] = x.nbytes
    if case["mode"] == "forward_backward":
        figures["residual_bytes"] = _residual_bytes(train, layer, x)
    return Work(lambda: program(*args), jax.block_until_ready, figures)


def eager_work(library: str, case: Case) -> Work:
    """One training call of the layer outside jit."""
    x = _input(library, case, 0)
    layer = LAYERS[library](x)
    call = layer.module or functools.partial(layer.train, layer.params, layer.state)
    return Work(lambda: call(x), jax.block_until_ready, {})


def _input(library: str, case: Case, seed: int) -> jax.Array:
    x = jnp.asarray(normal(tuple(case["shape"]), seed), case["dtype"])
    return jnp.moveaxis(x, -1, 1) if library == "equinox" else x


def _functions(library: str, layer: Layer, relu: bool) -> tuple[Callable, Callable]:
    """The layer's two functions with the relu after them, and the output in the input's dtype."""

    def activation(y, dtype):
        return jax.nn.relu(y.astype(dtype)) if relu else y.astype(dtype)

    def train(params, state, x):
        y, state = layer.train(params, state, x)
        return activation(y, x.dtype), state

    def infer(params, state, x):
        return activation(layer.infer(params, state, x), x.dtype)

    if library == "bnjax-policy":
        import bnjax

        train = jax.checkpoint(train, policy=bnjax.convs_and_dots_saveable)
    return train, infer


def _residual_bytes(train: Callable, layer: Layer, x: jax.Array) -> int:
    """What autodiff keeps between forward and backward, each array counted once."""

    def kept(params, state, x):
        _, pullback, _ = jax.vjp(lambda params, x: train(params, state, x), params, x, has_aux=True)
        return jax.tree.leaves(pullback)

    outputs = jax.make_jaxpr(kept)(layer.params, layer.state, x).jaxpr.outvars
    arrays = {v for v in outputs if isinstance(v, Var)}  # the others are constants
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in arrays)
