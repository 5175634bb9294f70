"""Training steps compiled for many devices, and what these say to each other in the program."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import layouts
import numpy as np
from hlo import split_branches
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax


def count_collectives(compiled):
    """How often each collective stands in what the compiled program always runs."""
    text, _ = split_branches(compiled.as_text())
    names = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")
    return {
        name: len(found)
        for name in names
        if (found := re.findall(rf"= [^=]*\b{name}(?:-start)?\(", text))
    }


def reduced_numbers(compiled):
    """How many numbers each device puts into all-reduces."""
    shapes = re.findall(r"= \(?([^=]*?)\)? all-reduce(?:-start)?\(", compiled.as_text())
    sizes = re.findall(r"\w+\[([\d,]*)\]", " ".join(shapes))
    return sum(int(np.prod([int(n) for n in size.split(",") if n])) for size in sizes)


class Chain(nn.Module):
    """Dense layers, each with batch normalization."""

    layers: int
    pivot: str = "batch"
    axis_name: str | None = None
    saving: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, policy=bnjax.convs_and_dots_saveable) if self.saving else Block
        for _ in range(self.layers):
            x = block(self.pivot, self.axis_name)(x)
        return x


class Block(nn.Module):
    pivot: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(x.shape[-1], use_bias=False)(x)
        norm = bnjax.linen.BatchNorm(False, pivot=self.pivot, axis_name=self.axis_name)
        return nn.relu(norm(x))


def training_step(network, forward_only=False):
    def step(variables, x):
        def loss(params):
            variables_now = {"params": params, "batch_stats": variables["batch_stats"]}
            y, updates = network.apply(variables_now, x, mutable=["batch_stats"])
            return jnp.sum(y**2), updates

        if forward_only:
            return loss(variables["params"])
        return jax.grad(loss, has_aux=True)(variables["params"])

    return step


def mesh_of(devices):
    return Mesh(np.array(devices), (layouts.AXIS,))


def compile_sharded(network, mesh, forward_only=False):
    """The step of `network`, compiled for a batch sharded over the mesh."""
    x = jnp.ones((2 * mesh.size, 4))
    variables = jax.eval_shape(network.clone(axis_name=None).init, jax.random.key(0), x)
    step = training_step(network, forward_only)
    if network.axis_name is not None:
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(layouts.AXIS)), out_specs=P(), check_vma=False
        )
    sharding = NamedSharding(mesh, P(layouts.AXIS)), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding[0])
    variables = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding[1]), variables
    )
    return jax.jit(step).lower(variables, x).compile()
