"""What layers warn of: in words that a filter finds, at the line that called the layer, once."""

import inspect
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx

KEY = jax.random.key(0)
X = jnp.array([[1.0, 5.0, 9.0]])
SAID = (
    "One value per feature: x has shape (1, 3), so the output is {}. "
    "Train with more examples, or pass use_running_average=True."
)
THE_BIAS = SAID.format("the bias")


class Linen(nn.Module):
    """A network that gets its layer, or makes one."""

    layer: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        norm = self.layer or bnjax.linen.BatchNorm(False)
        return norm(x)  # the line


class NNX(nnx.Module):
    """The same in NNX."""

    def __init__(self, kind="BatchNorm"):
        self.norm = getattr(bnjax.nnx, kind)(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)  # the line


def linen(network, transform=lambda f: f, x=X):
    """Initializes, which warns of nothing, and trains one step."""
    variables = network.init(KEY, X)

    def train(x):
        return network.apply(variables, x, mutable=["batch_stats"])

    return transform(train)(x)


PROGRAMS = {
    "linen": lambda: linen(Linen()),
    "jit": lambda: linen(Linen(), jax.jit),
    "grad": lambda: linen(Linen(), lambda f: jax.grad(lambda x: f(x)[0].sum())),
    "vmap": lambda: linen(Linen(), jax.vmap, X[None]),
    "scan": lambda: linen(Linen(), lambda f: lambda x: jax.lax.map(f, x), X[None]),
    "nn.jit": lambda: linen(nn.jit(Linen)()),
    "nn.remat": lambda: linen(nn.remat(Linen)()),
    "a transformed layer": lambda: linen(Linen(nn.jit(bnjax.linen.BatchNorm)(False))),
    "nnx": lambda: NNX()(X),
    "nnx.jit": lambda: nnx.jit(NNX.__call__)(NNX(), X),
    "nnx.grad": lambda: nnx.grad(lambda model, x: model(x).sum())(NNX(), X),
    "nnx.remat": lambda: nnx.remat(NNX.__call__)(NNX(), X),
}


def line_of(network):
    lines, first = inspect.getsourcelines(network.__call__)
    return first + next(i for i, line in enumerate(lines) if "# the line" in line)


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_names_the_line_that_calls_the_layer(program):
    with pytest.warns(UserWarning, match="^One value per feature: ") as caught:
        PROGRAMS[program]()
    network = NNX if program.startswith("nnx") else Linen
    assert {str(w.message) for w in caught} == {THE_BIAS}
    assert {(w.filename, w.lineno) for w in caught} == {(__file__, line_of(network))}


def test_a_layer_without_a_network():
    layer = bnjax.linen.BatchNorm(False)
    with pytest.warns(UserWarning, match="^One value per feature: ") as caught:
        layer.apply(layer.init(KEY, X), X, mutable=["batch_stats"])  # the line
    lines, first = inspect.getsourcelines(test_a_layer_without_a_network)
    here = first + next(i for i, line in enumerate(lines) if "# the line" in line)
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, here)]


def linen_step(x):
    return Linen().apply(FRESH, x, mutable=["batch_stats"])


def nnx_step(x):
    return NNX()(x)


FRESH = Linen().init(KEY, X)


@pytest.mark.parametrize("step", [linen_step, nnx_step])
def test_each_place_is_named_once(step):
    """In a loop, compiled and not, by Python's own rules."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for train in (step, jax.jit(step)):
            for _ in range(3):
                train(X)
    assert [str(w.message) for w in caught] == [THE_BIAS]


@pytest.mark.parametrize("program", ["linen", "nnx"])
def test_its_first_words_are_a_filter(program):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="One value per feature")
        PROGRAMS[program]()


KINDS = {
    "BatchNorm": "the bias",
    "DecorrelatedBatchNorm": "the bias",
    "BatchRenorm": "x normalized by the running statistics, up to d_max",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says_of_the_output_is_true(kind):
    stats = {"mean": jnp.array([0.0, 4.0, -9.0]), "var": jnp.array([4.0, 1.0, 1.0])}
    layer = getattr(bnjax.nnx, kind)(3, use_scale=False, rngs=nnx.Rngs(0))
    layer.mean[...], layer.bias[...] = stats["mean"], jnp.arange(3.0)
    if kind == "DecorrelatedBatchNorm":
        layer.cov[...] = jnp.diag(stats["var"])[None]
    else:
        layer.var[...] = stats["var"]
    with pytest.warns(UserWarning, match="^One value per feature: ") as caught:
        y = layer(X)
    assert [str(w.message) for w in caught] == [SAID.format(KINDS[kind])]
    expected = layer.bias[...]
    if kind == "BatchRenorm":
        d = (X[0] - stats["mean"]) / jnp.sqrt(stats["var"])
        assert d[2] > layer.d_max
        expected += jnp.minimum(d, layer.d_max)
    np.testing.assert_allclose(y[0], expected, atol=1e-4)


@pytest.mark.parametrize(("groups", "warned"), [(((0, 1), (2,)), [THE_BIAS]), (None, [])])
def test_a_group_of_one_replica_has_one_value_too(groups, warned):
    layer = bnjax.linen.BatchNorm(False, axis_name="i", axis_index_groups=groups)
    variables = bnjax.linen.BatchNorm(False).init(KEY, X)
    train = jax.pmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="i")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(np.arange(9, dtype=np.float32).reshape(3, 1, 3))
    assert [str(w.message) for w in caught] == warned
