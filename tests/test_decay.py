"""What weight decay is for, and recipes for fine-tuning."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_refused
from flax import nnx
from flax.core import freeze, unfreeze

import bnjax
import bnjax.linen
import bnjax.nnx


class Network(nn.Module):
    """Its names and ranks mislead on purpose."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="BatchNorm_5")(x)
        x = bnjax.linen.BatchNorm(True, axis=(-2, -1), name="Dense_0")(x.reshape(-1, 2, 2))
        x = nn.BatchNorm(True, use_scale=False)(x)
        x = nn.LayerNorm()(x)
        return x * self.param("scale", nn.initializers.ones, (1, 1, 2))


def test_only_batch_norms_scales_and_biases_are_left_out():
    variables = Network().init(jax.random.key(0), jnp.ones((3, 4)))
    for wrap in (lambda tree: tree, freeze):
        params = wrap(variables["params"])
        mask = bnjax.decay_mask(params, wrap(variables["batch_stats"]))
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        assert unfreeze(mask) == {
            "BatchNorm_5": {"kernel": True, "bias": True},
            "Dense_0": {"scale": False, "bias": False},
            "BatchNorm_0": {"bias": False},
            "LayerNorm_0": {"scale": True, "bias": True},
            "scale": True,
        }
    layer = bnjax.linen.BatchNorm(True).init(jax.random.key(0), jnp.ones((3, 4)))
    assert bnjax.decay_mask(**layer) == {"scale": False, "bias": False}


def test_a_kernel_in_the_module_of_the_statistics_decays():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (4, 3))
            self.variable("batch_stats", "mean", jnp.zeros, 3)
            return x @ kernel

    variables = Own().init(jax.random.key(0), jnp.ones((3, 4)))
    assert bnjax.decay_mask(**variables) == {"kernel": True}


def test_whole_variables_are_refused():
    variables = Network().init(jax.random.key(0), jnp.ones((3, 4)))
    end = 'Give variables["params"] and variables["batch_stats"].'
    for name, args in {
        "params": (variables, variables["batch_stats"]),
        "batch_stats": (variables["params"], {"batch_stats": variables["batch_stats"]}),
    }.items():
        assert_refused(
            lambda args=args: bnjax.decay_mask(*args),
            f"{name} has an entry {name!r}, as the whole variables have. {end}",
        )


def after_decay(before, after):
    """Which leaves a step without gradients moved."""
    return jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)


def test_optax_decays_what_the_mask_says_in_linen():
    variables = Network().init(jax.random.key(0), jnp.ones((3, 4)))
    params = jax.tree.map(jnp.ones_like, variables["params"])
    mask = bnjax.decay_mask(params, variables["batch_stats"])
    optimizer = optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(0.1))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert after_decay(params, optax.apply_updates(params, updates)) == mask


def test_optax_decays_what_the_mask_says_in_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
    model.layers[0].bias[...] = jnp.ones(4)
    model.layers[1].bias[...] = jnp.ones(4)
    params = nnx.state(model, nnx.Param)
    mask = bnjax.decay_mask(params, nnx.state(model, nnx.BatchStat))
    assert nnx.to_pure_dict(mask) == {
        "layers": {0: {"bias": True, "kernel": True}, 1: {"bias": False, "scale": False}}
    }
    before = jax.tree.map(jnp.copy, params)
    transform = optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, params))
    moved = after_decay(before, nnx.state(model, nnx.Param))
    assert jax.tree.leaves(moved) == jax.tree.leaves(mask)


# Recipes for fine-tuning


X = 3 + np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for name in ("stem", "head"):
            x = nn.Dense(4)(x)
            x = bnjax.linen.BatchNorm(name=name)(x, use_running_average=not train)
        return x


def freeze_stem(call, args, kwargs, context):
    if context.module.path == ("stem",):
        kwargs["use_running_average"] = True
    return call(*args, **kwargs)


def test_some_statistics_are_frozen_by_path_in_linen():
    network = TwoLayers()
    variables = network.init(jax.random.key(0), X, False)

    def features(variables, train, **kwargs):
        return network.apply(variables, X, train, capture_intermediates=True, **kwargs)

    with nn.intercept_methods(freeze_stem):
        _, seen = features(variables, True, mutable=["batch_stats", "intermediates"])
    for name, is_frozen in (("stem", True), ("head", False)):
        stats = [v["batch_stats"][name] for v in (variables, seen)]
        assert after_decay(*stats) == dict.fromkeys(("mean", "var"), not is_frozen)
    _, evaluated = features(variables, False, mutable=["intermediates"])
    outputs = [s["intermediates"]["stem"]["__call__"][0] for s in (seen, evaluated)]
    np.testing.assert_array_equal(*outputs)


def two_layers():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        *(
            nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
            for _ in range(2)
        )
    )


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_some_statistics_or_all_are_frozen_in_nnx(frozen):
    model = two_layers()
    model.train()
    for i in frozen:
        model.layers[i].eval()
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    grads = nnx.grad(lambda model: jnp.mean((model(X) - 1) ** 2))(model)
    moved = nnx.to_pure_dict(after_decay(before, nnx.state(model, nnx.BatchStat)))
    assert {i for i in range(2) if not moved["layers"][i]["layers"][1]["mean"]} == {*frozen}
    # With its own batch's statistics a batch norm passes no gradient to the bias before it.
    bias = grads["layers"][1]["layers"][0]["bias"][...]
    assert (float(jnp.abs(bias).max()) > 1e-3) == (1 in frozen)


def test_scale_and_bias_are_frozen():
    model = two_layers()
    params = nnx.state(model, nnx.Param)
    before = jax.tree.map(jnp.copy, params)
    mask = bnjax.decay_mask(params, nnx.state(model, nnx.BatchStat))
    freezing = optax.multi_transform({True: optax.sgd(0.1), False: optax.set_to_zero()}, mask)
    optimizer = nnx.Optimizer(model, freezing, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    moved = after_decay(before, nnx.state(model, nnx.Param))
    assert jax.tree.leaves(moved) == jax.tree.leaves(mask)
    assert set(jax.tree.leaves(mask)) == {True, False}
