"""How far running statistics are from a batch's, and the table that says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import each_network
from scipy import integrate, stats

import bnjax

X = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)


def running(mean=0.0, var=1.0):
    return {"mean": jnp.full(3, mean), "var": jnp.full(3, var)}


@pytest.mark.parametrize(("mean", "var"), [(0.0, 1.0), (0.5, 1.0), (0.0, 9.0), (-1.0, 0.2)])
def test_the_divergence_is_the_integral_of_the_definition(mean, var):
    """E log p/q under p, integrated numerically, for normal distributions p and q."""
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
    assert head.split() == (
        ["layer", "features", "dead", "divergence", "(nats):", "mean", "max", "largest", "|z|"]
    )
    assert (first.split()[0], second.split()[0]) == (paths[1], paths[0])
    assert first.split()[1:3] == ["4", "0"]
    assert float(first.split()[4]) > 1.5
    assert float(second.split()[4]) < 1e-6


def test_the_whole_table():
    batch_stats = {"a": running(), "long name": running(var=1e4)}
    m = {"moments": bnjax.moments(np.float32([[1, 1, 1], [3, 3, 1]]))}
    m = dict.fromkeys(batch_stats, m)
    assert bnjax.drift_table(bnjax.drift(batch_stats, m)) == (
        "layer      features  dead  divergence (nats): mean    max  largest |z|\n"
        "long name         3     1                    6.024  9.862         0.02\n"
        "a                 3     1                    3.252  5.756            2"
    )
