"""What is compiled: a program, and the shapes of its arguments. No array is made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from models import MODELS
from steps import norm_and_policy, training_step
from work import Case


class Program(NamedTuple):
    """A function and its arguments' shapes.

    Attributes:
      donated: positions of arguments whose memory the outputs may take.
      elements: arrays of so many or more are what the work is about; smaller ones are tiny.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...]
    elements: int


def program(library: str, case: Case) -> Program:
    return (_layer if case["kind"] == "layer" else _step)(library, case)


def _layer(library: str, case: Case) -> Program:
    """Training forward and backward; dy comes after y, as in a network."""
    norm, _ = norm_and_policy(library, case["dtype"])
    module = norm()
    x = jax.ShapeDtypeStruct(case["shape"], case["dtype"])
    variables = jax.eval_shape(module.init, jax.random.key(0), x)

    def step(params, stats, x, dy):
        def train(params, x):
            variables = {"params": params, "batch_stats": stats}
            return module.apply(variables, x, mutable=["batch_stats"])

        y, pullback, updates = jax.vjp(train, params, x, has_aux=True)
        y, dy = lax.optimization_barrier((y, dy))
        return y, updates, pullback(dy)

    args = variables["params"], variables["batch_stats"], x, x
    return Program(step, args, (), x.size)


def _step(library: str, case: Case) -> Program:
    """A training step with momentum, which takes the memory of what it is given."""
    make, example, _ = MODELS[case["model"]]
    dtype = jnp.dtype(case["dtype"])
    model = make(*norm_and_policy(library, case["dtype"]), dtype)
    optimizer = optax.sgd(0.1, momentum=0.9)
    images = jax.ShapeDtypeStruct((case["batch"], *example), dtype)
    labels = jax.ShapeDtypeStruct((case["batch"],), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    params, stats = variables["params"], variables["batch_stats"]
    state = jax.eval_shape(optimizer.init, params)
    args = params, stats, state, images, labels
    return Program(training_step(model, optimizer), args, (0, 1, 2), case["elements"])


def compile_for(sharding: Any, program: Program, options: dict[str, Any] | None = None) -> Any:
    """The program compiled for where the sharding places its arguments."""

    def place(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    args = jax.tree.map(place, program.args)
    jitted = jax.jit(program.function, donate_argnums=program.donated)
    return jitted.lower(*args).compile(options)
