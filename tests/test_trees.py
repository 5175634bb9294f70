"""Emitted moments, and what is done with trees of them: update, accumulate, merge replicas."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import optax
import pytest
import reference
from checks import assert_accurate, assert_refused
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from networks import NETWORKS, each_network
from samples import fresh, kernel

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import Moments


def batch(rows=24, seed=0, ratio=3):
    x = ratio + np.random.default_rng(seed).standard_normal((rows, 3))
    return jnp.asarray(x, jnp.float32)


def plain_layer(**fields):
    return bnjax.linen.BatchNorm(False, use_scale=False, use_bias=False, **fields)


# Emit


@pytest.mark.parametrize(
    "mutable", [["moments"], "moments", ("moments", "batch_stats"), {"moments"}]
)
def test_linen_emits_where_the_collection_is_named(mutable):
    x = batch()
    _, updates = plain_layer().apply({"batch_stats": fresh()}, x, mutable=mutable)
    assert set(updates) == ({mutable} if isinstance(mutable, str) else set(mutable))
    assert_accurate(updates["moments"]["moments"], reference.moments(x))
    if "batch_stats" in updates:
        np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.01 * x.mean(0), rtol=1e-5)


@pytest.mark.parametrize("mutable", [["batch_stats"], True, nn.DenyList("intermediates")])
def test_linen_emits_nothing_otherwise(mutable):
    """With `mutable=True` a state that a scan carries must keep flax's structure."""
    _, updates = plain_layer().apply({"batch_stats": fresh()}, batch(), mutable=mutable)
    assert set(updates) == {"batch_stats"}
    assert set(plain_layer().init(jax.random.key(0), batch())) == {"batch_stats"}


def test_linen_does_not_emit_in_evaluation():
    layer = plain_layer().clone(use_running_average=True)
    _, updates = layer.apply({"batch_stats": fresh()}, batch(), mutable=["moments"])
    assert not updates.get("moments")


def test_linen_emits_in_a_model_that_trains_where_its_statistics_are_mutable():
    """What the guide says: named together the collections always work, the moments alone not."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            evaluates = not self.is_mutable_collection("batch_stats")
            return bnjax.linen.BatchNorm(evaluates, use_scale=False, use_bias=False)(x)

    variables, x = {"batch_stats": {"BatchNorm_0": fresh()}}, batch()
    assert "moments" not in Model().apply(variables, x, mutable=["moments"])[1]
    _, updates = Model().apply(variables, x, mutable=["moments", "batch_stats"])
    assert_accurate(updates["moments"]["BatchNorm_0"]["moments"], reference.moments(x))


def test_a_second_call_merges_in_linen():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            layer = plain_layer()
            return layer(a), layer(b)

    a, b = batch(5), batch(19, seed=1)
    stats = {"BatchNorm_0": fresh()}
    _, updates = Twice().apply({"batch_stats": stats}, a, b, mutable=["moments"])
    assert_accurate(updates["moments"]["BatchNorm_0"]["moments"], reference.merge([a, b]))
    # A collection that is given takes part, too.
    _, again = Twice().apply({"batch_stats": stats} | updates, a, b, mutable=["moments"])
    assert_accurate(again["moments"]["BatchNorm_0"]["moments"], reference.merge([a, b, a, b]))


@pytest.mark.parametrize("emit", [True, "only"])
@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit, nnx.remat], ids=["", "jit", "remat"])
def test_nnx_emits_where_the_attribute_says_so(emit, transform):
    layer = bnjax.nnx.BatchNorm(3, emit=emit, rngs=nnx.Rngs(0))
    a, b = batch(5), batch(19, seed=1)
    call = transform(lambda layer, x: layer(x))
    call(layer, a)
    assert_accurate(Moments(*layer.moments[:]), reference.moments(a))
    assert (layer.mean[...] == 0).all() == (emit == "only")
    call(layer, b)
    popped = nnx.pop(layer, bnjax.nnx.BatchMoments)
    assert_accurate(Moments(*popped["moments"][:]), reference.merge([a, b]))
    assert not hasattr(layer, "moments")
    layer.eval()
    call(layer, a)
    assert not hasattr(layer, "moments")


def test_nnx_emits_in_a_view():
    layer = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    if not hasattr(nnx, "view"):
        pytest.skip("this Flax has no nnx.view")
    view = nnx.view(layer, emit="only")
    view(batch())
    assert_accurate(Moments(*view.moments[:]), reference.moments(batch()))
    assert (layer.mean[...] == 0).all()
    assert not layer.emit


def test_nnx_emits_stacked_moments_under_vmap_and_scan():
    keys = jax.random.split(jax.random.key(0), 2)
    layers = nnx.vmap(lambda key: bnjax.nnx.BatchNorm(3, emit=True, rngs=nnx.Rngs(key)))(keys)
    x = jnp.stack([batch(), batch(seed=1)])
    nnx.vmap(lambda layer, x: layer(x))(layers, x)
    m = nnx.pop(layers, bnjax.nnx.BatchMoments)["moments"]
    for i in range(2):
        assert_accurate(Moments(*(p[i] for p in m[:])), reference.moments(x[i]))
    nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x[0], layers)
    m = nnx.pop(layers, bnjax.nnx.BatchMoments)["moments"]
    assert_accurate(Moments(*(p[0] for p in m[:])), reference.moments(x[0]))
    np.testing.assert_allclose(m[1][1], 1, rtol=1e-4)  # the second layer sees normalized values


def test_linen_emits_in_a_rematerialized_block():
    block = nn.remat(bnjax.linen.BatchNorm, policy=bnjax.convs_and_dots_saveable)(False)
    x = batch()
    variables = {"params": {"scale": jnp.ones(3), "bias": jnp.ones(3)}, "batch_stats": fresh()}

    def loss(variables):
        y, updates = block.apply(variables, x, mutable=["moments"])
        return jnp.sum(y**3), updates["moments"]["moments"]

    _, m = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert_accurate(m, reference.moments(x))


def test_gradients_flow_through_emitted_moments():
    x = batch()

    def variance(x):
        _, updates = plain_layer().apply({"batch_stats": fresh()}, x, mutable=["moments"])
        return jnp.sum(updates["moments"]["moments"].var)

    x = np.asarray(x)
    expected = 2 * (x - x.mean(0)) / len(x)
    np.testing.assert_allclose(jax.grad(variance)(jnp.asarray(x)), expected, atol=1e-6)


# Update


@each_network
@pytest.mark.parametrize(
    "how", [{}, {"momentum": 0.9, "ddof": 1}, {"debias": True}, {"momentum": None}], ids=str
)
def test_updating_with_what_was_emitted_is_training(network, how):
    """Bit for bit, over three steps."""
    net = network(**how, pivot="batch")  # others look at the statistics, which here differ
    trained = updated = net.stats
    update = functools.partial(bnjax.update_stats, **({"momentum": 0.99} | how))
    for seed in range(3):
        x = batch(seed=seed)
        trained, updated = net.train(trained, x), update(updated, net.measure(x))
    chex.assert_trees_all_equal(trained, updated)
    chex.assert_trees_all_equal_shapes_and_dtypes(updated, net.stats)
    for layer in net.layers(updated):
        assert set(layer) == {"mean", "var"} | (
            {"steps"} if how.get("momentum", 0) is None else set(layer)
        )
        assert layer.get("steps", 3) == 3


def test_a_wholly_masked_batch_changes_nothing_and_counts_no_step():
    stats = fresh() | {"steps": jnp.int32(4)}
    m = bnjax.moments(jnp.full((4, 3), jnp.nan), where=jnp.zeros((4, 1), bool))
    updated = bnjax.update_stats(stats, m, momentum=0.9, debias=True)
    chex.assert_trees_all_equal(updated, stats)


def test_layers_without_moments_stay_and_keep_their_extra_leaves():
    stats = {"a": fresh(), "b": fresh() | {"steps": jnp.int32(2)}}
    m = {"a": {"moments": bnjax.moments(batch())}}
    updated = bnjax.update_stats(stats, m, momentum=0.5)
    assert updated["b"] is not stats["b"]
    chex.assert_trees_all_equal(updated["b"], stats["b"])
    np.testing.assert_allclose(updated["a"]["mean"], 0.5 * batch().mean(0), rtol=1e-6)


def test_moments_of_an_unknown_layer():
    m = {"c": {"moments": bnjax.moments(batch())}}
    with pytest.raises(ValueError, match=r"^") as error:
        bnjax.update_stats({"a": fresh(), "b": {"norm": fresh()}}, m, momentum=0.5)
    assert str(error.value) == (
        "moments holds the layer c, but batch_stats has statistics only of a, b/norm. "
        "Take both from one network."
    )


def test_moments_of_another_kind():
    m = {"a": {"moments": bnjax.cov_moments(batch())}}
    assert_refused(
        lambda: bnjax.update_stats({"a": fresh()}, m, momentum=0.5),
        "moments has a CovMoments for the layer a, but batch_stats has mean, var of it. "
        "Take both from one network.",
    )


def test_statistics_for_moments():
    assert_refused(
        lambda: bnjax.update_stats({"a": fresh()}, {"a": fresh()}, momentum=0.5),
        "moments holds an array at a/mean, but what layers emit are Moments. "
        "Give linen's collection alone, updates['moments'], or what "
        "nnx.pop(model, bnjax.nnx.BatchMoments) returns.",
    )


@pytest.mark.parametrize("measure", [bnjax.moments, bnjax.cov_moments])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: [m, m], lambda m: {"norm": m}])
def test_nothing_stacked(measure, wrap):
    m = measure(batch())
    assert_refused(
        lambda: bnjax.merge_stacked(wrap(m)),
        f"The count is one number, so this {type(m).__name__} is of one batch and nothing is "
        "stacked. Stack many as lax.scan and jax.vmap do; a list of them merges by "
        "functools.reduce(bnjax.merge, moments).",
    )


@pytest.mark.parametrize("leaves", [("kernel", "bias"), ("mean",), ("mean", "power")])
def test_layers_that_are_no_statistics(leaves):
    assert_refused(
        lambda: bnjax.merge_stacked({"layer": dict.fromkeys(leaves, jnp.ones((2, 3)))}),
        f"A layer has {', '.join(sorted(leaves))}, but running statistics are mean and one of "
        "var, cov. Give batch_stats alone.",
    )


@pytest.mark.parametrize("name", [None, "norm"])
@pytest.mark.parametrize("function", ["update_stats", "drift", "recalibrate"])
def test_running_statistics_that_are_moments(function, name):
    m = bnjax.moments(batch())
    moments = {"norm": {"moments": m}}
    stats = m if name is None else {name: m}
    calls = {
        "update_stats": lambda: bnjax.update_stats(stats, moments, momentum=0.5),
        "drift": lambda: bnjax.drift(stats, moments),
        "recalibrate": lambda: bnjax.recalibrate(lambda m: m, stats, [moments]),
    }
    assert_refused(
        calls[function],
        "batch_stats holds a Moments, but running statistics are {'mean': ..., 'var': ...} of "
        "each layer, as linen's batch_stats and nnx.state(model, nnx.BatchStat) hold them. For "
        "one Moments use bnjax.ema.",
    )


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_layers_that_flax_stacked(lift):
    """Statistics `[layers, features]`, counts `[layers]` and steps `[layers]`."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.Dense(3, kernel_init=kernel)(x)
            return bnjax.linen.BatchNorm(False, momentum=None, ddof=1)(x), None

    axes = {"params": 0, "batch_stats": 0, "moments": 0}
    if lift == "scan":
        stack = nn.scan(Layer, axes, split_rngs={"params": True}, length=2)()
        x = batch()
    else:
        stack = nn.vmap(Layer, variable_axes=axes, split_rngs={"params": True}, in_axes=(0, None))()
        x = jnp.stack([batch(), batch(seed=1)])
    variables = jax.jit(stack.init)(jax.random.key(0), x, None)
    stats = variables["batch_stats"]
    apply = jax.jit(functools.partial(stack.apply, mutable=["moments", "batch_stats"]))
    _, updates = apply(variables, x, None)
    m = updates["moments"]
    updated = bnjax.update_stats(stats, m, momentum=None, ddof=1)
    chex.assert_trees_all_close(updated, updates["batch_stats"], rtol=1e-6)
    exact = bnjax.recalibrate(lambda x: m, stats, [x, x])
    np.testing.assert_allclose(
        exact["BatchNorm_0"]["var"], m["BatchNorm_0"]["moments"].var, rtol=1e-6
    )
    twice = bnjax.merge_stacked(jax.tree.map(lambda a: jnp.stack([a, a]), m))
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a, twice)["BatchNorm_0"]["moments"].var,
        m["BatchNorm_0"]["moments"].var,
        rtol=1e-6,
    )
    np.testing.assert_array_equal(twice["BatchNorm_0"]["moments"].count, [48, 48])


# Accumulate


@each_network
def test_microbatches_in_a_scan_are_the_whole_batch(network):
    """Of the first layer, which sees the same inputs; the second one's differ by its upstream."""
    net = network(momentum=0.9)
    x = batch(32)

    @jax.jit
    def accumulate(stats, x):
        _, m = jax.lax.scan(lambda _, x: (None, net.measure(x)), None, x)
        return bnjax.update_stats(stats, bnjax.merge_stacked(m), momentum=0.9)

    ours, _ = net.layers(accumulate(net.stats, x.reshape(4, 8, 3)))
    whole, _ = net.layers(net.train(net.stats, x))
    for name in ("mean", "var"):
        np.testing.assert_allclose(ours[name], whole[name], rtol=2e-6)


def test_microbatches_with_optax_multi_steps():
    """Parameters move once in four microbatches, and so do the statistics."""
    net = NETWORKS["linen"](momentum=0.9)
    x = batch(32).reshape(4, 8, 3)
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)

    def loss(params, x):
        variables = {"params": params, "batch_stats": net.stats}
        y, updates = net.network.apply(variables, x, mutable=["moments"])
        return jnp.mean(y**3), updates["moments"]

    def micro(carry, x):
        params, state, total = carry
        grads, m = jax.grad(loss, has_aux=True)(params, x)
        updates, state = optimizer.update(grads, state, params)
        is_moments = functools.partial(lambda node: isinstance(node, Moments))
        total = jax.tree.map(bnjax.merge, total, m, is_leaf=is_moments)
        return (optax.apply_updates(params, updates), state, total), None

    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(net.measure, x[0]))
    carry = net.params, optimizer.init(net.params), nothing
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps promotes its counters
        (params, _, total), _ = jax.jit(lambda c, x: jax.lax.scan(micro, c, x))(carry, x)
    stats = bnjax.update_stats(net.stats, total, momentum=0.9)
    whole = net.train(net.stats, x.reshape(32, 3))["BatchNorm_0"]
    np.testing.assert_allclose(stats["BatchNorm_0"]["var"], whole["var"], rtol=2e-6)
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], whole["mean"], rtol=2e-6)
    assert not np.allclose(params["Dense_1"]["kernel"], net.params["Dense_1"]["kernel"])


# Merge replicas


@pytest.mark.parametrize("ratio", [0, 1e4])
def test_merging_what_is_stacked_is_the_whole(ratio):
    x = np.stack([batch(8, seed, ratio) for seed in range(5)])
    where = np.random.default_rng(0).random((5, 8, 1)) < 0.5
    where[2] = False
    m = jax.vmap(lambda x, where: bnjax.moments(x, where=where))(x, where)
    merged = jax.jit(bnjax.merge_stacked)(m)
    assert_accurate(merged, reference.moments(x.reshape(40, 3), where=where.reshape(40, 1)))
    tree = bnjax.merge_stacked({"a": {"moments": m}})
    chex.assert_trees_all_close(tree["a"]["moments"], merged, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("api", ["pmap", "shard_map"])
def test_unsynchronized_statistics_keep_the_variance_between_replicas(api):
    """Replicas with means of their own; an average of their variances would forget them."""
    offsets = 5.0 * np.arange(8)
    x = np.stack([batch(16, seed, ratio=offsets[seed]) for seed in range(8)])
    layer = plain_layer(momentum=0.0)

    def train(x):
        return layer.apply({"batch_stats": fresh()}, x, mutable=["batch_stats"])[1]["batch_stats"]

    if api == "pmap":
        replicas = jax.pmap(train)(x)
    else:
        mesh = Mesh(np.array(jax.devices()), (layouts.AXIS,))
        each = jax.shard_map(
            lambda x: jax.tree.map(lambda a: a[None], train(x[0])),
            mesh=mesh,
            in_specs=P(layouts.AXIS),
            out_specs=P(layouts.AXIS),
        )
        replicas = jax.jit(each)(x)
    stats = bnjax.merge_stacked({"norm": replicas})["norm"]
    whole = reference.moments(x.reshape(-1, 3))
    np.testing.assert_allclose(stats["mean"], whole.mean.astype(float), rtol=2e-6)
    np.testing.assert_allclose(stats["var"], whole.var.astype(float), rtol=2e-6)
    assert (replicas["var"].mean(0) < 0.1 * stats["var"]).all()


def test_merged_statistics_keep_dtypes_and_steps():
    stats = {
        "mean": jnp.ones((4, 3), jnp.bfloat16),
        "var": jnp.ones((4, 3), jnp.bfloat16),
        "steps": jnp.array([7, 3, 7, 5], jnp.int32),  # of replicas that saw fewer batches
    }
    merged = bnjax.merge_stacked(stats)
    chex.assert_trees_all_equal(merged, jax.tree.map(lambda a: a[0], stats))
    chex.assert_trees_all_equal_dtypes(merged, stats)
