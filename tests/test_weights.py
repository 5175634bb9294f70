"""Trained weights: fold the arrays of one layer; PyTorch in and out; what weight decay is for."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.core import freeze, unfreeze
from test_inputs import assert_refused

import bnjax
import bnjax.linen
import bnjax.nnx

EPSILON = 1e-3


def trained(features, seed=0):
    """Running statistics, scale and bias of a batch norm somewhere in a trained network."""
    rng = np.random.default_rng(seed)
    mean, scale, bias = rng.standard_normal((3, *features))
    return bnjax.Moments(mean, rng.uniform(0.2, 3, features)), scale, bias


def float32(tree):
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), tree)


def assert_relative(ours, true, tolerance=1e-5):
    assert ours.shape == true.shape
    ours = np.asarray(ours, np.float64)
    assert np.abs(ours - true).max() <= tolerance * np.abs(true).max()


def assert_folds(layer, x_shape, *, norm_axes=(-1,), feature_axis=-1, sizes=None):
    """The folded linen layer alone gives the normalized output of the layer, in float64."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal(x_shape), jnp.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    bias = params.get("bias")
    if bias is not None:
        params["bias"] = bias = jnp.arange(bias.size, dtype=jnp.float32).reshape(bias.shape)
    y = layer.apply({"params": params}, x)
    m, scale, shift = trained(tuple(y.shape[i] for i in norm_axes))
    true = reference.normalize(
        y, m.mean, m.var, scale, shift, feature_axis=norm_axes, epsilon=EPSILON
    ).astype(np.float64)

    kernel, bias = bnjax.fold(
        params["kernel"],
        bias,
        *float32((m, scale, shift)),
        feature_axis=feature_axis,
        epsilon=EPSILON,
    )
    assert kernel.dtype == bias.dtype == jnp.float32
    folded = layer.clone(use_bias=True)
    assert_relative(folded.apply({"params": {"kernel": kernel, "bias": bias}}, x), true)


CONVOLUTIONS = [
    dict(padding=padding, strides=strides, feature_group_count=groups, kernel_dilation=dilation)
    for padding, strides, groups, dilation in itertools.product(
        ["SAME", "VALID", "CIRCULAR", "REFLECT", 1, ((0, 2), (1, 0))], [1, 2], [1, 2, 4], [1, 2]
    )
]


@pytest.mark.parametrize("fields", CONVOLUTIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_folding_into_a_convolution(fields):
    use_bias = CONVOLUTIONS.index(fields) % 2 == 0
    assert_folds(nn.Conv(8, (3, 3), use_bias=use_bias, **fields), (2, 7, 6, 4))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("ndim", [1, 3])
def test_folding_into_convolutions_of_other_ranks(ndim, strides, use_bias):
    padding = "CAUSAL" if ndim == 1 else "SAME"
    layer = nn.Conv(5, (3,) * ndim, strides, padding, use_bias=use_bias)
    assert_folds(layer, (2, *[4] * ndim, 3))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("transpose_kernel", [True, False])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", ((0, 2), (1, 0))])
def test_folding_into_a_transposed_convolution(padding, strides, transpose_kernel, dilation):
    layer = nn.ConvTranspose(
        5,
        (3, 2),
        (strides, strides),
        padding,
        (dilation, dilation),
        transpose_kernel=transpose_kernel,
        use_bias=dilation == 1,
    )
    assert_folds(layer, (2, 4, 5, 3), feature_axis=-2 if transpose_kernel else -1)


@pytest.mark.parametrize("use_bias", [True, False])
def test_folding_into_a_dense_layer(use_bias):
    assert_folds(nn.Dense(5, use_bias=use_bias), (6, 3))
    assert_folds(nn.DenseGeneral(5, axis=(1, 2), use_bias=use_bias), (6, 3, 4))
    several = nn.DenseGeneral((2, 5), use_bias=use_bias)
    assert_folds(several, (6, 3), norm_axes=(-2, -1), feature_axis=(-2, -1))
    batched = nn.DenseGeneral((2, 5), batch_dims=(0,), use_bias=use_bias)
    assert_folds(batched, (3, 6, 4), norm_axes=(0, -2, -1), feature_axis=(0, -2, -1))


def test_folding_keeps_the_dtypes_of_the_layer():
    m, scale, bias = float32(trained((4,)))
    half = jnp.ones((3, 4), jnp.bfloat16)
    assert [p.dtype for p in bnjax.fold(half, None, m)] == [jnp.bfloat16] * 2
    kernel, own = bnjax.fold(half, jnp.ones(4), m, scale, bias)
    assert (kernel.dtype, own.dtype) == (jnp.bfloat16, jnp.float32)
    assert_relative(kernel.astype(jnp.float32), np.tile(scale / np.sqrt(m.var), (3, 1)), 5e-3)


def test_folding_a_complex_normalization():
    rng = np.random.default_rng(0)
    x, w, mean, scale = (
        (rng.standard_normal((2, *s)) * [[[1]], [[1j]]]).sum(0).astype(np.complex64)
        for s in [(6, 3), (3, 4), (1, 4), (1, 4)]
    )
    m, scale = bnjax.Moments(mean[0], jnp.arange(1.0, 5)), scale[0]
    for kernel in (w, w.real):
        true = (x @ kernel - mean) / np.sqrt(np.arange(1.0, 5) + 1e-5) * scale
        folded, bias = bnjax.fold(kernel, None, m, scale)
        np.testing.assert_allclose(x @ np.asarray(folded) + np.asarray(bias), true, rtol=1e-4)


def test_folding_refuses_what_does_not_fit():
    kernel, m = jnp.ones((3, 4)), bnjax.Moments(jnp.ones(4), jnp.ones(4))
    end = "Give one value for each feature, or another feature_axis."
    said = "but kernel has shape (3, 4) and features of shape"
    for name, args in {
        "kernel_bias": (kernel, jnp.ones(3), m),
        "mean": (kernel, None, m._replace(mean=jnp.ones(3))),
        "var": (kernel, None, m._replace(var=jnp.ones(3))),
        "scale": (kernel, None, m, jnp.ones(3)),
        "bias": (kernel, None, m, None, jnp.ones(3)),
    }.items():
        message = f"{name} has shape (3,), {said} (4,) on axis -1. {end}"
        assert_refused(lambda args=args: bnjax.fold(*args), message)
    assert_refused(
        lambda: bnjax.fold(kernel, None, m, feature_axis=0),
        f"mean has shape (4,), {said} (3,) on axis 0. {end}",
    )
    assert_refused(
        lambda: bnjax.fold(kernel, None, m, feature_axis=2),
        "feature_axis (a layer's axis) is 2, but kernel has shape (3, 4). Choose from -2 to 1.",
    )
    assert_refused(
        lambda: bnjax.fold(kernel, None, m, epsilon=0),
        "epsilon is 0, but it keeps the variance away from zero. "
        "Choose a positive number, such as 1e-5.",
    )


# PyTorch


class Documented:
    """PyTorch's layer as its documentation says it, in NumPy: the oracle without PyTorch."""

    def __init__(self, shape, momentum, affine, track_running_stats):
        rng = np.random.default_rng(0)
        n = shape[1]
        self.momentum, self.state = momentum, {}
        if affine:
            self.state |= {"weight": rng.uniform(0.5, 2, n), "bias": rng.standard_normal(n)}
        if track_running_stats:
            statistics = rng.standard_normal(n), rng.uniform(0.5, 2, n)
            self.state |= dict(zip(["running_mean", "running_var"], statistics, strict=True))
            self.state["num_batches_tracked"] = np.array(7)

    def train(self, x, dy):
        """Output and input gradient; the running statistics move."""
        state, settings = self.state, {"feature_axis": 1, "epsilon": EPSILON}
        scale, bias = state.get("weight", 1.0), state.get("bias", 0.0)
        if "running_mean" in state:
            state["num_batches_tracked"] = state["num_batches_tracked"] + 1
            share = self.momentum
            if share is None:
                share = 1 / state["num_batches_tracked"]
            m = reference.moments(x, feature_axis=1)
            n = x.size // x.shape[1]
            for name, new in (("running_mean", m.mean), ("running_var", m.var * n / (n - 1))):
                state[name] = np.asarray((1 - share) * state[name] + share * new, np.float64)
        y = reference.batch_norm(x, scale, bias, **settings)
        return y, reference.gradient(x, dy, scale, **settings).x

    def evaluate(self, x):
        """Without running statistics, the batch's."""
        state = self.state
        if "running_mean" not in state:
            return self.train(x, x)[0]
        statistics = state["running_mean"], state["running_var"]
        scale, bias = state.get("weight", 1.0), state.get("bias", 0.0)
        return reference.normalize(x, *statistics, scale, bias, feature_axis=1, epsilon=EPSILON)


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


SHAPES = {"BatchNorm1d": (6, 3, 4), "BatchNorm2d": (4, 3, 2, 5), "BatchNorm3d": (2, 3, 2, 3, 2)}
RUNS = [
    (kind, momentum, affine, tracks)
    for kind, momentum, affine, tracks in itertools.product(
        SHAPES, [0.1, None], [True, False], [True, False]
    )
    if tracks or momentum
]


def batches(shape):
    """Ten of them: inputs of large mean, and gradients of the output."""
    rng = np.random.default_rng(1)
    return [(5 + 3 * rng.standard_normal(shape), rng.standard_normal(shape)) for _ in range(10)]


def near(ours, true):
    np.testing.assert_allclose(
        np.asarray(ours), np.asarray(true, np.float64), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(("kind", "momentum", "affine", "tracks"), RUNS)
def test_the_oracle_is_pytorch(kind, momentum, affine, tracks):
    torch = pytest.importorskip("torch")
    oracle = Documented(SHAPES[kind], momentum, affine, tracks)
    layer = getattr(torch.nn, kind)(3, EPSILON, momentum, affine, tracks, dtype=torch.float64)
    layer.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in oracle.state.items()})
    for x, dy in batches(SHAPES[kind]):
        x_torch = torch.from_numpy(x).requires_grad_()
        y = layer(x_torch)
        y.backward(torch.from_numpy(dy))
        true_y, true_dx = oracle.train(x, dy)
        near(y.detach().numpy(), true_y)
        near(x_torch.grad.numpy(), true_dx)
    assert list(layer.state_dict()) == list(oracle.state)
    for name, p in layer.state_dict().items():
        near(p.numpy(), oracle.state[name])
    layer.eval()
    near(layer(torch.from_numpy(x)).detach().numpy(), oracle.evaluate(x))


def loaded(state, momentum):
    """Settings and variables of our layer that go on from PyTorch's, as `from_torch` says."""
    params, batch_stats = bnjax.from_torch(state)
    settings = {
        "axis": 1,
        "epsilon": EPSILON,
        "momentum": None if momentum is None else 1 - momentum,
        "ddof": 1,
        "use_scale": "scale" in params,
        "use_bias": "bias" in params,
        "param_dtype": jnp.float64,
    }
    if momentum is not None:
        batch_stats.pop("steps", None)
    return settings, params, batch_stats


def of_linen(settings, params, batch_stats):
    """A function of one call, and one that gives the variables."""
    layer = bnjax.linen.BatchNorm(**settings)
    variables = {"params": params, "batch_stats": batch_stats}
    if not batch_stats:
        start = layer.init(jax.random.key(0), jnp.ones((2, 3, 1)), True)
        variables["batch_stats"] = start["batch_stats"]

    @functools.partial(jax.jit, static_argnums=2)
    def apply(variables, x, evaluates):
        return layer.apply(variables, x, evaluates, mutable=["batch_stats"])

    def call(x, evaluates):
        y, updates = apply(variables, x, evaluates)
        return y, updates["batch_stats"]

    def keep(batch_stats):
        variables["batch_stats"] = batch_stats

    return call, keep


def of_nnx(settings, params, batch_stats):
    layer = bnjax.nnx.BatchNorm(3, **settings, rngs=nnx.Rngs(0))
    nnx.update(layer, {**params, **batch_stats})

    @functools.partial(nnx.jit, static_argnums=2)
    def apply(layer, x, evaluates):
        return layer(x, evaluates)

    def call(x, evaluates):
        copy = nnx.clone(layer)
        y = apply(copy, x, evaluates)
        return y, nnx.to_pure_dict(nnx.state(copy, nnx.BatchStat))

    return call, functools.partial(nnx.update, layer)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [of_linen, of_nnx])
@pytest.mark.parametrize(("kind", "momentum", "affine", "tracks"), RUNS)
def test_a_pytorch_run_goes_on(make, kind, momentum, affine, tracks):
    oracle = Documented(SHAPES[kind], momentum, affine, tracks)
    settings, params, batch_stats = loaded(oracle.state, momentum)
    call, keep = make(settings, params, batch_stats)
    for x, dy in batches(SHAPES[kind]):
        y, pull_back, batch_stats = jax.vjp(lambda x: call(x, False), jnp.asarray(x), has_aux=True)
        keep(batch_stats)
        true_y, true_dx = oracle.train(x, dy)
        near(y, true_y)
        near(pull_back(jnp.asarray(dy))[0], true_dx)
    if tracks:
        back = bnjax.to_torch(params, batch_stats)
        assert set(back) | {"num_batches_tracked"} == set(oracle.state)
        for name, p in back.items():
            near(p, oracle.state[name])
    near(call(x, tracks)[0], oracle.evaluate(x))


STATES = [Documented(SHAPES["BatchNorm1d"], 0.1, *on).state for on in [(1, 1), (1, 0), (0, 1)]]
STATES.append({name: p for name, p in STATES[0].items() if name != "bias"})  # bias=False


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prefix", ["", "layer1.0.bn"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: "-".join(state))
def test_there_and_back(state, prefix):
    dot = f"{prefix}." if prefix else ""
    state = {dot + name: p for name, p in state.items()}
    others = {"layer1.0.conv.weight": np.ones((2, 2, 3, 3))} if prefix else {}
    params, batch_stats = bnjax.from_torch({**others, **state}, prefix)
    assert all(isinstance(p, jax.Array) for p in jax.tree.leaves((params, batch_stats)))
    assert ("steps" in batch_stats) == (f"{dot}num_batches_tracked" in state)
    assert batch_stats.get("steps", jnp.zeros((), jnp.int32)).dtype == jnp.int32
    back = bnjax.to_torch(params, batch_stats, prefix)
    assert list(back) == list(state)
    for name, p in state.items():
        assert back[name].dtype == p.dtype
        np.testing.assert_array_equal(back[name], p)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("kind", [*SHAPES, "SyncBatchNorm"])
def test_there_and_back_with_pytorchs_layers(kind, affine, tracks):
    torch = pytest.importorskip("torch")
    layer, other = (
        getattr(torch.nn, kind)(3, affine=affine, track_running_stats=tracks) for _ in range(2)
    )
    for p in layer.state_dict().values():
        p.copy_(torch.rand(p.shape) * 9)
    back = bnjax.to_torch(*bnjax.from_torch(layer.state_dict()))
    other.load_state_dict({name: torch.from_numpy(p) for name, p in back.items()})
    for name, p in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], p)


def test_what_comes_from_pytorch_is_a_copy():
    mean = np.zeros(3)
    _, batch_stats = bnjax.from_torch({"running_mean": mean, "running_var": np.ones(3)})
    back = bnjax.to_torch({}, batch_stats)
    mean += 1
    back["running_mean"] += 1
    np.testing.assert_array_equal(batch_stats["mean"], 0)


def test_entries_that_are_not_batch_norms_are_refused():
    norm = {
        "weight": np.ones(3),
        "bias": np.ones(3),
        "running_mean": np.ones(3),
        "running_var": np.ones(3),
        "num_batches_tracked": np.array(1),
    }
    state = {f"{layer}.{name}": p for layer in ("bn1", "bn2") for name, p in norm.items()}
    state |= {"conv.weight": np.ones((3, 2)), "conv.bias": np.ones(3), "fc.weight_g": np.ones(3)}
    assert_refused(
        lambda: bnjax.from_torch(state, "bn3"),
        "state_dict has no entry that starts with 'bn3.'. Batch norms in it are 'bn1', 'bn2'.",
    )
    assert_refused(
        lambda: bnjax.from_torch({"a": np.ones(3)}, "bn"),
        "state_dict has no entry that starts with 'bn.'. Batch norms in it are none.",
    )
    assert_refused(
        lambda: bnjax.from_torch(state, "fc"),
        "state_dict has 'fc.weight_g', but a batch norm has 'fc.weight', 'fc.bias', "
        "'fc.running_mean', 'fc.running_var', 'fc.num_batches_tracked'. "
        "Give the prefix of one batch norm.",
    )
    assert_refused(
        lambda: bnjax.from_torch(state, "conv"),
        "The shapes are conv.weight (scale) (3, 2), conv.bias (bias) (3,). In a PyTorch batch "
        "norm all are [features], and num_batches_tracked (steps) is a scalar.",
    )
    for missing, present in {
        "weight": "bias",
        "running_mean": "running_var",
        "running_var": "running_mean",
    }.items():
        rest = {name: p for name, p in state.items() if name != f"bn1.{missing}"}
        assert_refused(
            lambda rest=rest: bnjax.from_torch(rest, "bn1"),
            f"state_dict has 'bn1.{present}', but not 'bn1.{missing}'. "
            "Give all entries of the batch norm.",
        )
    with_steps = {**norm, "num_batches_tracked": np.ones(3)}
    with pytest.raises(ValueError, match=r"num_batches_tracked \(steps\) \(3,\)"):
        bnjax.from_torch(with_steps)


def test_variables_that_are_not_batch_norms_are_refused():
    assert_refused(
        lambda: bnjax.to_torch({"Conv_0": {}, "BatchNorm_0": {}}, {}),
        "params has 'Conv_0', 'BatchNorm_0', but batch normalization has 'scale', 'bias'. "
        "Give the variables of one layer.",
    )
    stats = {"mean": np.ones((2, 3)), "var": np.ones((2, 3))}
    assert_refused(
        lambda: bnjax.to_torch({}, stats, "bn"),
        "The shapes are bn.running_mean (mean) (2, 3), bn.running_var (var) (2, 3). In a PyTorch "
        "batch norm all are [features], and num_batches_tracked (steps) is a scalar.",
    )


# What weight decay is for


class Network(nn.Module):
    """Its names and ranks mislead on purpose."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="BatchNorm_5")(x)
        x = bnjax.linen.BatchNorm(True, axis=(-2, -1), name="Dense_0")(x.reshape(-1, 2, 2))
        x = nn.BatchNorm(True, use_scale=False)(x)
        x = nn.LayerNorm()(x)
        return x * self.param("scale", nn.initializers.ones, (1, 1, 2))


def test_only_batch_norms_scales_and_biases_are_left_out():
    variables = Network().init(jax.random.key(0), jnp.ones((3, 4)))
    for wrap in (lambda tree: tree, freeze):
        params = wrap(variables["params"])
        mask = bnjax.decay_mask(params, wrap(variables["batch_stats"]))
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        assert unfreeze(mask) == {
            "BatchNorm_5": {"kernel": True, "bias": True},
            "Dense_0": {"scale": False, "bias": False},
            "BatchNorm_0": {"bias": False},
            "LayerNorm_0": {"scale": True, "bias": True},
            "scale": True,
        }
    layer = bnjax.linen.BatchNorm(True).init(jax.random.key(0), jnp.ones((3, 4)))
    assert bnjax.decay_mask(**layer) == {"scale": False, "bias": False}


def test_a_kernel_in_the_module_of_the_statistics_decays():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (4, 3))
            self.variable("batch_stats", "mean", jnp.zeros, 3)
            return x @ kernel

    variables = Own().init(jax.random.key(0), jnp.ones((3, 4)))
    assert bnjax.decay_mask(**variables) == {"kernel": True}


def test_whole_variables_are_refused():
    variables = Network().init(jax.random.key(0), jnp.ones((3, 4)))
    end = 'Give variables["params"] and variables["batch_stats"].'
    for name, args in {
        "params": (variables, variables["batch_stats"]),
        "batch_stats": (variables["params"], {"batch_stats": variables["batch_stats"]}),
    }.items():
        assert_refused(
            lambda args=args: bnjax.decay_mask(*args),
            f"{name} has an entry {name!r}, as the whole variables have. {end}",
        )


def after_decay(before, after):
    """Which leaves a step without gradients moved."""
    return jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)


def test_optax_decays_what_the_mask_says_in_linen():
    variables = Network().init(jax.random.key(0), jnp.ones((3, 4)))
    params = jax.tree.map(jnp.ones_like, variables["params"])
    mask = bnjax.decay_mask(params, variables["batch_stats"])
    optimizer = optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(0.1))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert after_decay(params, optax.apply_updates(params, updates)) == mask


def test_optax_decays_what_the_mask_says_in_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
    model.layers[0].bias[...] = jnp.ones(4)
    model.layers[1].bias[...] = jnp.ones(4)
    params = nnx.state(model, nnx.Param)
    mask = bnjax.decay_mask(params, nnx.state(model, nnx.BatchStat))
    assert nnx.to_pure_dict(mask) == {
        "layers": {0: {"bias": True, "kernel": True}, 1: {"bias": False, "scale": False}}
    }
    before = jax.tree.map(jnp.copy, params)
    transform = optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, params))
    moved = after_decay(before, nnx.state(model, nnx.Param))
    assert jax.tree.leaves(moved) == jax.tree.leaves(mask)


# Recipes for fine-tuning


X = 3 + np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for name in ("stem", "head"):
            x = nn.Dense(4)(x)
            x = bnjax.linen.BatchNorm(name=name)(x, use_running_average=not train)
        return x


def freeze_stem(call, args, kwargs, context):
    if context.module.path == ("stem",):
        kwargs["use_running_average"] = True
    return call(*args, **kwargs)


def test_some_statistics_are_frozen_by_path_in_linen():
    network = TwoLayers()
    variables = network.init(jax.random.key(0), X, False)

    def features(variables, train, **kwargs):
        return network.apply(variables, X, train, capture_intermediates=True, **kwargs)

    with nn.intercept_methods(freeze_stem):
        _, seen = features(variables, True, mutable=["batch_stats", "intermediates"])
    for name, is_frozen in (("stem", True), ("head", False)):
        stats = [v["batch_stats"][name] for v in (variables, seen)]
        assert after_decay(*stats) == dict.fromkeys(("mean", "var"), not is_frozen)
    _, evaluated = features(variables, False, mutable=["intermediates"])
    outputs = [s["intermediates"]["stem"]["__call__"][0] for s in (seen, evaluated)]
    np.testing.assert_array_equal(*outputs)


def two_layers():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        *(
            nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
            for _ in range(2)
        )
    )


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_some_statistics_or_all_are_frozen_in_nnx(frozen):
    model = two_layers()
    model.train()
    for i in frozen:
        model.layers[i].eval()
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    grads = nnx.grad(lambda model: jnp.mean((model(X) - 1) ** 2))(model)
    moved = nnx.to_pure_dict(after_decay(before, nnx.state(model, nnx.BatchStat)))
    assert {i for i in range(2) if not moved["layers"][i]["layers"][1]["mean"]} == {*frozen}
    # With its own batch's statistics a batch norm passes no gradient to the bias before it.
    bias = grads["layers"][1]["layers"][0]["bias"][...]
    assert (float(jnp.abs(bias).max()) > 1e-3) == (1 in frozen)


def test_scale_and_bias_are_frozen():
    model = two_layers()
    params = nnx.state(model, nnx.Param)
    before = jax.tree.map(jnp.copy, params)
    mask = bnjax.decay_mask(params, nnx.state(model, nnx.BatchStat))
    freezing = optax.multi_transform({True: optax.sgd(0.1), False: optax.set_to_zero()}, mask)
    optimizer = nnx.Optimizer(model, freezing, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    moved = after_decay(before, nnx.state(model, nnx.Param))
    assert jax.tree.leaves(moved) == jax.tree.leaves(mask)
    assert set(jax.tree.leaves(mask)) == {True, False}
