"""Statistics at test time, and batches that would poison the running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

import bnjax

RUNNING = np.array([1.0, -2.0, 0.5], np.float32), np.array([2.0, 0.5, 1.0], np.float32)


def linen_eval(x, mask=None, **fields):
    layer = bnjax.linen.BatchNorm(
        use_running_average=True, use_scale=False, use_bias=False, **fields
    )
    stats = {"mean": RUNNING[0], "var": RUNNING[1]}
    y, updates = layer.apply({"batch_stats": stats}, x, mask=mask, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], stats)
    return y


def nnx_eval(x, mask=None, **fields):
    layer = bnjax.nnx.BatchNorm(
        3, use_running_average=True, use_scale=False, use_bias=False, rngs=nnx.Rngs(0), **fields
    )
    layer.mean[...], layer.var[...] = map(jnp.asarray, RUNNING)
    y = layer(x, mask=mask)
    if not isinstance(x, jax.core.Tracer):
        np.testing.assert_array_equal(layer.mean[...], RUNNING[0])
    return y


every_layer = pytest.mark.parametrize("layer", [linen_eval, nnx_eval])


def mixed(x, momentum, where=None):
    """Schneider et al. (2020), in NumPy: means and variances are averaged, each by itself."""
    m = reference.moments(x, where=where)
    mean, var = (
        momentum * old + (1 - momentum) * new for old, new in zip(RUNNING, m, strict=False)
    )
    return reference.normalize(x, mean, var)


def batch(ratio=0.0):
    x = np.random.default_rng(0).standard_normal((12, 3))
    return (x + ratio).astype(np.float32)


@every_layer
@pytest.mark.parametrize("momentum", [0.0, 0.25, 16 / (16 + 12)])
def test_evaluation_mixes_in_the_batch(layer, momentum):
    x = batch(ratio=3.0)
    where = np.arange(12)[:, None] < 7
    y = layer(x, eval_momentum=momentum)
    np.testing.assert_allclose(y, mixed(x, momentum), rtol=0, atol=2e-6)
    y = layer(x, where, eval_momentum=momentum)
    np.testing.assert_allclose(y, mixed(x, momentum, where), rtol=0, atol=2e-6)


@every_layer
@pytest.mark.parametrize("ratio", [1e2, 1e5])
def test_the_batch_alone_is_exact_at_large_means(layer, ratio):
    x = batch(ratio)
    y = jax.jit(lambda x: layer(x, eval_momentum=0.0))(x)
    np.testing.assert_allclose(y, reference.batch_norm(x), rtol=0, atol=2e-6)


def test_both_wings_agree_bit_for_bit():
    x = batch()
    for momentum in (0.0, 0.3):
        ours = linen_eval(x, eval_momentum=momentum), nnx_eval(x, eval_momentum=momentum)
        np.testing.assert_array_equal(*ours)


@every_layer
def test_one_is_the_program_without_it(layer):
    plain, given = (
        str(jax.make_jaxpr(lambda x, f=f: layer(x, **f))(batch()))
        for f in ({}, {"eval_momentum": 1})
    )
    assert plain == given
    assert "reduce_sum" not in plain
    assert "reduce_sum" in str(jax.make_jaxpr(lambda x: layer(x, eval_momentum=0.5))(batch()))


@every_layer
def test_replicas_share_what_they_see(layer):
    x = batch()
    f = jax.vmap(lambda x: layer(x, eval_momentum=0.25, axis_name="i"), axis_name="i")
    y = f(x.reshape(3, 4, 3)).reshape(12, 3)
    np.testing.assert_allclose(y, mixed(x, 0.25), rtol=0, atol=2e-6)
    layer(x, axis_name="i")  # with 1 no axis needs to be mapped
    with pytest.raises(NameError, match="axis_name is 'i', but no such axis is mapped here"):
        layer(x, eval_momentum=0.25, axis_name="i")


def test_each_layer_of_a_network_measures_what_mixed_layers_below_give():
    norm = bnjax.linen.BatchNorm(use_running_average=True, eval_momentum=0.5)
    network = nn.Sequential([norm, nn.relu, norm.clone()])
    x = batch(ratio=2.0)
    variables = network.init(jax.random.key(0), x)
    below = np.maximum(reference.normalize(x, *half(x)), 0)
    expected = reference.normalize(below, *half(below))
    np.testing.assert_allclose(network.apply(variables, x), expected, rtol=0, atol=2e-6)


def half(x):
    """Half of zeros and ones, half of this batch's."""
    m = reference.moments(x)
    return 0.5 * m.mean, 0.5 + 0.5 * m.var


def test_gradients_through_the_batchs_statistics():
    x, dy = batch(), batch(1.0)
    (dx,) = jax.vjp(lambda x: linen_eval(x, eval_momentum=0.0), jnp.asarray(x))[1](jnp.asarray(dy))
    np.testing.assert_allclose(dx, reference.gradient(x, dy).x, rtol=0, atol=1e-5)


def linen_train(x, **fields):
    layer = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.5, **fields)
    variables = layer.init(jax.random.key(0), batch())
    y, updates = layer.apply(variables, x, mutable=["batch_stats", "moments"])
    return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"], updates["moments"]


def nnx_train(x, **fields):
    layer = bnjax.nnx.BatchNorm(3, momentum=0.5, emit=True, rngs=nnx.Rngs(0), **fields)
    y = layer(x)
    m = nnx.pop(layer, bnjax.nnx.BatchMoments)
    return y, layer.mean[...], layer.var[...], m


@pytest.mark.parametrize("train", [linen_train, nnx_train])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_batch_does_no_harm(train, bad):
    x = batch()
    x[3, 1] = bad
    y, mean, var, moments = train(x, skip_nonfinite=True)
    np.testing.assert_allclose(mean, [0.5 * x[:, 0].mean(), 0, 0.5 * x[:, 2].mean()], atol=1e-6)
    assert var[1] == 1
    assert np.isfinite(var).all()
    counts = [m.count for m in jax.tree.leaves(moments, is_leaf=lambda m: hasattr(m, "count"))]
    np.testing.assert_array_equal(counts[0], [12, 0, 12])
    assert not np.isfinite(y[:, 1]).all()  # the output is what it is
    _, poisoned, _, _ = train(x)
    assert not np.isfinite(poisoned[1])


@pytest.mark.parametrize("train", [linen_train, nnx_train])
def test_a_good_batch_is_remembered_as_always(train):
    ours, plain = train(batch(), skip_nonfinite=True)[:3], train(batch())[:3]
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_a_bad_batch_among_whitened_features_leaves_all_of_them():
    x = batch()
    x[3, 1] = np.nan
    layer = bnjax.linen.DecorrelatedBatchNorm(use_running_average=False, skip_nonfinite=True)
    variables = layer.init(jax.random.key(0), batch())
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, updates["batch_stats"], dict(variables["batch_stats"])
    )
