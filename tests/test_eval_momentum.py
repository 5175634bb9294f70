"""Statistics at test time, and batches that would poison the running statistics."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import reference
from checks import assert_refused, assert_same_bits
from flax import nnx
from samples import RATIOS, fresh

import bnjax

RUNNING = np.array([1.0, -2.0, 0.5], np.float32), np.array([2.0, 0.5, 1.0], np.float32)


def linen_eval(x, mask=None, running=RUNNING, **fields):
    layer = bnjax.linen.BatchNorm(
        use_running_average=True, use_scale=False, use_bias=False, **fields
    )
    stats = dict(zip(("mean", "var"), running, strict=True))
    y, updates = layer.apply({"batch_stats": stats}, x, mask=mask, mutable=["batch_stats"])
    kept = updates["batch_stats"]
    assert kept.keys() == stats.keys()
    assert all(kept[name] is stats[name] for name in stats)  # of tracers, too
    return y


def nnx_eval(x, mask=None, running=RUNNING, **fields):
    layer = bnjax.nnx.BatchNorm(
        3, use_running_average=True, use_scale=False, use_bias=False, rngs=nnx.Rngs(0), **fields
    )
    layer.mean, layer.var = (nnx.BatchStat(jnp.asarray(p)) for p in running)
    y = layer(x, mask=mask)
    if not isinstance(x, jax.core.Tracer):
        jax.tree.map(np.testing.assert_array_equal, (layer.mean[...], layer.var[...]), running)
    return y


every_layer = pytest.mark.parametrize("layer", [linen_eval, nnx_eval])


def mixed(x, momentum, where=None, running=RUNNING):
    """Schneider et al. (2020), in NumPy: means and variances are averaged, each by itself."""
    m = reference.moments(x, where=where)
    share = reference.wide(momentum)
    mean, var = (
        share * reference.wide(old) + (1 - share) * new
        for old, new in zip(running, m, strict=False)
    )
    return reference.normalize(x, mean, var)


def batch(ratio=0.0):
    x = np.random.default_rng(0).standard_normal((12, 3))
    return (x + ratio).astype(np.float32)


@functools.partial(jax.jit, static_argnames="layer")
def evaluated(x, where, running, momentum, layer):
    return layer(x, where, running, eval_momentum=momentum)


@every_layer
@pytest.mark.parametrize("momentum", [0.0, 0.25, 16 / (16 + 12)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_evaluation_mixes_in_the_batch(layer, momentum, ratio):
    x, running = batch(ratio), (np.float32(ratio) + RUNNING[0], RUNNING[1])
    for where in None, np.arange(12)[:, None] < 7:
        expected = mixed(x, momentum, where, running)
        y = evaluated(x, where, running, np.float32(momentum), layer)
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)


@every_layer
def test_what_is_remembered_may_be_far_off(layer):
    x = batch(1e6)
    y = jax.jit(lambda x: layer(x, eval_momentum=0.0))(x)
    np.testing.assert_allclose(y, reference.batch_norm(x), rtol=0, atol=2e-6)
    y = jax.jit(lambda x: layer(x, eval_momentum=0.5))(x)
    np.testing.assert_allclose(y, mixed(x, 0.5).astype(float), rtol=1e-6)


@every_layer
@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16])
def test_nothing_of_the_batch_is_rounded_to_what_is_remembered(layer, kept):
    """As in training, where state of fewer bits, or a real one, takes nothing from the output."""
    running = jnp.full(3, 3, kept), jnp.ones(3, kept)
    x = batch(3.0) + 1j * batch(-2.0)[::-1]
    np.testing.assert_allclose(
        layer(x, running=running, eval_momentum=0.0), reference.batch_norm(x), rtol=0, atol=2e-6
    )
    with jax.enable_x64():
        x = batch(3.0) + np.random.default_rng(1).standard_normal((12, 3))
        y = layer(x, running=running, eval_momentum=0.0)
    np.testing.assert_allclose(y, reference.batch_norm(x).astype(float), rtol=0, atol=1e-14)


@every_layer
def test_what_the_mask_leaves_without_values_keeps_what_is_remembered(layer):
    x, where = batch(), np.ones((12, 3), bool)
    where[:, 1] = False
    expected = mixed(x, 0.25, where).astype(float)
    expected[:, 1] = mixed(x, 1.0)[:, 1]
    y = layer(x, where, eval_momentum=0.25)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)


@every_layer
def test_a_share_that_is_none_is_refused(layer):
    cure = "Choose a number from 0 to 1."
    for bad in (-0.1, 1.5, float("nan")):
        assert_refused(
            lambda bad=bad: layer(batch(), eval_momentum=bad),
            f"eval_momentum is {bad}, but it is the share of the running statistics that is kept. "
            + cure,
        )
    assert_refused(
        lambda: layer(batch(), eval_momentum=None),
        f"eval_momentum is None, but it is one number for all features. {cure}",
    )
    assert_refused(
        lambda: layer(batch(), eval_momentum=np.ones(3)),
        f"eval_momentum has shape (3,), but it is one number for all features. {cure}",
    )


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


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        ("vmap", "one replica masked"),
        ("shard_map", "mask per feature"),
        ("jit, automatic", "no mask"),
        ("jit, explicit", "one replica masked"),
    ],
)
def test_the_batch_alone_is_training_without_its_state(layout, case):
    """Where replicas are mapped and where XLA cuts, gradients included; nothing is written.

    The batch norm's own tests have every mask in every layout.
    """
    x, dy, scale, bias = layouts.batch(ratio=1e2)
    where = layouts.cases()[case]

    def apply(x, scale, bias, where, axis_name):
        layer = bnjax.linen.BatchNorm(
            use_running_average=True, eval_momentum=0.0, axis_name=axis_name
        )
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": fresh(6)}
        y = layer.apply(variables, x, mask=where)
        return y, bnjax.moments(x, where=where, axis_name=axis_name)

    result = layouts.LAYOUTS[layout](x, dy, where, scale, bias, apply=apply)
    layouts.assert_is_whole_batch(result, x, dy, where, scale, bias)


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


def test_nnx_sets_it_on_a_model():
    """And takes it back; under `nnx.jit`, too."""
    rngs = nnx.Rngs(0)
    norms = [bnjax.nnx.BatchNorm(3, rngs=rngs) for _ in range(2)]
    model = nnx.Sequential(norms[0], nnx.relu, norms[1])
    model.eval()
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    call = nnx.jit(lambda model, x: model(x))
    x = batch(ratio=2.0)
    below = np.maximum(reference.normalize(x, *half(x)), 0)
    plain = call(model, x)
    model.set_attributes(eval_momentum=0.5)
    expected = reference.normalize(below, *half(below))
    np.testing.assert_allclose(call(model, x), expected, rtol=0, atol=2e-6)
    assert_same_bits(nnx.state(model, nnx.BatchStat), before)
    model.set_attributes(eval_momentum=1.0)
    assert_same_bits(call(model, x), plain)


OTHERS = {
    "whitened": (bnjax.linen.DecorrelatedBatchNorm, bnjax.nnx.DecorrelatedBatchNorm, {}),
    "renorm": (bnjax.linen.BatchRenorm, bnjax.nnx.BatchRenorm, {}),
    "ghosts": (bnjax.linen.BatchNorm, bnjax.nnx.BatchNorm, {"ghost_batch_size": 4}),
    "plain average": (bnjax.linen.BatchNorm, bnjax.nnx.BatchNorm, {"momentum": None, "ddof": 1}),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_every_kind_of_layer_has_it(kind, momentum):
    """A field of both bases: what is mixed is the statistic that the kind remembers."""
    of_linen, of_nnx, fields = OTHERS[kind]
    fields = fields | {"eval_momentum": momentum, "use_running_average": True}
    x = batch(3.0)
    y = of_linen(**fields).apply({"batch_stats": start(kind), "params": AFFINE}, x)
    assert_same_bits(y, of_nnx(3, rngs=nnx.Rngs(0), **fields)(x))
    if kind == "whitened":
        m = bnjax.ema(bnjax.CovMoments.initial(3), bnjax.cov_moments(x), momentum=momentum)
        expected = np.linalg.inv(np.linalg.cholesky(np.asarray(m.cov[0]) + 1e-5 * np.eye(3)))
        expected = (x - np.asarray(m.mean, float)) @ expected.T
    else:
        expected = mixed(x, momentum, running=(np.zeros(3), np.ones(3)))
    np.testing.assert_allclose(y, expected.astype(float), rtol=0, atol=5e-6)


AFFINE = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}


def start(kind):
    if kind == "whitened":
        return {"mean": jnp.zeros(3), "cov": jnp.eye(3)[None]}
    return fresh()


def half(x):
    """Half of zeros and ones, half of this batch's."""
    m = reference.moments(x)
    return 0.5 * m.mean, 0.5 + 0.5 * m.var


def test_gradients_through_the_batchs_statistics():
    x, dy = batch(), batch(1.0)

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.vdot(dy, linen_eval(x, eval_momentum=0.0))

    dx = gradient(x)
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


@pytest.mark.parametrize("train", [linen_train, nnx_train])
def test_to_skip_reads_nothing_twice(train):
    """Beyond the plain program it has work on features only, none on x."""
    plain, skips = (
        str(jax.make_jaxpr(lambda x, f=f: train(x, **f)[0])(batch()))
        for f in ({}, {"skip_nonfinite": True})
    )
    assert plain.count("reduce_sum") == skips.count("reduce_sum")
    assert plain.count("[12,3]") == skips.count("[12,3]")
    assert plain.count("is_finite") < skips.count("is_finite")


def test_a_bad_batch_among_whitened_features_leaves_all_of_them():
    x = batch()
    x[3, 1] = np.nan
    layer = bnjax.linen.DecorrelatedBatchNorm(use_running_average=False, skip_nonfinite=True)
    variables = layer.init(jax.random.key(0), batch())
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, updates["batch_stats"], dict(variables["batch_stats"])
    )


@pytest.mark.parametrize("wing", ["linen", "nnx"])
def test_a_bad_replica_is_seen_by_all(wing):
    """After the merge: no replica remembers the feature, whichever had the NaN, and all agree."""
    x = batch(2.0).reshape(3, 4, 3)
    x[1, 2, 1] = np.nan
    fields = {"axis_name": "i", "skip_nonfinite": True}
    if wing == "linen":
        train = jax.vmap(lambda x: linen_train(x, **fields), axis_name="i")
        y, mean, var, moments = jax.jit(train)(x)
        count = moments["moments"].count
    else:
        layer = bnjax.nnx.BatchNorm(3, momentum=0.5, emit=True, rngs=nnx.Rngs(0), **fields)
        every = nnx.StateAxes({...: None})
        y = nnx.vmap(lambda layer, x: layer(x), in_axes=(every, 0), axis_name="i")(layer, x)
        mean, var = layer.mean[...][None], layer.var[...][None]
        count = nnx.pop(layer, bnjax.nnx.BatchMoments)["moments"].count[None]
    whole = x.reshape(12, 3)
    for replica in range(len(mean)):
        np.testing.assert_allclose(
            mean[replica], [0.5 * whole[:, 0].mean(), 0, 0.5 * whole[:, 2].mean()], rtol=1e-5
        )
        np.testing.assert_array_equal(count[replica], [12, 0, 12])
    assert np.isfinite(var).all()
    assert np.isnan(y[:, :, 1]).all()  # the output is what it is, in every replica


@pytest.mark.parametrize("train", [linen_train, nnx_train])
@pytest.mark.parametrize("fields", [{}, {"ghost_batch_size": 4}])
def test_the_output_of_a_bad_batch_is_what_it_is(train, fields):
    x = batch()
    x[3, 1] = np.inf
    y, mean, var, _ = train(x, skip_nonfinite=True, **fields)
    np.testing.assert_array_equal(y, train(x, **fields)[0])
    assert (mean[1], var[1]) == (0, 1)
    assert np.isfinite(mean).all()
    assert np.isfinite(var).all()


@pytest.mark.parametrize("train", [linen_train, nnx_train])
def test_a_variance_that_overflows_is_not_remembered(train):
    x = batch()
    x[:, 1] *= 1e25
    _, mean, var, _ = train(x, skip_nonfinite=True)
    assert (mean[1], var[1]) == (0, 1)


def test_a_bad_call_is_neutral_among_the_moments_of_several():
    layer = bnjax.nnx.BatchNorm(3, emit="only", skip_nonfinite=True, rngs=nnx.Rngs(0))
    bad = batch()
    bad[3, 1] = np.nan
    for x in (batch(), bad, batch(1.0)):
        layer(x)
    (m,) = jax.tree.leaves(nnx.pop(layer, bnjax.nnx.BatchMoments), is_leaf=is_moments)
    np.testing.assert_array_equal(m.count, [36, 24, 36])
    expected = reference.merge([batch(), batch(1.0)])
    np.testing.assert_allclose(m.mean[1], float(expected.mean[1]), rtol=1e-5)
    np.testing.assert_allclose(m.var[1], float(expected.var[1]), rtol=1e-5)


def is_moments(node):
    return isinstance(node, bnjax.Moments)


@pytest.mark.parametrize("train", [linen_train, nnx_train])
def test_a_batch_that_is_wholly_bad_is_no_step(train):
    """Steps count updates, so debiasing goes on as if the batch had not been."""
    y, mean, var, _ = train(np.full((12, 3), np.nan, np.float32), skip_nonfinite=True, debias=True)
    np.testing.assert_array_equal(mean, np.zeros(3))
    np.testing.assert_array_equal(var, np.ones(3))
    assert np.isnan(y).all()
