"""`DecorrelatedBatchNorm` of linen and NNX: variables, running statistics and trees of them."""

import dataclasses
import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checks import assert_refused, assert_same_bits
from flax import nnx
from samples import kernel
from whitening import assert_covariances, correlated, covariance, transform, whitened

import bnjax
import bnjax.nnx
from bnjax.linen import BatchNorm, DecorrelatedBatchNorm


def batches(count=4, rows=40):
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((4, 4))
    return [(rng.standard_normal((rows, 4)) @ mixing + 2).astype(np.float32) for _ in range(count)]


def train(layer, variables, x, **call):
    y, updates = layer.apply(variables, x, **call, mutable=["batch_stats"])
    return y, variables | updates


def test_variables():
    layer = DecorrelatedBatchNorm(False, group_size=2, debias=True)
    variables = layer.init(jax.random.key(0), jnp.ones((3, 4), jnp.bfloat16))
    shapes = jax.tree.map(lambda p: (p.shape, p.dtype.name), variables)
    assert shapes == {
        "params": {"scale": ((4,), "float32"), "bias": ((4,), "float32")},
        "batch_stats": {
            "mean": ((4,), "float32"),
            "cov": ((2, 2, 2), "float32"),
            "steps": ((), "int32"),
        },
    }
    np.testing.assert_array_equal(variables["batch_stats"]["cov"], np.tile(np.eye(2), (2, 1, 1)))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("momentum", [0.6, None])
def test_it_trains_on_the_batch_and_evaluates_on_what_it_remembers(momentum, ddof):
    layer = DecorrelatedBatchNorm(group_size=2, momentum=momentum, ddof=ddof)
    data = batches()
    variables = layer.init(jax.random.key(0), data[0], use_running_average=False)
    mean, cov = np.zeros(4), np.tile(np.eye(2), (2, 1, 1))
    for steps, x in enumerate(data):
        y, variables = train(layer, variables, x, use_running_average=False)
        np.testing.assert_allclose(y, whitened(x, 2, "cholesky"), atol=1e-4)
        share = 1 / (steps + 1) if momentum is None else 1 - momentum
        mean = (1 - share) * mean + share * x.mean(0, dtype=np.float64)
        cov = (1 - share) * cov + share * covariance(x, 2) * 40 / (40 - ddof)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(variables["batch_stats"]["cov"], cov, rtol=1e-4, atol=1e-5)
    y = layer.apply(variables, data[0], use_running_average=True)
    d = (data[0] - mean).reshape(40, 2, 2)
    expected = np.einsum("gij,ngj->ngi", transform(cov, "cholesky", 1e-5), d).reshape(40, 4)
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize(
    "fields", [{}, {"method": "newton_schulz", "iterations": 3}, {"epsilon": 0.1}], ids=str
)
def test_fields_are_those_of_the_function(fields):
    x = correlated(64, 4).astype(np.float32)
    layer = DecorrelatedBatchNorm(False, group_size=2, use_scale=False, use_bias=False, **fields)
    y, _ = train(layer, layer.init(jax.random.key(0), x), x)
    expected = bnjax.whiten(x, bnjax.cov_moments(x, group_size=2), **fields)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_parameters_axis_and_dtype():
    x = correlated(64, 4).astype(np.float32)
    layer = DecorrelatedBatchNorm(False, axis=0, dtype=jnp.bfloat16)
    params = {"scale": jnp.arange(4.0), "bias": jnp.ones(4)}
    stats = layer.init(jax.random.key(0), x.T)["batch_stats"]
    y, _ = train(layer, {"params": params, "batch_stats": stats}, x.T)
    assert y.dtype == jnp.bfloat16
    expected = whitened(x, 4, "cholesky", scale=np.arange(4), bias=1).T
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2**-7, atol=1e-3)


def test_one_feature_per_group_is_the_plain_layer():
    x = batches(1)[0]
    layers = DecorrelatedBatchNorm(False, group_size=1), BatchNorm(False)
    (y, ours), (z, theirs) = (train(n, n.init(jax.random.key(0), x), x) for n in layers)
    np.testing.assert_allclose(y, z, atol=1e-5)
    ours, theirs = ours["batch_stats"], theirs["batch_stats"]
    np.testing.assert_allclose(ours["cov"].ravel(), theirs["var"], rtol=1e-6)


def test_masks_and_replicas():
    """Replicas of 8, 3, 0 and 5 valid rows, with NaN in all others."""
    x = batches(1, 32)[0]
    valid = (np.arange(8) < np.array([[8], [3], [0], [5]])).reshape(32, 1)
    padded = np.where(valid, x, np.nan).astype(np.float32)
    layer = DecorrelatedBatchNorm(False, group_size=2, axis_name="replicas", momentum=0.0)
    variables = layer.init(jax.random.key(0), padded, mask=valid)
    assert np.isfinite(variables["batch_stats"]["cov"]).all()

    def step(x, mask):
        return train(layer, variables, x, mask=mask)

    y, after = jax.pmap(step, axis_name="replicas")(padded.reshape(4, 8, 4), valid.reshape(4, 8, 1))
    given = x[valid[:, 0]]
    np.testing.assert_allclose(
        y.reshape(32, 4)[valid[:, 0]], whitened(given, 2, "cholesky"), atol=1e-4
    )
    for replica in after["batch_stats"]["cov"]:
        np.testing.assert_allclose(replica, covariance(given, 2), rtol=1e-4, atol=1e-5)


def test_the_state_keeps_its_dtypes_through_a_scan():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.complex64):
        x = jnp.asarray(batches(1)[0], dtype)
        layer = DecorrelatedBatchNorm(False, group_size=2, momentum=0.5)
        variables = jax.jit(layer.init)(jax.random.key(0), x)

        def step(stats, _, layer=layer, variables=variables, x=x):
            y, after = train(layer, variables | {"batch_stats": stats}, x)
            return after["batch_stats"], jnp.sum(jnp.abs(y))

        after, _ = jax.lax.scan(step, variables["batch_stats"], length=30)
        cov = covariance(np.asarray(x, np.complex64), 2)
        np.testing.assert_allclose(after["cov"], cov, rtol=1e-3, atol=1e-4)


def test_ghost_batches_are_whitened_by_themselves_and_remembered_together():
    layer = DecorrelatedBatchNorm(False, group_size=2, momentum=0.0, ghost_batch_size=20)
    x = batches(1)[0]
    y, after = train(layer, layer.init(jax.random.key(0), x), x)
    parts = [whitened(part, 2, "cholesky") for part in (x[:20], x[20:])]
    np.testing.assert_allclose(y, np.concatenate(parts), atol=1e-4)
    np.testing.assert_allclose(after["batch_stats"]["cov"], covariance(x, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pivot", ["auto", "running"])
def test_the_running_mean_changes_nothing(pivot):
    """A covariance about it might not be positive."""
    layer = DecorrelatedBatchNorm(False, group_size=2)
    x = batches(1)[0]
    variables = layer.init(jax.random.key(0), x)
    variables["batch_stats"]["mean"] = jnp.full(4, 1e4)
    y, _ = train(layer.clone(pivot="batch"), variables, x)
    assert_same_bits(train(layer.clone(pivot=pivot), variables, x)[0], y)


def test_its_fields_follow_the_axis_and_what_came_later_is_keyword_only():
    fields = {f.name: f.kw_only for f in dataclasses.fields(DecorrelatedBatchNorm)}
    plain = {f.name for f in dataclasses.fields(BatchNorm)}
    assert list(fields)[:5] == ["use_running_average", "axis", "group_size", "method", "iterations"]
    positional = [name for name, kw_only in fields.items() if not kw_only]
    assert positional[5:-2] == [
        "momentum", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale", "bias_init",
        "scale_init", "axis_name", "axis_index_groups", "debias", "ddof",
    ]  # fmt: skip
    assert set(fields) == plain | {"group_size", "method", "iterations"}

    class Own(DecorrelatedBatchNorm):
        more: int = 0

    assert Own(False, -1, 2, *[None] * 14, 7).more == 7


def test_a_batch_of_one_is_warned_of():
    layer = DecorrelatedBatchNorm(False)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 4)))
    with pytest.warns(UserWarning, match="One value per feature: .* so the output is the bias"):
        y, _ = train(layer, variables, jnp.ones((1, 4)))
    np.testing.assert_array_equal(y, 0)


def test_a_group_size_that_does_not_fit():
    message = "group_size is 3, but there are 4 features. Choose a divisor of 4."
    with pytest.raises(ValueError, match=message):
        DecorrelatedBatchNorm(False, group_size=3).init(jax.random.key(0), jnp.ones((2, 4)))


# Trees of statistics


class Network(nn.Module):
    """Plain and decorrelated layers in one network."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, kernel_init=kernel)(x)
        x = nn.relu(DecorrelatedBatchNorm(not train, group_size=2, momentum=0.75)(x))
        return BatchNorm(not train, momentum=0.75)(nn.Dense(3, kernel_init=kernel)(x))


@functools.cache
def network():
    """Of batches of 40 rows, and of 20."""
    net = Network()
    variables = jax.jit(net.init)(jax.random.key(0), batches(1)[0])

    @jax.jit
    def measure(x):
        return net.apply(variables, x, mutable=["moments"])[1]["moments"]

    return net, variables, measure


def test_emitted_moments_update_what_training_updates():
    net, variables, measure = network()
    x = batches(1)[0]
    m = measure(x)["DecorrelatedBatchNorm_0"]["moments"]
    assert isinstance(m, bnjax.CovMoments)
    hidden = x @ np.asarray(variables["params"]["Dense_0"]["kernel"])
    assert_covariances(m, hidden, 2, tolerance=1e-5)
    stats = bnjax.update_stats(variables["batch_stats"], measure(x), momentum=0.75)
    _, after = train(net, variables, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, after["batch_stats"]
    )


def test_a_second_call_merges():
    x = batches(1)[0]
    layer = DecorrelatedBatchNorm(False)
    variables = layer.init(jax.random.key(0), x)

    def twice(layer, x):
        layer(x[:10])
        layer(x[10:])

    _, updates = nn.apply(twice, layer, mutable=["moments"])(variables, x)
    assert_covariances(updates["moments"]["moments"], x, 4)


def test_recalibration_gives_the_moments_of_the_data_set():
    _, variables, measure = network()
    x = np.concatenate(batches(3))
    parts = np.split(x, [40, 80, 100])
    stats = bnjax.recalibrate(measure, variables["batch_stats"], parts, ddof=1)
    hidden = x @ np.asarray(variables["params"]["Dense_0"]["kernel"])
    ours = stats["DecorrelatedBatchNorm_0"]
    np.testing.assert_allclose(ours["mean"], hidden.mean(0), atol=1e-5)
    expected = covariance(hidden, 2) * 120 / 119
    np.testing.assert_allclose(ours["cov"], expected, atol=1e-5 * expected.max())


def test_drift_looks_at_the_variances():
    _, variables, measure = network()
    x = batches(1)[0]
    drifts = bnjax.drift(variables["batch_stats"], measure(x))
    hidden = x @ np.asarray(variables["params"]["Dense_0"]["kernel"])
    plain = {"DecorrelatedBatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
    emitted = {"DecorrelatedBatchNorm_0": {"moments": bnjax.moments(hidden)}}
    expected = bnjax.drift(plain, emitted)["DecorrelatedBatchNorm_0"]
    for a, b in zip(drifts["DecorrelatedBatchNorm_0"], expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


# In NNX. That it computes the same bits is among the tests of all layers.


def of_nnx(**fields):
    layer = bnjax.nnx.DecorrelatedBatchNorm(4, group_size=2, rngs=nnx.Rngs(0), **fields)
    dtype = layer.scale.dtype
    layer.scale[...], layer.bias[...] = jnp.arange(1, 5, dtype=dtype), jnp.arange(4, dtype=dtype)
    return layer


def test_variables_of_nnx():
    state = nnx.state(of_nnx(debias=True, param_dtype=jnp.bfloat16))
    assert jax.tree.map(lambda p: (p.shape, p.dtype.name), nnx.to_pure_dict(state)) == {
        "scale": ((4,), "bfloat16"),
        "bias": ((4,), "bfloat16"),
        "mean": ((4,), "float32"),
        "cov": ((2, 2, 2), "float32"),
        "steps": ((), "int32"),
    }
    kinds = {name: type(variable) for name, variable in state.items()}
    assert kinds == {"scale": nnx.Param, "bias": nnx.Param} | dict.fromkeys(
        ["mean", "cov", "steps"], nnx.BatchStat
    )
    np.testing.assert_array_equal(state["cov"][...], np.tile(np.eye(2), (2, 1, 1)))


def test_nnx_trains_as_linen():
    ours = DecorrelatedBatchNorm(group_size=2, momentum=0.6, ddof=1)
    layer = of_nnx(momentum=0.6, ddof=1)
    params = {"scale": layer.scale[...], "bias": layer.bias[...]}
    data = batches()
    variables = ours.init(jax.random.key(0), data[0], use_running_average=False)
    variables |= {"params": params}
    for x in data:
        y, variables = train(ours, variables, x, use_running_average=False)
        assert_same_bits(layer(x), y)
    stats = {"mean": layer.mean[...], "cov": layer.cov[...]}
    assert_same_bits(stats, dict(variables["batch_stats"]))
    layer.eval()
    assert_same_bits(layer(x), ours.apply(variables, x, use_running_average=True))


def test_emitted_moments_update_what_training_updates_in_nnx():
    a, b = batches(2)
    trained, emitting = of_nnx(momentum=0.75), of_nnx(momentum=0.75, emit="only")
    trained(a)
    emitting(a)
    stats = nnx.state(emitting, nnx.BatchStat)
    m = nnx.pop(emitting, bnjax.nnx.BatchMoments)
    updated = bnjax.update_stats(stats, m, momentum=0.75)
    assert_same_bits(nnx.to_pure_dict(updated), nnx.to_pure_dict(nnx.state(trained, nnx.BatchStat)))
    emitting(a)
    emitting(b)  # merges
    (m,) = jax.tree.leaves(
        nnx.pop(emitting, bnjax.nnx.BatchMoments)["moments"],
        is_leaf=lambda node: isinstance(node, bnjax.CovMoments),
    )
    assert_covariances(m, np.concatenate([a, b]), 2)


def test_recalibration_of_an_nnx_model():
    layer, x = of_nnx(emit="only"), np.concatenate(batches(3))

    def measure(x):
        layer(x)
        return nnx.pop(layer, bnjax.nnx.BatchMoments)

    parts = np.split(x, [40, 80, 100])
    stats = bnjax.recalibrate(measure, nnx.state(layer, nnx.BatchStat), parts)
    nnx.update(layer, stats)
    np.testing.assert_allclose(layer.mean[...], x.mean(0), atol=1e-5)
    np.testing.assert_allclose(layer.cov[...], covariance(x, 2), rtol=1e-4, atol=1e-5)


def test_pickles_and_checkpoints_of_nnx(tmp_path):
    layer, x = of_nnx(debias=True), batches(1)[0]
    layer(x)
    pickled = pickle.loads(pickle.dumps(layer))
    restored = of_nnx(debias=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", nnx.state(layer))
        checkpointer.wait_until_finished()
        nnx.update(restored, checkpointer.restore(tmp_path / "step", nnx.state(restored)))
    y = layer(x, use_running_average=True)
    for copy in (pickled, restored):
        assert_same_bits(nnx.to_pure_dict(nnx.state(copy)), nnx.to_pure_dict(nnx.state(layer)))
        assert_same_bits(copy(x, use_running_average=True), y)


def test_a_group_size_that_does_not_fit_in_nnx():
    assert_refused(
        lambda: bnjax.nnx.DecorrelatedBatchNorm(4, group_size=3, rngs=nnx.Rngs(0)),
        "group_size is 3, but there are 4 features. Choose a divisor of 4.",
    )
