"""Whole training steps: loss, gradients, new running statistics, stochastic gradient descent."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import MODELS, Norm
from work import Case, Work, compiled, normal


def step_work(library: str, case: Case) -> Work:
    """One step of a model with the library's layer. Parameters are float32 in any case."""
    make, example, classes = MODELS[case["model"]]
    model = make(*norm_and_policy(library, case["dtype"]), jnp.dtype(case["dtype"]))
    optimizer = optax.sgd(0.1)
    images = jnp.asarray(normal((case["batch"], *example), 0))
    labels = jnp.arange(case["batch"]) % classes
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(_some_parameter, shapes["params"])
    stats = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes["batch_stats"])
    args = params, stats, optimizer.init(params), images, labels
    program, figures = compiled(training_step(model, optimizer), *args)
    return Work(lambda: program(*args), jax.block_until_ready, figures)


def training_step(
    model: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[jax.Array, Any, Any, Any]]:
    """(params, stats, state, images, labels) -> loss, and the new params, stats and state."""

    def step(params, stats, state, images, labels):
        def loss(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats}, images, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), updates["batch_stats"]

        (value, new_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return value, optax.apply_updates(params, updates), new_stats, state

    return step


def norm_and_policy(library: str, dtype: str) -> tuple[Norm, Any]:
    """The library's layer, and what its blocks are rematerialized with."""
    fields = {"use_running_average": False, "dtype": dtype}
    if library.startswith("flax"):
        fields["use_fast_variance"] = library == "flax"
        return functools.partial(nn.BatchNorm, **fields), None
    import bnjax.linen

    if library in ("bnjax-batch", "bnjax-running"):
        fields["pivot"] = library.removeprefix("bnjax-")
    policy = bnjax.convs_and_dots_saveable if library == "bnjax-policy" else None
    return functools.partial(bnjax.linen.BatchNorm, **fields), policy


def _some_parameter(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Any values do, as long as they are small: the model's own would take long to make."""
    return jnp.asarray(0.05 * np.random.default_rng(0).standard_normal(like.shape), like.dtype)
