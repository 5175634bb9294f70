"""Whole models, linen and NNX, folded: the same outputs without a batch norm, or a refusal."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_refused
from flax import nnx
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict
from samples import kernel

import bnjax
import bnjax.linen
import bnjax.nnx

X = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)


# The same networks in both: residual blocks, and every kind of layer that can take in a norm.


class Block(nn.Module):
    """Residual, with a shortcut of its own where the number of channels changes."""

    channels: int
    norm: type

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(self.norm, use_running_average=True)
        y = nn.Conv(self.channels, (3, 3), use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = norm(scale_init=nn.initializers.zeros)(nn.Conv(self.channels, (3, 3))(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.channels, (1, 1), use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    norm: type = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        for i, channels in enumerate((4, 6)):
            x = Block(channels, self.norm, name=f"block{i}")(x)
        return nn.Dense(5)(x.max((1, 2)))


class Layer(nn.Module):
    norm: type = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        return nn.relu(self.norm(True)(nn.Conv(4, (3, 3))(x)))


PAIRS_OF_RESNET = {"Conv_0": "BatchNorm_0"} | {
    f"block{i}/Conv_{j}": f"block{i}/BatchNorm_{j}"
    for i, convs in enumerate((2, 3))
    for j in range(convs)
}


# Their variables are drawn later, and zeros are compiled at once.
ConvNNX, ConvTransposeNNX, LinearNNX, LinearGeneralNNX = (
    functools.partial(kind, kernel_init=nnx.initializers.zeros)
    for kind in (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)
)


class BlockNNX(nnx.Module):
    def __init__(self, inputs, channels, norm, rngs):
        self.conv1 = ConvNNX(inputs, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = norm(channels, rngs=rngs)
        self.conv2 = ConvNNX(channels, channels, (3, 3), rngs=rngs)
        self.norm2 = norm(channels, scale_init=nnx.initializers.zeros, rngs=rngs)
        if inputs != channels:
            self.shortcut = nnx.Sequential(
                ConvNNX(inputs, channels, (1, 1), use_bias=False, rngs=rngs),
                norm(channels, rngs=rngs),
            )

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (self.shortcut(x) if x.shape != y.shape else x))


class ResNetNNX(nnx.Module):
    def __init__(self, norm=bnjax.nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.conv, self.norm = ConvNNX(3, 4, (3, 3), rngs=rngs), norm(4, rngs=rngs)
        sizes = [(4, 4), (4, 6)]
        self.blocks = nnx.List([BlockNNX(*size, norm, rngs) for size in sizes])
        self.out = LinearNNX(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.out(x.max((1, 2)))


class LayerNNX(nnx.Module):
    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.conv, self.norm = ConvNNX(3, 4, (3, 3), rngs=rngs), norm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


PAIRS_OF_RESNET_NNX = {
    "conv": "norm",
    **{f"blocks/{i}/conv{j}": f"blocks/{i}/norm{j}" for i in range(2) for j in (1, 2)},
    "blocks/1/shortcut/layers/0": "blocks/1/shortcut/layers/1",
}


class Zoo(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = functools.partial(bnjax.linen.BatchNorm, use_running_average=True, epsilon=0.01)
        x = nn.Conv(6, (3, 3), 2, "CIRCULAR", kernel_dilation=2, feature_group_count=3)(x)
        x = nn.tanh(norm()(x))
        x = nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False)(x)  # depthwise
        x = nn.tanh(norm(axis=3)(x))
        x = nn.ConvTranspose(4, (3, 2), (2, 2), transpose_kernel=True, use_bias=False)(x)
        x = nn.tanh(norm(use_scale=False)(x))
        x = nn.ConvTranspose(6, (2, 2), padding="VALID")(x)
        x = nn.tanh(norm(use_bias=False)(x))
        x = nn.DenseGeneral((2, 5), axis=(1, 2), use_bias=False)(x)
        x = nn.tanh(norm(axis=(2, 3))(x))  # statistics for each of 2 x 5 features
        x = nn.DenseGeneral((2, 4))(x)
        x = nn.tanh(norm()(x))  # shared by the 2
        x = nn.DenseGeneral((2, 4), axis=-1, batch_dims=(0,))(x)
        x = nn.tanh(norm(axis=(0, -2))(x))
        x = nn.Dense(6)(x.reshape(2, -1))
        return norm()(x)


PAIRS_OF_ZOO = {
    "Conv_0": "BatchNorm_0",
    "Conv_1": "BatchNorm_1",
    "ConvTranspose_0": "BatchNorm_2",
    "ConvTranspose_1": "BatchNorm_3",
    "DenseGeneral_0": "BatchNorm_4",
    "DenseGeneral_1": "BatchNorm_5",
    "DenseGeneral_2": "BatchNorm_6",
    "Dense_0": "BatchNorm_7",
}


class ZooNNX(nnx.Module):
    def __init__(self):
        r = nnx.Rngs(0)
        norm = functools.partial(bnjax.nnx.BatchNorm, epsilon=0.01, rngs=r)
        self.layers = nnx.List(
            [
                ConvNNX(
                    3,
                    6,
                    (3, 3),
                    2,
                    padding="CIRCULAR",
                    kernel_dilation=2,
                    feature_group_count=3,
                    rngs=r,
                ),
                ConvNNX(6, 6, (3, 3), feature_group_count=6, use_bias=False, rngs=r),
                ConvTransposeNNX(
                    6, 4, (3, 2), (2, 2), transpose_kernel=True, use_bias=False, rngs=r
                ),
                ConvTransposeNNX(4, 6, (2, 2), padding="VALID", rngs=r),
                LinearGeneralNNX((9, 9), (2, 5), axis=(1, 2), use_bias=False, rngs=r),
                LinearGeneralNNX(5, (2, 4), rngs=r),
                LinearGeneralNNX(4, (2, 4), batch_axis={0: 2}, rngs=r),
                LinearNNX(192, 6, rngs=r),
            ]
        )
        self.norms = nnx.List(
            [
                norm(6),
                norm(6, axis=3),
                norm(4, use_scale=False),
                norm(6, use_bias=False),
                norm((2, 5), axis=(2, 3)),
                norm(4),
                norm((2, 2), axis=(0, -2)),
                norm(6),
            ]
        )

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x.reshape(2, -1) if isinstance(layer, nnx.Linear) else x
            x = nnx.tanh(norm(layer(x)))
        return x


PAIRS_OF_ZOO_NNX = {f"layers/{i}": f"norms/{i}" for i in range(8)}


def drawn(name, p, rng):
    """Variables of a trained network: none of them as they are at the start."""
    value = rng.uniform(0.5, 2, p.shape) if name in ("var", "scale") else rng.normal(size=p.shape)
    return jnp.asarray(value / (3 if name == "kernel" else 1), p.dtype)


def trained(model, x=X):
    """Variables of a linen model after training."""
    flat = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x))
    rng = np.random.default_rng(0)
    return unflatten_dict({path: drawn(path[-1], p, rng) for path, p in flat.items()})


def trained_nnx(model):
    """An NNX model after training, in evaluation."""
    rng = np.random.default_rng(0)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and path[-1] != "rngs":
            variable[...] = drawn(path[-1], variable[...], rng)
    model.eval()
    return model


def assert_same_output(ours, true, tolerance=1e-5):
    assert (ours.shape, ours.dtype) == (true.shape, true.dtype)
    ours, true = np.asarray(ours, np.float64), np.asarray(true, np.float64)
    assert np.abs(ours - true).max() <= tolerance * np.abs(true).max()


def compile_and_count(f, *args):
    """The compiled program, and how many products and roots it has before and after XLA."""
    traced = jax.jit(f).trace(*args)
    compiled = traced.lower().compile()
    before = re.findall(r"= (mul|div|rsqrt|sqrt)\b", str(traced.jaxpr))
    after = re.findall(r" (multiply|divide|rsqrt|sqrt)\(", compiled.as_text())
    return compiled, (len(before), len(after))


def names(tree):
    return {path[-1] for path in flatten_dict(tree)}


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (ResNet(), PAIRS_OF_RESNET),
        (Zoo(), PAIRS_OF_ZOO),
        (Layer(nn.BatchNorm), {"Conv_0": "BatchNorm_0"}),
        (nn.remat(Layer)(), {"Conv_0": "BatchNorm_0"}),
        (nn.jit(Layer)(), {"Conv_0": "BatchNorm_0"}),
    ],
    ids=["ResNet", "zoo", "flax's BatchNorm", "remat", "jit"],
)
def test_a_linen_model_folded_whole(model, pairs):
    variables = trained(model)
    before = jax.tree.map(np.array, variables)
    folded = bnjax.linen.fold(model, variables, pairs, X)
    chex.assert_trees_all_equal(variables, before)

    assert set(folded) == {"params", "folded"}
    assert names(folded) == {"kernel", "bias"}
    run, products = compile_and_count(model.apply, variables, X)
    run_folded, left = compile_and_count(
        functools.partial(bnjax.linen.apply_folded, model), folded, X
    )
    assert left == (0, 0) != products
    assert_same_output(run_folded(folded, X), run(variables, X))


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (ResNetNNX, PAIRS_OF_RESNET_NNX),
        (functools.partial(LayerNNX, nnx.BatchNorm), {"conv": "norm"}),
        (ZooNNX, PAIRS_OF_ZOO_NNX),
    ],
    ids=["ResNet", "flax's BatchNorm", "zoo"],
)
def test_an_nnx_model_folded_whole(model, pairs):
    model = trained_nnx(model())
    model.train()
    before = jax.tree.map(np.array, nnx.state(model))
    folded = bnjax.nnx.fold(model, pairs, X)
    chex.assert_trees_all_equal(nnx.state(model), before)

    assert not nnx.state(folded, nnx.BatchStat)
    assert names(nnx.to_pure_dict(nnx.state(folded))) == {"kernel", "bias"}
    model.eval()

    def run(model):
        graph, state = nnx.split(model)
        compiled, products = compile_and_count(lambda s, x: nnx.merge(graph, s)(x), state, X)
        return compiled(state, X), products

    y, left = run(folded)
    true, products = run(model)
    assert left == (0, 0) != products
    assert_same_output(y, true)


def test_folding_some_leaves_the_others():
    model, pairs = ResNet(), dict([*PAIRS_OF_RESNET.items()][1:4])
    variables = freeze(trained(model))
    folded = bnjax.linen.fold(model, variables, pairs, X)
    assert len(folded["batch_stats"]["block1"]) == 2
    assert "BatchNorm_0" in folded["batch_stats"]
    assert "block0" not in folded["batch_stats"]
    assert_same_output(bnjax.linen.apply_folded(model, folded, X), model.apply(variables, X))

    model = trained_nnx(ResNetNNX())
    folded = bnjax.nnx.fold(model, {"blocks/1/conv2": "blocks/1/norm2"}, X)
    assert len(nnx.state(folded, nnx.BatchStat)["blocks"]) == 2
    assert_same_output(folded(X), model(X))


@pytest.mark.parametrize("norm_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_output_has_the_dtype_it_had(dtype, norm_dtype):
    fields = {"dtype": norm_dtype, "use_running_average": True}
    model = nn.Sequential([nn.Dense(4, dtype=dtype), bnjax.linen.BatchNorm(**fields)])
    x = X.reshape(64, 6)
    variables = trained(model, x)
    folded = bnjax.linen.fold(model, variables, {"layers_0": "layers_1"}, x)
    y = bnjax.linen.apply_folded(model, folded, x)
    assert_same_output(
        y, model.apply(variables, x), 1e-5 if dtype == norm_dtype == "float32" else 0.02
    )

    rngs = nnx.Rngs(0)
    layers = LinearNNX(6, 4, dtype=dtype, rngs=rngs), bnjax.nnx.BatchNorm(4, **fields, rngs=rngs)
    model = trained_nnx(nnx.Sequential(*layers))
    folded = bnjax.nnx.fold(model, {"layers/0": "layers/1"}, x)
    assert_same_output(folded(x), model(x), 1e-5 if dtype == norm_dtype == "float32" else 0.02)


def test_unfolded_variables_are_not_taken_for_folded_ones():
    """A batch norm whose statistics were forgotten must not do nothing in silence."""
    model = nn.Sequential([nn.Dense(4), bnjax.linen.BatchNorm(True, use_scale=False)])
    params = {"params": trained(model)["params"]}
    with pytest.raises(nn.module.errors.ScopeCollectionNotFound):
        bnjax.linen.apply_folded(model, params, X)


# What is refused


class Wrong(nn.Module):
    """One fault each, by name."""

    fault: str

    @nn.compact
    def __call__(self, x):
        norm = bnjax.linen.BatchNorm(
            use_running_average=True, axis=1 if self.fault == "axis" else -1
        )
        ones = nn.initializers.ones
        y = nn.Conv(8, (3, 3), name="conv", kernel_init=ones)(x)
        if self.fault == "activation":
            y = nn.relu(y)
        if self.fault == "sum":
            y = y + nn.Conv(8, (1, 1), name="other", kernel_init=ones)(x)
        z = nn.Conv(8, (1, 1), name="second", kernel_init=ones)(x) if self.fault == "second" else y
        z = norm.copy(name="norm")(z)
        if self.fault == "elsewhere":
            z = z + y
        return z


class WrongNNX(nnx.Module):
    def __init__(self, fault):
        rngs = nnx.Rngs(0)
        ones = nnx.initializers.ones
        self.fault = fault
        self.conv = nnx.Conv(3, 8, (3, 3), kernel_init=ones, rngs=rngs)
        self.other = nnx.Conv(3, 8, (1, 1), kernel_init=ones, rngs=rngs)
        self.norm = bnjax.nnx.BatchNorm(8, axis=1 if fault == "axis" else -1, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        y = self.conv(x)
        if self.fault == "activation":
            y = nnx.relu(y)
        if self.fault == "sum":
            y = y + self.other(x)
        z = self.norm(self.other(x) if self.fault == "second" else y)
        return z + y if self.fault == "elsewhere" else z


def assert_both_refuse(fault, message, pairs=None, x=None, nnx_message=None):
    """Variables are as at the start: statistics that change next to nothing, and x >= 0."""
    pairs = {"conv": "norm"} if pairs is None else pairs
    x = np.abs(X) if x is None else x
    model = Wrong(fault)
    variables = model.init(jax.random.key(0), x)
    assert_refused(lambda: bnjax.linen.fold(model, variables, pairs, x), message)
    model = WrongNNX(fault)
    assert_refused(lambda: bnjax.nnx.fold(model, pairs, x), nnx_message or message)


NOT_FED = (
    "The input of 'norm', of shape (2, 8, 8, 8), is not the output of 'conv', of shape "
    "(2, 8, 8, 8). Name the layer right before the batch norm, with no activation in between."
)


@pytest.mark.parametrize("fault", ["activation", "sum", "second"])
def test_a_batch_norm_that_something_else_feeds_is_refused(fault):
    assert_both_refuse(fault, NOT_FED)


def test_a_layer_whose_output_is_used_elsewhere_is_refused():
    assert_both_refuse(
        "elsewhere",
        "Folding 'norm' into 'conv' changes what the model returns. Leave out layers whose output "
        "is used elsewhere, too, and call the model as in evaluation.",
    )


class NormWithRelu(bnjax.linen.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x))


class NormWithReluNNX(bnjax.nnx.BatchNorm):
    def __call__(self, x):
        return nnx.relu(super().__call__(x))


def test_an_activation_inside_the_batch_norm_is_refused():
    """Others drop it in silence."""
    end = (
        "Leave out layers whose output is used elsewhere, too, and call the model as in evaluation."
    )
    model = nn.Sequential([nn.Dense(8, kernel_init=kernel), NormWithRelu(use_running_average=True)])
    variables = model.init(jax.random.key(0), X)
    assert_refused(
        lambda: bnjax.linen.fold(model, variables, {"layers_0": "layers_1"}, X),
        f"Folding 'layers_1' into 'layers_0' changes what the model returns. {end}",
    )
    rngs = nnx.Rngs(0)
    dense = nnx.Linear(3, 8, kernel_init=kernel, rngs=rngs)
    model = nnx.Sequential(dense, NormWithReluNNX(8, rngs=rngs))
    assert_refused(
        lambda: bnjax.nnx.fold(model, {"layers/0": "layers/1"}, X),
        f"Folding 'layers/1' into 'layers/0' changes what the model returns. {end}",
    )


def test_a_model_that_cannot_be_hashed():
    class Listed(nn.Module):
        sizes: list

        @nn.compact
        def __call__(self, x):
            for n in self.sizes:
                x = bnjax.linen.BatchNorm(True)(nn.Dense(n)(x))
            return x

    model, pairs = Listed([4, 4]), {"Dense_0": "BatchNorm_0", "Dense_1": "BatchNorm_1"}
    variables = trained(model)
    y = bnjax.linen.apply_folded(model, bnjax.linen.fold(model, variables, pairs, X), X)
    assert_same_output(y, model.apply(variables, X))


def test_statistics_of_positions_are_refused():
    assert_both_refuse(
        "axis",
        "'norm' has its features on axes (1,) of shape (2, 8, 8, 8), but 'conv' on (3,). "
        "Statistics of positions do not fold.",
    )


def test_paths_and_modules_that_do_not_fit_are_refused():
    similar = "Write a path with / between its names."
    assert_both_refuse(
        "",
        f"No module is called 'cnov'. Similar ones are 'conv', 'norm', ''. {similar}",
        {"cnov": "norm"},
        nnx_message="No module is called 'cnov'. Similar ones are 'conv', 'norm', 'layer_norm'. "
        + similar,
    )
    end = "Fold the arrays of another linear layer with bnjax.fold."
    assert_both_refuse(
        "",
        "'norm' is a BatchNorm, but batch norms fold into Dense, DenseGeneral, Conv, "
        f"ConvTranspose. {end}",
        {"norm": "norm"},
        nnx_message="'norm' is a BatchNorm, but batch norms fold into Linear, LinearGeneral, Conv, "
        f"ConvTranspose. {end}",
    )
    assert_both_refuse(
        "",
        "'conv' is a Conv without running mean and variance. "
        "Give pairs of a layer and the batch norm after it.",
        {"conv": "conv"},
    )
    assert_both_refuse(
        "sum",
        "'norm' is named twice. Leave out a batch norm that two layers feed.",
        {"conv": "norm", "other": "norm"},
    )


def test_a_module_that_is_not_called_is_refused():
    model = WrongNNX("")
    model.spare = bnjax.nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    assert_refused(
        lambda: bnjax.nnx.fold(model, {"conv": "spare"}, X),
        "The input of 'spare', never called, is not the output of 'conv', of shape (2, 8, 8, 8). "
        "Name the layer right before the batch norm, with no activation in between.",
    )


def test_the_right_pair_is_blamed():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = functools.partial(bnjax.linen.BatchNorm, True)
            x = norm(name="norm1")(nn.Dense(3, name="dense1")(x))
            y = nn.Dense(3, name="dense2")(x)
            return norm(name="norm2")(y), y.max()

    pairs = {"dense1": "norm1", "dense2": "norm2"}
    model = Twice()
    assert_refused(
        lambda: bnjax.linen.fold(model, trained(model), pairs, X),
        "Folding 'norm2' into 'dense2' changes what the model returns. Leave out layers whose "
        "output is used elsewhere, too, and call the model as in evaluation.",
    )


def test_a_model_in_training_is_refused():
    rngs = nnx.Rngs(0)
    dense = nnx.Linear(3, 4, kernel_init=kernel, rngs=rngs)
    model = nnx.Sequential(dense, bnjax.nnx.BatchNorm(4, rngs=rngs))

    class Training(nnx.Module):
        def __init__(self):
            self.layers = model

        def __call__(self, x):
            return self.layers.layers[1](self.layers.layers[0](x), use_running_average=False)

    assert_refused(
        lambda: bnjax.nnx.fold(Training(), {"layers/layers/0": "layers/layers/1"}, X),
        "Folding 'layers/layers/1' into 'layers/layers/0' changes what the model returns. Leave "
        "out layers whose output is used elsewhere, too, and call the model as in evaluation.",
    )


# Any precision, any draw: what is right folds, what is wrong does not


class Drawn(nn.Module):
    """Two layers; at most one fault, in the second."""

    fault: str = ""
    dtype: str | None = None
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kind = NormWithRelu if self.fault == "inside" else bnjax.linen.BatchNorm
        norms = {f"norm{i}": kind(use_running_average=True, **dtypes) for i in (1, 2)}
        x = nn.relu(norms["norm1"].copy(name="norm1")(nn.Dense(4, **dtypes, name="dense1")(x)))
        dense = nn.Dense(4, **dtypes, name="dense2")
        y = dense(x)
        z = norms["norm2"].copy(name="norm2")(jnp.abs(y) if self.fault == "between" else y)
        if self.fault == "elsewhere":
            z = z + y / 8
        if self.fault == "kernel":
            z = z + jnp.sum(dense.variables["params"]["kernel"]).astype(z.dtype)
        return z.at[:, 0].set(-jnp.inf).at[0, 1].set(jnp.nan)  # masked, as before a softmax


class DrawnNNX(nnx.Module):
    def __init__(self, fault="", dtype=None, param_dtype="float32"):
        settings = {"dtype": dtype, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
        kind = NormWithReluNNX if fault == "inside" else bnjax.nnx.BatchNorm
        self.fault = fault
        self.dense1, self.dense2 = LinearNNX(4, 4, **settings), LinearNNX(4, 4, **settings)
        self.norm1, self.norm2 = kind(4, **settings), kind(4, **settings)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.dense1(x)))
        y = self.dense2(x)
        z = self.norm2(jnp.abs(y) if self.fault == "between" else y)
        if self.fault == "elsewhere":
            z = z + y / 8
        if self.fault == "kernel":
            z = z + jnp.sum(self.dense2.kernel[...]).astype(z.dtype)
        return z.at[:, 0].set(-jnp.inf).at[0, 1].set(jnp.nan)


FAULTS = ["between", "inside", "elsewhere", "kernel", "swapped"]
PRECISIONS = [  # of parameters, of the arithmetic, of the input
    ("float32", None, "float64"),
    ("bfloat16", "float32", "float32"),
    ("float16", None, "float16"),
]


def redrawn(name, p, rng):
    """Of any size, as in networks that were trained in another way each."""
    size = 10 ** rng.uniform(-1, 1)
    value = size * (rng.uniform(0.1, 2, p.shape) if name == "var" else rng.normal(size=p.shape))
    return jnp.asarray(value, p.dtype)


def fold_drawn(fault, dtype, param_dtype, x, rng):
    model = Drawn(fault, dtype, param_dtype)
    flat = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x))
    variables = unflatten_dict({path: redrawn(path[-1], p, rng) for path, p in flat.items()})
    folded = bnjax.linen.fold(model, variables, pairs_of(fault), x)
    return bnjax.linen.apply_folded(model, folded, x), model.apply(variables, x)


def fold_drawn_nnx(fault, dtype, param_dtype, x, rng):
    model = DrawnNNX(fault, dtype, param_dtype)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable):
            variable[...] = redrawn(path[-1], variable[...], rng)
    folded = bnjax.nnx.fold(model, pairs_of(fault), x)
    model.eval()
    return folded(x), model(x)


def pairs_of(fault):
    norms = ["norm2", "norm1"] if fault == "swapped" else ["norm1", "norm2"]
    return dict(zip(["dense1", "dense2"], norms, strict=True))


@pytest.fixture
def loose():
    """float64, and the promotions that most users have."""
    jax.config.update("jax_enable_x64", True)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("fold", [fold_drawn, fold_drawn_nnx])
@pytest.mark.parametrize(("param_dtype", "dtype", "x_dtype"), PRECISIONS)
def test_right_pairs_fold_and_wrong_ones_do_not_at_any_precision(fold, param_dtype, dtype, x_dtype):
    """Rounding errors are not taken for another model, nor another model for rounding errors."""
    x = jnp.asarray(X.reshape(-1, 4)[:16], x_dtype)
    for seed in range(3):
        ours, true = fold("", dtype, param_dtype, x, np.random.default_rng(seed))
        eps = float(jnp.finfo(param_dtype).eps)
        assert_same_output(ours[1:, 1:], true[1:, 1:], 8 * eps)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(true))
        np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(true))
    for seed, fault in enumerate(FAULTS):
        with pytest.raises(ValueError, match=r"changes what the model|is not the output"):
            fold(fault, dtype, param_dtype, x, np.random.default_rng(seed))


def test_a_model_of_which_nothing_can_be_seen_is_refused():
    message = (
        "The model returns no finite number, and with NaN nothing can be checked. "
        "Give a sample input like those that it was trained with."
    )
    assert_both_refuse("", message, x=np.full_like(X, np.nan))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("var", -0.5, "the variance -0.5"),
        ("var", np.nan, "the variance nan"),
        ("var", np.inf, "the variance inf"),
        ("mean", np.nan, "the mean nan"),
        ("mean", -np.inf, "the mean -inf"),
    ],
)
def test_statistics_that_cannot_be_are_named(name, value, said):
    end = (
        f"has {said} in 1 of 8 features, which no data have. Load statistics from before, or "
        "measure them anew (bnjax.recalibrate)."
    )
    model = Wrong("")
    variables = model.init(jax.random.key(0), X)
    stats = variables["batch_stats"]["norm"]
    stats[name] = stats[name].at[2].set(value)
    pairs = {"conv": "norm"}
    refused = f"The batch norm 'norm' {end}"
    assert_refused(lambda: bnjax.linen.fold(model, variables, pairs, X), refused)
    model = WrongNNX("")
    getattr(model.norm, name)[...] = stats[name]
    assert_refused(lambda: bnjax.nnx.fold(model, pairs, X), refused)
    m = bnjax.Moments(stats["mean"], stats["var"])
    assert_refused(lambda: bnjax.fold(jnp.ones((3, 8)), None, m), f"m {end}")


def test_a_mask_in_the_call_does_nothing_in_inference():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            x = nn.Dense(4, kernel_init=kernel, name="dense")(x)
            return bnjax.linen.BatchNorm(name="norm")(x, True, mask=mask)

    class MaskedNNX(nnx.Module):
        def __init__(self):
            self.dense = LinearNNX(3, 4, rngs=nnx.Rngs(0))
            self.norm = bnjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x, mask):
            return self.norm(x=self.dense(x), mask=mask)

    mask = jnp.arange(8) < 5
    model, pairs = Masked(), {"dense": "norm"}
    variables = model.init(jax.random.key(0), X, mask[:, None])
    folded = bnjax.linen.fold(model, variables, pairs, X, mask[:, None])
    y = bnjax.linen.apply_folded(model, folded, X, mask[:, None])
    assert_same_output(y, model.apply(variables, X, mask[:, None]))
    model = trained_nnx(MaskedNNX())
    assert_same_output(
        bnjax.nnx.fold(model, pairs, X, mask[:, None])(X, None), model(X, mask[:, None])
    )


class Unbiased(nnx.Linear):
    """Takes no notice of a bias."""

    def __call__(self, x):
        return x @ self.kernel[...]


class Standardized(nn.Dense):
    """Takes no notice of its kernel's size (Qiao et al., 2019)."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return x @ (kernel / jnp.sqrt(jnp.sum(kernel**2, 0, keepdims=True)))


def test_layers_that_compute_in_another_way_are_refused():
    changes = (
        "Folding {} changes what the model returns. Leave out layers whose output is used "
        "elsewhere, too, and call the model as in evaluation."
    )
    model = nn.Sequential([Standardized(8, kernel_init=kernel), bnjax.linen.BatchNorm(True)])
    variables = model.init(jax.random.key(0), X)
    assert_refused(
        lambda: bnjax.linen.fold(model, variables, {"layers_0": "layers_1"}, X),
        changes.format("'layers_1' into 'layers_0'"),
    )
    rngs = nnx.Rngs(0)
    dense = Unbiased(3, 8, use_bias=False, kernel_init=kernel, rngs=rngs)
    model = nnx.Sequential(dense, bnjax.nnx.BatchNorm(8, rngs=rngs))
    assert_refused(
        lambda: bnjax.nnx.fold(model, {"layers/0": "layers/1"}, X),
        changes.format("'layers/1' into 'layers/0'"),
    )


def test_a_kernel_that_two_layers_share_is_refused():
    rngs = nnx.Rngs(0)
    dense = functools.partial(nnx.Linear, 3, 3, kernel_init=kernel, rngs=rngs)
    model = nnx.Sequential(dense(), bnjax.nnx.BatchNorm(3, rngs=rngs), dense())
    model.layers[2].kernel = model.layers[0].kernel
    with pytest.raises(ValueError, match="'layers/1' into 'layers/0' changes"):
        bnjax.nnx.fold(model, {"layers/0": "layers/1"}, X)


def test_a_layer_of_another_name_folds_as_what_it_is():
    class Named(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x)

    model = nn.Sequential([Named(4), bnjax.linen.BatchNorm(True)])
    variables = trained(model)
    folded = bnjax.linen.fold(model, variables, {"layers_0": "layers_1"}, X)
    assert_same_output(bnjax.linen.apply_folded(model, folded, X), model.apply(variables, X))
