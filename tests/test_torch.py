"""Batch norms from PyTorch and back, and runs that go on here."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import assert_refused
from flax import nnx
from samples import every_pair

import bnjax
import bnjax.linen
import bnjax.nnx

EPSILON = 1e-3


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
@every_pair(
    make=[of_linen, of_nnx],
    kind=SHAPES,
    remembers=[(0.1, True), (0.1, False), (None, True)],
    affine=[True, False],
)
def test_a_pytorch_run_goes_on(make, kind, remembers, affine):
    momentum, tracks = remembers
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
    assert list(bnjax.from_torch(state, "bn1.")[0]) == list(bnjax.from_torch(state, "bn1")[0])
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


# Tensors as PyTorch has them


class Tensor:
    """Gives NumPy its values, or refuses to, as PyTorch's does."""

    def __init__(self, values, dtype="float32", requires_grad=False, device="cpu"):
        self.values = np.asarray(values, jnp.bfloat16 if dtype == "bfloat16" else dtype)
        self.dtype = f"torch.{dtype}"
        self.requires_grad, self.device = requires_grad, device

    def changed(self, **fields):
        copy = Tensor(self.values, self.dtype.removeprefix("torch."))
        vars(copy).update({**vars(self), **fields})
        return copy

    def detach(self):
        return self.changed(requires_grad=False)

    def cpu(self):
        return self.changed(device="cpu")

    def float(self):
        return self.changed(values=self.values.astype(np.float32), dtype="torch.float32")

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.device != "cpu":
            raise TypeError(f"can't convert {self.device} device type tensor to numpy.")
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return np.array(self.values, dtype)


NORM = {
    "weight": np.float32([0.5, 1.25, -3]),
    "bias": np.float32([1, 0, 2]),
    "running_mean": np.float32([0.125, 100, -7]),
    "running_var": np.float32([2, 1e-3, 5]),
}


def exact(dtype):
    """Values of every exponent, each of which this dtype holds."""
    rng = np.random.default_rng(0)
    low, high = (np.log2(float(p)) for p in (jnp.finfo(dtype).tiny, jnp.finfo(dtype).max))
    values = rng.choice([-1, 1], 600) * 2.0 ** rng.uniform(low, high, 600)
    return np.asarray(jnp.asarray(np.append(values, [0, np.inf]), dtype))


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_read_without_pytorch(dtype, requires_grad, device):
    values = exact(dtype)
    state = {
        "weight": Tensor(values, dtype, requires_grad, device),
        "running_mean": Tensor(values[::-1], dtype, device=device),
        "running_var": Tensor(values, dtype, device=device),
        "num_batches_tracked": Tensor(5, "int64", device=device),
    }
    params, batch_stats = bnjax.from_torch(state)
    for ours, true in (
        (params["scale"], values),
        (batch_stats["mean"], values[::-1]),
        (batch_stats["var"], values),
    ):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours), true)
    assert batch_stats["steps"] == 5
    assert batch_stats["steps"].dtype == jnp.int32


def test_bfloat16_goes_to_pytorch_as_float32():
    """Exactly, and back: NumPy has no dtype that PyTorch would read."""
    values = exact("bfloat16")
    back = bnjax.to_torch({"scale": values}, {"mean": values, "var": jnp.asarray(values)})
    for p in back.values():
        assert p.dtype == np.float32
        np.testing.assert_array_equal(p.astype(jnp.bfloat16), values)
    half = bnjax.to_torch({"scale": exact("float16")}, {})["weight"]
    assert half.dtype == np.float16


@pytest.mark.parametrize("given", [2**31 - 1, 2**31, 3 * 10**9, 2**40])
def test_a_counter_beyond_32_bits_does_not_turn_negative(given):
    """Nor in the next steps: the average goes on as the plain one over so many batches."""
    state = {**NORM, "num_batches_tracked": np.array(given)}
    _, batch_stats = bnjax.from_torch(state)
    assert batch_stats["steps"].dtype == jnp.int32
    assert batch_stats["steps"] == 2**31 - 1
    m = bnjax.moments(jnp.ones((4, 3)))
    for _ in range(2):
        updated = bnjax.update_stats(batch_stats, m, momentum=None)
        assert updated["steps"] == 2**31 - 1
        for name in ("mean", "var"):
            np.testing.assert_array_equal(updated[name], batch_stats[name])
        batch_stats = updated


@pytest.mark.usefixtures("float64")
def test_a_counter_beyond_32_bits_is_kept_in_64():
    state = {**NORM, "num_batches_tracked": np.array(3 * 10**9)}
    params, batch_stats = bnjax.from_torch(state)
    assert batch_stats["steps"].dtype == jnp.int64
    back = bnjax.to_torch(params, batch_stats)
    assert back["num_batches_tracked"] == 3 * 10**9
    batch_stats = bnjax.update_stats(batch_stats, bnjax.moments(jnp.ones((4, 3))), momentum=None)
    assert batch_stats["steps"] == 3 * 10**9 + 1


# Whole models


def model_state(prefix=""):
    """As of a model with other layers and, in one place, no scale and bias."""
    state = {"conv1.weight": np.ones((3, 3, 1, 1)), "ln.weight": np.ones(3), "ln.bias": np.ones(3)}
    state |= {f"bn1.{name}": p for name, p in NORM.items()}
    state |= {f"layer1.0.bn2.{name}": 2 * p for name, p in NORM.items() if "running" in name}
    state |= {"layer1.0.bn2.num_batches_tracked": np.array(7), "layer1.0.bn2.act.slope": np.ones(1)}
    return {prefix + name: p for name, p in state.items()}


@pytest.mark.parametrize("prefix", ["", "module", "ema_model.module"])
def test_all_batch_norms_of_a_model_at_once(prefix):
    state = {"n_averaged": np.array(3)}
    if prefix:
        state |= model_state()  # not the averaged weights
    state |= {
        name: -p if name.endswith("mean") else p
        for name, p in model_state(f"{prefix}." if prefix else "").items()
    }
    params, batch_stats = bnjax.from_torch_model(state, prefix)
    assert list(params) == list(batch_stats) == ["bn1", "layer1.0.bn2"]
    assert [*params["bn1"]] == ["scale", "bias"]
    assert not params["layer1.0.bn2"]
    np.testing.assert_array_equal(params["bn1"]["scale"], NORM["weight"])
    np.testing.assert_array_equal(batch_stats["bn1"]["mean"], -NORM["running_mean"])
    np.testing.assert_array_equal(batch_stats["layer1.0.bn2"]["mean"], -2 * NORM["running_mean"])
    assert batch_stats["layer1.0.bn2"]["steps"] == 7
    for name in params:
        full = f"{prefix}.{name}" if prefix else name
        for key, p in bnjax.to_torch(params[name], batch_stats[name], full).items():
            np.testing.assert_array_equal(p, state[key])


def test_a_batch_norm_alone_is_a_model():
    params, batch_stats = bnjax.from_torch_model(NORM)
    assert list(params) == list(batch_stats) == [""]
    same, _ = bnjax.from_torch_model({f"bn.{name}": p for name, p in NORM.items()}, "bn")
    np.testing.assert_array_equal(same[""]["scale"], params[""]["scale"])


def test_a_model_without_batch_norms_is_refused():
    assert_refused(
        lambda: bnjax.from_torch_model(model_state(), "module"),
        "state_dict has no batch norm with running statistics under the prefix 'module'. Those in "
        "it are 'bn1', 'layer1.0.bn2'. Its first entries are 'conv1.weight', 'ln.weight', "
        "'ln.bias'.",
    )
    assert_refused(
        lambda: bnjax.from_torch_model({"epoch": 5, "state_dict": model_state()}),
        "state_dict has no batch norm with running statistics under the prefix ''. Those in it "
        "are none. Its first entries are 'epoch', 'state_dict'.",
    )
    lacking = {name: p for name, p in model_state().items() if name != "bn1.running_var"}
    assert_refused(
        lambda: bnjax.from_torch_model(lacking),
        "state_dict has 'bn1.running_mean', but not 'bn1.running_var'. "
        "Give all entries of the batch norm.",
    )
