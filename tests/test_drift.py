"""How far running statistics are from a batch's, and the table that says so."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import each_network

import bnjax

X = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)


def running(mean=0.0, var=1.0):
    return {"mean": jnp.full(3, mean), "var": jnp.full(3, var)}


@pytest.mark.parametrize(("mean", "var"), [(0.0, 1.0), (0.5, 1.0), (0.0, 9.0), (-1.0, 0.2)])
def test_the_divergence_is_the_integral_of_the_definition(mean, var):
    """E log p/q under p, integrated numerically, for normal distributions p and q."""
    from scipy import integrate, stats  # a second to import

    d = bnjax.drift(running(mean, var), bnjax.moments(X), epsilon=1e-12)["(the network itself)"]
    for feature in range(3):
        column = X[:, feature].astype(float)
        p = stats.norm(column.mean(), column.std())
        q = stats.norm(mean, np.sqrt(var))
        expected, _ = integrate.quad(
            lambda t, p=p, q=q: p.pdf(t) * (p.logpdf(t) - q.logpdf(t)), -9, 9
        )
        assert d.divergence[feature] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert d.zscore[feature] == pytest.approx((column.mean() - mean) / np.sqrt(var), rel=1e-5)


def test_statistics_that_agree_have_no_drift():
    m = bnjax.moments(1e4 + X)
    d = jax.jit(bnjax.drift)({"mean": m.mean, "var": m.var}, m)["(the network itself)"]
    np.testing.assert_allclose(d.divergence, 0, atol=1e-6)
    assert not d.dead.any()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_dead_features_are_marked(value):
    x = X.copy()
    x[:, 1] = value
    d = bnjax.drift(running(), bnjax.moments(x))["(the network itself)"]
    np.testing.assert_array_equal(d.dead, [False, True, False])
    assert np.isfinite(d.divergence).all()


@each_network
def test_the_table_puts_the_layer_to_blame_on_top(network):
    net = network()
    good = bnjax.recalibrate(net.measure, net.stats, [X])
    stale = net.layers(net.stats)[1]["var"]
    paths = list(bnjax.drift(good, net.measure(X)))
    leaves, tree = jax.tree.flatten(good)
    leaves[-1] = 100 * stale  # the last layer's variance
    lines = bnjax.drift_table(bnjax.drift(jax.tree.unflatten(tree, leaves), net.measure(X)))
    head, first, second = lines.splitlines()
    assert re.split("  +", head) == [
        *("layer", "features", "dead", "divergence (nats): mean", "max"),
        *("largest |z|", "standard error"),
    ]
    assert (first.split()[0], second.split()[0]) == (paths[1], paths[0])
    assert first.split()[1:3] == ["4", "0"]
    assert float(first.split()[4]) > 1.5
    assert float(second.split()[4]) < 1e-6


def test_the_whole_table():
    batch_stats = {"a": running(), "long name": running(var=1e4)}
    m = {"moments": bnjax.moments(np.float32([[1, 1, 1], [3, 3, 1]]))}
    m = dict.fromkeys(batch_stats, m)
    assert bnjax.drift_table(bnjax.drift(batch_stats, m)) == (
        "layer      features  dead  divergence (nats): mean    max  largest |z|  standard error\n"
        "long name         3     1                    6.024  9.862         0.02        0.007071\n"
        "a                 3     1                    3.252  5.756            2          0.7071"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_layer_with_nan_is_on_top(bad):
    """Also when it is neither the first nor the last, and the others are far off."""
    stats = {name: running(100.0 * i) for i, name in enumerate("abcd")}
    m = bnjax.moments(X)
    broken = m._replace(var=m.var.at[1].set(jnp.nan), mean=m.mean.at[1].set(bad))
    emitted = {name: {"moments": broken if name == "b" else m} for name in stats}
    lines = bnjax.drift_table(bnjax.drift(stats, emitted)).splitlines()
    assert [line[0] for line in lines[1:]] == ["b", "d", "c", "a"]
    assert lines[1].split()[3:6] == ["nan", "nan", "nan" if np.isnan(bad) else "inf"]


def test_the_standard_error_tells_chance_from_a_shift():
    """The spread of zscore over many batches of independent values, by its definition."""
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 2.0, (500, 40, 3)).astype(np.float32)
    d = jax.vmap(lambda x: bnjax.drift(running(1.0, 4.0), bnjax.moments(x)))(x)
    d = d["(the network itself)"]
    np.testing.assert_allclose(np.sqrt(np.mean(d.zscore**2, 0)), np.mean(d.stderr, 0), rtol=0.1)
    np.testing.assert_allclose(
        d.stderr, np.std(x.astype(float), axis=1) / np.sqrt(40 * 4), rtol=1e-4
    )
    assert np.mean(np.abs(d.zscore) < 4 * d.stderr) > 0.999
    shifted = jax.vmap(lambda x: bnjax.drift(running(3.0, 4.0), bnjax.moments(x)))(x)
    shifted = shifted["(the network itself)"]
    assert np.all(np.abs(shifted.zscore) > 1.2 * shifted.stderr)


@pytest.mark.parametrize("rest", [0.0, np.nan, np.inf])
def test_nothing_seen_is_no_drift(rest):
    """Whatever else the moments hold."""
    full = bnjax.moments(X)
    m = bnjax.Moments(
        full.mean.at[1].set(rest), full.var.at[1].set(rest), jnp.array([64.0, 0, 64]), rest
    )
    d = bnjax.drift(running(5.0), m._replace(remainder=jnp.array([0, rest, 0])))
    d = d["(the network itself)"]
    seen = bnjax.drift(running(5.0), full)["(the network itself)"]
    for ours, true in zip(d, seen, strict=True):
        np.testing.assert_array_equal(ours, np.where([True, False, True], true, 0))
    scalar = bnjax.Moments(full.mean, full.var)
    for p in bnjax.drift(running(5.0), scalar)["(the network itself)"]:
        np.testing.assert_array_equal(p, np.zeros(3))


def test_the_remainder_of_the_mean_counts():
    """At 1e6 float32 knows a mean to 1/32: without the remainder zscore is off by as much."""
    x = (1e6 + np.random.default_rng(0).standard_normal((1000, 3))).astype(np.float32)
    d = bnjax.drift(running(1e6), bnjax.moments(x), epsilon=1e-12)["(the network itself)"]
    np.testing.assert_allclose(d.zscore, np.mean(x.astype(float), 0) - 1e6, atol=1e-4)
    assert np.abs(np.float32(np.mean(x.astype(float), 0)) - 1e6 - d.zscore).max() > 1e-3
