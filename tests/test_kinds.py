"""What a further kind of layer costs: a recipe and its fields; another average: one method."""

import dataclasses

import jax
import numpy as np
import pytest
from checks import assert_same_bits
from flax import nnx
from samples import well_scaled

import bnjax.linen
import bnjax.nnx
from bnjax._layer.recipe import BATCH_NORM

pytestmark = pytest.mark.optimized

X = np.asarray(well_scaled(1, (8, 3)))


def divide(x, m, scale, bias, **settings):
    """By the standard deviation; the mean stays."""
    return bnjax.normalize(x, bnjax.Moments(0 * m.mean, m.var), scale, bias, **settings)


class Kind:
    """A kind of layer: what it is made of."""

    @property
    def _recipe(self):
        return dataclasses.replace(BATCH_NORM, apply=divide)


class Average:
    """A layer that remembers the last batch."""

    def _remember(self, stats, m):
        return stats | {"mean": m.mean, "var": m.var}


class LinenKind(Kind, bnjax.linen.BatchNorm):
    """Linen's."""


class NNXKind(Kind, bnjax.nnx.BatchNorm):
    """NNX's."""


class LinenAverage(Average, bnjax.linen.BatchNorm):
    """Linen's."""


class NNXAverage(Average, bnjax.nnx.BatchNorm):
    """NNX's."""


def in_linen(layer, **fields):
    layer = layer(**fields)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    y, updates = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    evaluated = layer.apply(variables | updates, X, use_running_average=True)
    return y, evaluated, dict(updates["batch_stats"])


def in_nnx(layer, **fields):
    layer = layer(3, rngs=nnx.Rngs(0), **fields)
    y = layer(X)
    stats = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    return y, layer(X, use_running_average=True), stats


def test_a_kind_of_layer():
    y, evaluated, stats = in_linen(LinenKind, momentum=0.5)
    np.testing.assert_allclose(y, X / np.sqrt(np.var(X, 0) + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(stats["mean"], X.mean(0) / 2, rtol=1e-5)
    np.testing.assert_allclose(evaluated, X / np.sqrt(np.asarray(stats["var"]) + 1e-5), rtol=1e-5)
    assert_same_bits(in_nnx(NNXKind, momentum=0.5), (y, evaluated, stats))


@pytest.mark.parametrize(("run", "layer"), [(in_linen, LinenAverage), (in_nnx, NNXAverage)])
def test_another_average(run, layer):
    y, evaluated, stats = run(layer)
    np.testing.assert_allclose(stats["mean"], X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], X.var(0), rtol=1e-5)
    np.testing.assert_allclose(evaluated, y, atol=1e-5)
