"""Two layers of batch normalization in a small network, in linen and in NNX, with one interface."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from samples import kernel

import bnjax
import bnjax.linen
import bnjax.nnx


class LinenNetwork(nn.Module):
    """Dense, batch norm, relu, dense, batch norm."""

    fields: dict

    @nn.compact
    def __call__(self, x, train=True, mask=None):
        for _ in range(2):
            x = nn.Dense(4, kernel_init=kernel)(nn.relu(x))
            x = bnjax.linen.BatchNorm(not train, **self.fields)(x, mask=mask)
        return x


class NNXNetwork(nnx.Module):
    """The same."""

    def __init__(self, fields):
        rngs = nnx.Rngs(0)
        linear = functools.partial(nnx.Linear, kernel_init=kernel, rngs=rngs)
        self.dense = nnx.List([linear(3, 4), linear(4, 4)])
        self.norm = nnx.List([bnjax.nnx.BatchNorm(4, rngs=rngs, **fields) for _ in range(2)])

    def __call__(self, x, mask=None):
        for dense, norm in zip(self.dense, self.norm, strict=True):
            x = norm(dense(nnx.relu(x)), mask=mask)
        return x


class Linen:
    """`stats`; `measure(x)` gives moments, `train(stats, x)` new statistics; `inputs` of layers."""

    def __init__(self, **fields):
        self.network = LinenNetwork(fields)
        variables = jax.jit(self.network.init)(jax.random.key(0), jnp.ones((2, 3)))
        self.params, self.stats = variables["params"], variables["batch_stats"]

    def measure(self, x, mask=None):
        variables = {"params": self.params, "batch_stats": self.stats}
        _, updates = self.network.apply(variables, x, mask=mask, mutable=["moments"])
        return updates["moments"]

    def train(self, stats, x):
        variables = {"params": self.params, "batch_stats": stats}
        return self.network.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    @staticmethod
    def layers(stats):
        return [stats["BatchNorm_0"], stats["BatchNorm_1"]]


class NNX:
    """The same interface."""

    def __init__(self, **fields):
        self.graph, self.stats, self.rest = nnx.split(NNXNetwork(fields), nnx.BatchStat, ...)

    def model(self, stats):
        # Merging shares the variables; a copy keeps this one's.
        return nnx.merge(self.graph, jax.tree.map(lambda a: a, stats), self.rest)

    def measure(self, x, mask=None):
        model = self.model(self.stats)
        model.set_attributes(emit="only")
        model(x, mask)
        return nnx.pop(model, bnjax.nnx.BatchMoments)

    def train(self, stats, x):
        model = self.model(stats)
        model(x)
        return nnx.state(model, nnx.BatchStat)

    @staticmethod
    def layers(stats):
        pure = nnx.to_pure_dict(stats)["norm"]
        return [pure[0], pure[1]]


NETWORKS = {"linen": Linen, "nnx": NNX}
each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
