"""Running statistics replaced by the exact moments of a data set."""

import builtins
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from networks import NETWORKS, each_network
from samples import fresh

import bnjax
from bnjax import _recalibrate


def data(rows=103, ratio=0.0, seed=0):
    return (ratio + np.random.default_rng(seed).standard_normal((rows, 3))).astype(np.float32)


def split(x, *sizes):
    return np.split(x, np.cumsum(sizes))


@jax.jit
def masked_moments(batch):
    x, where = batch
    return bnjax.moments(x, where=where)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ratio", [0, 1e4])
def test_the_moments_of_the_whole_data_set(ratio, masked, ddof):
    x = data(ratio=ratio)
    where = np.random.default_rng(1).random((103, 1)) < (0.6 if masked else 1.1)
    batches = zip(split(x, 40, 40, 20), split(where, 40, 40, 20), strict=True)
    stats = bnjax.recalibrate(masked_moments, fresh(), batches, ddof=ddof)
    expected = reference.moments(x, where=where)
    var = expected.var * expected.count / (expected.count - ddof)
    scale = 1e-30 + np.abs(expected.mean) if ratio else np.sqrt(expected.var)
    assert np.max(np.abs(reference.wide(stats["mean"]) - expected.mean) / scale) < 2e-6
    np.testing.assert_allclose(stats["var"], var.astype(float), rtol=2e-6)


@each_network
def test_a_second_pass_over_a_deep_network_changes_nothing(network):
    net = network(pivot="batch")  # about the running mean last bits depend on the state
    batches = split(data(60), 40)
    net.stats = once = bnjax.recalibrate(jax.jit(net.measure), net.stats, batches)
    twice = bnjax.recalibrate(jax.jit(net.measure), net.stats, batches)
    chex.assert_trees_all_equal(once, twice)
    chex.assert_trees_all_equal_shapes_and_dtypes(once, net.stats)
    assert all((layer["var"] != 1).all() for layer in net.layers(once))


@each_network
def test_layers_get_what_their_own_inputs_have(network):
    net = network()
    measure, x = jax.jit(net.measure), data(60)
    stats = bnjax.recalibrate(measure, net.stats, split(x, 40))
    m = measure(x)  # of the first layer: its input does not depend on the batches
    first, _ = net.layers(stats)
    whole, _ = net.layers(bnjax.update_stats(net.stats, m, momentum=0.0))
    np.testing.assert_allclose(first["mean"], whole["mean"], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(first["var"], whole["var"], rtol=2e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_is_compiled_twice(sharded):
    net = NETWORKS["linen"]()
    traced = []

    @jax.jit
    def measure(x):
        traced.append(x.shape)
        return net.measure(x)

    batches = split(data(100), 32, 32, 32)
    if sharded:
        mesh = Mesh(np.array(jax.devices()), ("data",))
        over = NamedSharding(mesh, P("data"))
        batches = [jax.device_put(x, over) for x in batches[:3]]
    before = _recalibrate._add._cache_size()
    stats = bnjax.recalibrate(measure, net.stats, batches)
    assert sorted(traced) == sorted({x.shape for x in batches})
    # The first addition has no total yet.
    assert _recalibrate._add._cache_size() - before <= 2
    whole = np.concatenate(batches)
    expected = bnjax.recalibrate(measure, net.stats, [whole])["BatchNorm_0"]["var"]
    np.testing.assert_allclose(stats["BatchNorm_0"]["var"], expected, rtol=2e-6)


def test_replicas_that_share_their_moments():
    """Under shard_map, with masks of other counts on every replica."""
    x, where = data(96), np.random.default_rng(2).random((96, 1)) < 0.5
    mesh = Mesh(np.array(jax.devices()), ("data",))
    measure = jax.jit(
        jax.shard_map(
            lambda x, where: bnjax.moments(x, where=where, axis_name="data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )
    )
    batches = zip(split(x, 32, 32), split(where, 32, 32), strict=True)
    stats = bnjax.recalibrate(lambda batch: measure(*batch), fresh(), batches)
    np.testing.assert_allclose(
        stats["var"], reference.moments(x, where=where).var.astype(float), rtol=2e-6
    )


def test_statistics_that_are_not_finite_are_replaced_and_steps_stay():
    stats = {"mean": jnp.full(3, jnp.nan), "var": jnp.full(3, jnp.inf), "steps": jnp.int32(9)}
    after = bnjax.recalibrate(bnjax.moments, stats, [data()])
    assert after["steps"] == 9
    np.testing.assert_allclose(after["var"], data().astype(float).var(0), rtol=2e-6)


def test_features_without_a_value_and_layers_without_moments_stay():
    where = np.array([[True, False, True]])
    stats = {"a": {"mean": jnp.full(3, 5.0), "var": jnp.full(3, 6.0)}, "b": fresh()}

    def measure(x):
        return {"a": {"moments": bnjax.moments(x, where=where)}}

    after = bnjax.recalibrate(measure, stats, [data()])
    assert (after["a"]["mean"][1], after["a"]["var"][1]) == (5, 6)
    assert (after["a"]["mean"][:1] != 5).all()
    chex.assert_trees_all_equal(after["b"], stats["b"])


@pytest.mark.parametrize("where", [0, 2])
def test_a_batch_that_is_not_finite_is_reported_and_left_out(where):
    x = data(60)
    batches = split(x, 20, 20)
    bad = [*batches]
    bad.insert(where, np.full((7, 3), np.nan, np.float32))
    with pytest.warns(UserWarning, match=r"^") as warned:
        stats = bnjax.recalibrate(jax.jit(bnjax.moments), fresh(), bad)
    assert [str(w.message) for w in warned] == [
        f"The moments of batches [{where}] (counted from 0) are not finite. These batches are "
        "left out, all others count."
    ]
    chex.assert_trees_all_equal(stats, bnjax.recalibrate(bnjax.moments, fresh(), batches))


@pytest.mark.parametrize("batches", [[], [np.full((4, 3), np.inf, np.float32)] * 2])
def test_no_batch_that_counts(batches):
    with pytest.raises(ValueError, match=r"^") as error:
        bnjax.recalibrate(bnjax.moments, fresh(), batches)
    assert str(error.value) == (
        f"batches has {len(batches)} batches, and none with finite moments. The statistics are "
        "as they were. Give batches that the network can be trained on."
    )


def test_a_wholly_masked_batch_changes_nothing():
    def measure(x):
        return bnjax.moments(x, where=np.isfinite(x).all(1, keepdims=True))

    masked = np.full((7, 3), np.nan, np.float32)
    stats = bnjax.recalibrate(measure, fresh(), [masked, data(), masked])
    chex.assert_trees_all_equal(stats, bnjax.recalibrate(measure, fresh(), [data()]))


def test_a_progress_bar_when_asked(capsys):
    bnjax.recalibrate(bnjax.moments, fresh(), split(data(), 40, 40), progress=True)
    assert "recalibrate: 100%" in capsys.readouterr().err
    bnjax.recalibrate(bnjax.moments, fresh(), split(data(), 40, 40))
    assert not capsys.readouterr().err


def test_a_bar_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert builtins.__import__
    with pytest.raises(ImportError) as error:
        bnjax.recalibrate(bnjax.moments, fresh(), [data()], progress=True)
    assert str(error.value) == (
        "progress is True, and the bar needs tqdm. Install it, or leave progress out."
    )


@pytest.mark.parametrize("nothing", [None, {}, {"norm": {}}], ids=str)
def test_a_measure_that_gives_no_moments(nothing):
    with pytest.raises(ValueError, match=r"^") as error:
        bnjax.recalibrate(lambda x: nothing, {"norm": fresh()}, [data()])
    assert str(error.value) == (
        "measure gave no moments. Call the network in training mode, linen's with "
        'mutable=["moments", "batch_stats"], NNX\'s with emit=True, and return what it emits.'
    )


def test_a_measure_that_gives_the_output_too():
    with pytest.raises(ValueError, match=r"^") as error:
        bnjax.recalibrate(lambda x: (x, {"norm": bnjax.moments(x)}), {"norm": fresh()}, [data()])
    assert str(error.value) == (
        "moments holds an array at [0], but what layers emit are Moments. "
        "Give linen's collection alone, updates['moments'], or what "
        "nnx.pop(model, bnjax.nnx.BatchMoments) returns."
    )


def test_a_measure_that_gives_other_layers():
    def measure(batch):
        return {name: bnjax.moments(data()) for name in batch}

    stats = {"first": fresh(), "second": fresh()}
    with pytest.raises(ValueError, match=r"^") as error:
        bnjax.recalibrate(measure, stats, [["first", "second"], ["second"]])
    assert str(error.value) == (
        "measure gave moments of second for batch 1 (counted from 0), but of first, second for "
        "those before it. Give those of the same layers for each batch."
    )


@pytest.mark.parametrize("nothing", [None, {}], ids=str)
def test_a_measure_that_gives_nothing_at_first(nothing):
    given = iter([nothing, {"norm": bnjax.moments(data())}])
    with pytest.raises(ValueError, match=r"moments of norm for batch 1 .* but of no layer"):
        bnjax.recalibrate(lambda batch: next(given), {"norm": fresh()}, [0, 1])
