"""Whole training steps: loss, gradients, new running statistics, stochastic gradient descent."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from models import MODELS, Norm
from work import Case, Work, compiled, normal


def step_work(library: str, case: Case) -> Work:
    """One step of a model with the library's layer. Parameters are float32 in any case."""
    make, example, classes = MODELS[case["model"]]
    model = make(*_norm_and_policy(library, case["dtype"]), jnp.dtype(case["dtype"]))
    images = jnp.asarray(normal((case["batch"], *example), 0))
    labels = jnp.arange(case["batch"]) % classes
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(_some_parameter, shapes["params"])
    stats = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes["batch_stats"])

    def step(params, stats, images, labels):
        def loss(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats}, images, mutable=["batch_stats"]
            )
            likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            return -jnp.mean(likelihood), updates["batch_stats"]

        (value, new_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), new_stats

    args = params, stats, images, labels
    program, figures = compiled(step, *args)
    return Work(lambda: program(*args), jax.block_until_ready, figures)


def _norm_and_policy(library: str, dtype: str) -> tuple[Norm, Any]:
    fields = {"use_running_average": False, "dtype": dtype}
    if library == "flax":
        import flax.linen

        return functools.partial(flax.linen.BatchNorm, **fields), None
    import bnjax.linen

    if library == "bnjax-running":
        fields["pivot"] = "running"
    policy = bnjax.convs_and_dots_saveable if library == "bnjax-policy" else None
    return functools.partial(bnjax.linen.BatchNorm, **fields), policy


def _some_parameter(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Any values do, as long as they are small: the model's own would take long to make."""
    return jnp.asarray(0.05 * np.random.default_rng(0).standard_normal(like.shape), like.dtype)
