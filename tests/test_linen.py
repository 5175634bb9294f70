"""`bnjax.linen.BatchNorm` is a drop-in for flax's layer; where the two differ, it is right."""

import dataclasses
import functools
import inspect

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference
from checks import assert_agree
from jax import lax
from samples import around_one, between_signs, fields_of_flaxs_layers, kernel, well_scaled

import bnjax.linen

KEY = jax.random.key(0)
BOTH = (bnjax.linen.BatchNorm, nn.BatchNorm)


def train(layer, variables, x, dy, **call):
    """A training step: output, statistics after it, gradients of sum(y dy) by params and x."""

    @jax.jit
    def step(variables, x, dy):
        def output(params, x):
            new = {**variables, "params": params}
            y, updates = layer.apply(new, x, **call, mutable=["batch_stats"])
            return y, updates["batch_stats"]

        y, pull_back, stats = jax.vjp(output, variables.get("params", {}), x, has_aux=True)
        return y, stats, *pull_back(dy.astype(y.dtype))

    return step(variables, x, dy)


def as_given(layer, given, value):
    """The layer and its call, with use_running_average given to one of them."""
    if given == "constructor":
        return layer.clone(use_running_average=value), {}
    return layer, {"use_running_average": value}


# The layer as a drop-in.


def test_fields_defaults_and_call_are_flaxs():
    ours, theirs = (
        {f.name: f.default for f in dataclasses.fields(layer) if f.name not in ("parent", "name")}
        for layer in BOTH
    )
    beyond = {
        "pivot": "auto",
        "debias": False,
        "ddof": 0,
        "ghost_batch_size": None,
        "eval_momentum": 1.0,
        "skip_nonfinite": False,
    }
    assert dict(list(ours.items())[-len(beyond) :]) == beyond
    ours = {name: default for name, default in ours.items() if name not in beyond}
    assert list(ours.items()) == list(theirs.items())
    ours, theirs = (inspect.signature(layer.__call__).parameters.values() for layer in BOTH)
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]


@pytest.mark.parametrize(
    "row",
    fields_of_flaxs_layers(
        x_dtype=[jnp.float32, jnp.bfloat16],
        dtype=[None, jnp.float32, jnp.float16],
        given=["constructor", "call"],
        axis=[-1, 1, (-1, 1)],
    ),
)
def test_agrees_with_flax_over_100_steps(row):
    """Two replicas train; each layer keeps its own statistics, and starts from the other's."""
    fields = dict(row)
    x_dtype, given = fields.pop("x_dtype"), fields.pop("given")
    ours, theirs = (layer(**fields) for layer in BOTH)
    xs, dys = well_scaled(1, (100, 2, 8, 4, 6), x_dtype), well_scaled(2, (100, 2, 8, 4, 6))

    @jax.jit
    def init(x):
        with jax.numpy_dtype_promotion("standard"):
            return [layer.init(KEY, x, use_running_average=False) for layer in (ours, theirs)]

    mine, flaxs = init(xs[0, 0])
    chex.assert_trees_all_equal(mine, flaxs, strict=True)

    @functools.partial(jax.vmap, axis_name="replicas")
    def step(carry, batch):
        params, our_stats, their_stats = carry
        layer, call = as_given(ours, given, False)
        a = train(layer, {"params": params, "batch_stats": our_stats}, *batch, **call)
        with jax.numpy_dtype_promotion("standard"):
            layer, call = as_given(theirs, given, False)
            b = train(layer, {"params": params, "batch_stats": their_stats}, *batch, **call)
            params = jax.tree.map(lambda p, g: (p - 0.01 * g).astype(p.dtype), params, b[2])
        return (params, a[1], b[1]), (a, b)

    @jax.jit
    def run(params, our_stats, their_stats):
        carry, outputs = lax.scan(step, (params, our_stats, their_stats), (xs, dys))
        params, *both_stats = carry

        @functools.partial(jax.vmap, in_axes=(0, None, None))  # the statistics of both
        @jax.vmap
        def evaluate(stats, params, x):
            evaluations = []
            for first in (ours, theirs):
                layer, call = as_given(first, given, True)
                with jax.numpy_dtype_promotion("standard"):
                    y = layer.apply({"params": params, "batch_stats": stats}, x, **call)
                evaluations.append(y)
            return evaluations

        stats = jax.tree.map(lambda *pair: jnp.stack(pair), *both_stats)
        return outputs, evaluate(stats, params, xs[0])

    start = (flaxs.get("params", {}), flaxs["batch_stats"], mine["batch_stats"])
    start = jax.tree.map(lambda p: np.stack([p, p]), start)
    (a, b), evaluations = run(*start)
    assert_agree(a[:3], b[:3])
    assert_agree(a[3], b[3], summed=True)  # the terms through x and through its moments
    assert_agree(*evaluations)


class Network(nn.Module):
    """Two hidden layers, normalized by `layer`, which is trained or evaluated as a whole."""

    layer: type

    @nn.compact
    def __call__(self, x, train):
        for width in (16, 16):
            x = nn.Dense(width, use_bias=False, kernel_init=kernel)(x)
            x = nn.relu(self.layer(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(1, kernel_init=kernel)(x)


def test_a_network_trains_as_with_flax():
    x = well_scaled(1, (64, 4))
    target = np.sin(np.sum(x, 1, keepdims=True))

    def run(layer):
        model = Network(layer)

        def loss(params, stats):
            variables = {"params": params, "batch_stats": stats}
            y, updates = model.apply(variables, x, True, mutable=["batch_stats"])
            return jnp.mean((y - target) ** 2), updates["batch_stats"]

        def step(variables, _):
            params, stats = variables["params"], variables["batch_stats"]
            (value, stats), slope = jax.value_and_grad(loss, has_aux=True)(params, stats)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
            return {"params": params, "batch_stats": stats}, value

        variables, losses = lax.scan(step, model.init(KEY, x, True), None, 100)
        return variables, losses, model.apply(variables, x, False)

    ours, theirs = (jax.jit(run, static_argnums=0)(layer) for layer in BOTH)
    assert ours[1][-1] < 0.2 * ours[1][0]
    assert_agree(ours, theirs)


def test_groups_of_replicas_as_flax():
    x, dy = well_scaled(1, (4, 8, 3)), well_scaled(2, (4, 8, 3))
    groups = [[0, 2], [1, 3]]

    def run(layer):
        layer = layer(axis_name="i", axis_index_groups=groups, use_running_average=False)
        variables = jax.jit(layer.init)(KEY, x[0])
        return jax.pmap(functools.partial(train, layer, variables), axis_name="i")(x, dy)

    ours, theirs = map(run, BOTH)
    assert_agree(ours, theirs)
    stats = ours[1]
    np.testing.assert_array_equal(stats["mean"][0], stats["mean"][2])
    assert jnp.all(stats["mean"][0] != stats["mean"][1])


def test_without_float32_reductions_the_state_still_is_float32():
    """The documented exception: flax then keeps 16-bit statistics. Ours are the right ones."""
    x = well_scaled(1, (64, 3), jnp.bfloat16)
    layer = bnjax.linen.BatchNorm(
        param_dtype=jnp.bfloat16, force_float32_reductions=False, use_running_average=False
    )
    y, variables = jax.jit(layer.init_with_output)(KEY, x)
    assert y.dtype == jnp.bfloat16
    _, stats, *_ = train(layer, variables, x, y)
    m = reference.moments(np.asarray(x, np.float64))
    np.testing.assert_allclose(stats["mean"], 0.01 * m.mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.99 + 0.01 * m.var, rtol=1e-6)
    assert {s.dtype for s in stats.values()} == {jnp.dtype(jnp.float32)}


def test_float32_without_float32_reductions_as_flax():
    x, dy = well_scaled(1, (64, 3)), well_scaled(2, (64, 3))
    ours, theirs = (
        layer(force_float32_reductions=False, use_running_average=False) for layer in BOTH
    )
    variables = jax.jit(ours.init)(KEY, x)
    chex.assert_trees_all_equal(variables, jax.jit(theirs.init)(KEY, x), strict=True)
    assert_agree(train(ours, variables, x, dy), train(theirs, variables, x, dy))


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(np.int8, jnp.bfloat16), (bool, None), (np.complex64, None)],
)
def test_numpy_input_of_any_dtype_as_flax(x_dtype, dtype):
    x = np.random.default_rng(0).integers(0, 5, (16, 3)).astype(x_dtype)
    if x_dtype == np.complex64:
        x = x * np.complex64(1 + 2j) + x[::-1] ** 2

    def run(layer):
        layer = layer(dtype=dtype, use_running_average=False)
        variables = layer.init(KEY, x)
        return layer.apply(variables, x, mutable=["batch_stats"])

    with jax.numpy_dtype_promotion("standard"):
        theirs = jax.jit(run, static_argnums=0)(nn.BatchNorm)
    ours = jax.jit(run, static_argnums=0)(bnjax.linen.BatchNorm)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("layer", BOTH)
@pytest.mark.parametrize("way", ["state dict", "bytes", "orbax"])
def test_variables_of_either_layer_survive_a_round_trip_into_ours(way, layer, tmp_path):
    x = well_scaled(1, (16, 3))
    layer = layer(bias_init=between_signs, scale_init=around_one, use_running_average=False)
    variables = layer.init(KEY, x)
    variables |= layer.apply(variables, x, mutable=["batch_stats"])[1]
    blank = bnjax.linen.BatchNorm(use_running_average=False).init(jax.random.key(9), x)
    if way == "state dict":
        state = flax.serialization.to_state_dict(variables)
        restored = flax.serialization.from_state_dict(blank, state)
    elif way == "bytes":
        restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(variables))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "step", variables)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "step", blank)
    chex.assert_trees_all_equal(restored, variables, strict=True)


# Initialization, evaluation, and calls in between.


class Twice(nn.Module):
    """One layer, called twice in a step."""

    layer: type

    @nn.compact
    def __call__(self, a, b):
        norm = self.layer(use_running_average=False, momentum=0.9)
        return norm(a), norm(b)


def test_initialization_leaves_the_statistics_alone():
    """Also with `axis_name`, which need not be mapped, and a batch of one, without a warning."""
    layer = bnjax.linen.BatchNorm(axis_name="replicas", use_running_average=False)
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    for x in (well_scaled(1, (8, 3)), well_scaled(1, (1, 3))):
        y, variables = layer.init_with_output(KEY, x)
        chex.assert_trees_all_equal(variables["batch_stats"], stats, strict=True)
        m = reference.moments(x)
        np.testing.assert_allclose(y, reference.normalize(x, m.mean, m.var), atol=1e-6)
    variables = Twice(bnjax.linen.BatchNorm).init(
        KEY, well_scaled(1, (8, 3)), well_scaled(2, (8, 3))
    )
    chex.assert_trees_all_equal(variables["batch_stats"]["BatchNorm_0"], stats, strict=True)


def test_initialization_ignores_the_running_pivot():
    x = well_scaled(1, (8, 3)) + 1e4

    def init(pivot):
        layer = bnjax.linen.BatchNorm(pivot=pivot, use_running_average=False)
        return functools.partial(layer.init_with_output, KEY)

    m = reference.moments(x)
    y, _ = init("running")(x)
    np.testing.assert_allclose(y, reference.normalize(x, m.mean, m.var), atol=2e-6)
    programs = [str(jax.make_jaxpr(init(pivot))(x)) for pivot in ("running", "batch")]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("way", ["eval_shape", "jit", "lazy"])
def test_abstract_and_compiled_initialization(way):
    x = well_scaled(1, (8, 3), jnp.bfloat16)
    layer = bnjax.linen.BatchNorm(use_running_average=False, bias_init=between_signs, axis_name="i")
    eager = layer.init(KEY, x)
    if way == "eval_shape":
        variables = jax.eval_shape(layer.init, KEY, x)
        chex.assert_trees_all_equal_shapes_and_dtypes(variables, eager)
    else:
        variables = (
            jax.jit(layer.init)(KEY, x)
            if way == "jit"
            else layer.lazy_init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
        )
        chex.assert_trees_all_close(variables, eager, rtol=1e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(variables, eager)


def test_called_twice_in_a_step_it_updates_twice():
    a, b = well_scaled(1, (8, 3)), 3 * well_scaled(2, (8, 3))
    outputs, updates = zip(
        *(
            model.apply(model.init(KEY, a, b), a, b, mutable=["batch_stats"])
            for model in map(Twice, BOTH)
        ),
        strict=True,
    )
    assert_agree(outputs[0], outputs[1])
    assert_agree(updates[0], updates[1])
    first, second = reference.moments(a), reference.moments(b)
    stats = updates[0]["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.09 * first.mean + 0.1 * second.mean, rtol=1e-5)
    var = 0.81 + 0.09 * first.var + 0.1 * second.var
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)


def test_training_normalizes_with_the_batch_and_not_with_what_it_remembers():
    x = well_scaled(1, (64, 3))
    layer = bnjax.linen.BatchNorm(momentum=0.5, use_running_average=False)
    stats = {"mean": jnp.full(3, 5.0), "var": jnp.full(3, 7.0)}
    variables = {**layer.init(KEY, x), "batch_stats": stats}
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    m = reference.moments(x)
    np.testing.assert_allclose(y, reference.normalize(x, m.mean, m.var), atol=2e-6)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 2.5 + m.mean / 2, rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 3.5 + m.var / 2, rtol=1e-6)


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_evaluation_needs_no_mapped_axis_and_nothing_mutable(x_dtype):
    x = well_scaled(1, (64, 3), x_dtype)
    layer = bnjax.linen.BatchNorm(axis_name="replicas", epsilon=1e-3, dtype=x_dtype)
    params = {"scale": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.0, 1.0, 3.0])}
    stats = {"mean": jnp.array([1.0, 0.0, 1003.0]), "var": jnp.array([4.0, 1.0, 0.25])}
    variables = {"params": params, "batch_stats": stats}
    y = layer.apply(variables, x, use_running_average=True)
    assert y.dtype == x_dtype
    right = reference.normalize(np.asarray(x, np.float64), **stats, **params, epsilon=1e-3)
    rtol = max(float(jnp.finfo(x_dtype).eps), 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), right, rtol=rtol, atol=1e-6)
    _, updates = layer.apply(variables, x, use_running_average=True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updates, {"batch_stats": stats}, strict=True)


def test_forgotten_mutable_and_misplaced_use_running_average_have_flaxs_errors():
    x = well_scaled(1, (8, 3))

    def errors(layer):
        variables = layer(use_running_average=True).init(KEY, x)
        calls = [({}, False), ({"use_running_average": True}, True), ({}, None)]
        for fields, use_running_average in calls:
            bound = layer(**fields).bind(variables)
            with pytest.raises((flax.errors.ModifyScopeVariableError, ValueError)) as caught:
                bound(x, use_running_average=use_running_average)
            chex.assert_trees_all_equal(bound.variables, variables, strict=True)
            yield str(caught.value)

    ours, theirs = map(list, map(errors, BOTH))
    assert ours == theirs
    assert 'collection "batch_stats" is immutable' in ours[0]


# Flax's transforms.


def test_partitioning_metadata_survives():
    x, dy = well_scaled(1, (8, 3)), well_scaled(2, (8, 3))

    def run(layer):
        layer = layer(
            scale_init=nn.with_partitioning(around_one, ("model",)),
            bias_init=nn.with_partitioning(between_signs, ("model",)),
            use_running_average=False,
        )
        variables = layer.init(KEY, x)
        return variables, train(layer, variables, x, dy), train(layer, nn.unbox(variables), x, dy)

    (ours, *our_steps), (theirs, *their_steps) = map(run, BOTH)
    chex.assert_trees_all_equal(ours, theirs, strict=True)
    assert ours["params"]["scale"].names == ("model",)
    assert our_steps[0][2]["scale"].names == ("model",)
    assert_agree(our_steps, their_steps)


class Cell(nn.Module):
    """One step of `nn.scan`: the carried value or the new one goes through the layer."""

    layer: type
    carries: bool

    @nn.compact
    def __call__(self, carry, x):
        norm = self.layer(use_running_average=False, bias_init=between_signs, scale_init=around_one)
        return (jnp.tanh(norm(carry)), None) if self.carries else (carry, norm(x))


class Calls(nn.Module):
    """A module that got its layer from outside."""

    norm: nn.Module

    def __call__(self, x):
        return self.norm(x)


class InSetup(nn.Module):
    """Layers that `setup` makes, one of them shared with a submodule."""

    layer: type

    def setup(self):
        self.norm = self.layer(use_running_average=False, bias_init=between_signs)
        self.norms = [self.layer(use_running_average=False, axis=i) for i in (1, 2)]
        self.calls = Calls(self.norm)

    def __call__(self, x):
        for norm in (self.norm, *self.norms, self.calls):
            x = jnp.tanh(norm(x))
        return x


class Branches(nn.Module):
    """A layer that is called in one branch, and not in the other."""

    layer: type

    @nn.compact
    def __call__(self, x):
        norm = self.layer(use_running_average=False, bias_init=between_signs)
        if self.is_initializing():
            return norm(x)
        for taken in (jnp.max(x) > 0, jnp.max(x) < 0):
            x = nn.cond(taken, lambda norm, x: norm(x), lambda norm, x: 2 * x, norm, x)
        return x


EACH = {"params": 0, "batch_stats": 0}
SHARED = {"params": None, "batch_stats": None}
TRANSFORMS = {
    "setup": InSetup,
    "cond": Branches,
    "jit": lambda layer: nn.jit(layer)(use_running_average=False),
    "vmap, a layer each": lambda layer: nn.vmap(
        layer, variable_axes=EACH, split_rngs={"params": True}
    )(use_running_average=False, bias_init=between_signs),
    "vmap, statistics each": lambda layer: nn.vmap(
        layer, variable_axes={**EACH, "params": None}, split_rngs={"params": False}
    )(use_running_average=False, bias_init=between_signs),
    "vmap, one layer": lambda layer: nn.vmap(
        layer, variable_axes=SHARED, split_rngs={"params": False}, axis_name="i"
    )(use_running_average=False, bias_init=between_signs, axis_name="i"),
}


def assert_trains_as_with_flax(build, before=lambda x: (x,), after=lambda out: out, start=None):
    """The model that `build` makes of either layer: variables, a step, and its gradients."""
    x, dy = well_scaled(1, (4, 8, 3)), well_scaled(2, (4, 8, 3))

    def run(layer):
        model = build(layer)
        variables = start(layer, x) if start else model.init(KEY, *before(x))

        def output(params, x):
            new = {**variables, "params": params}
            out, updates = model.apply(new, *before(x), mutable=["batch_stats"])
            return after(out), updates

        y, pull_back, updates = jax.vjp(output, variables["params"], x, has_aux=True)
        return variables, y, updates, pull_back(dy)

    ours, theirs = (jax.jit(run, static_argnums=0)(layer) for layer in BOTH)
    chex.assert_trees_all_equal(ours[0], theirs[0], strict=True)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_flaxs_transforms(transform):
    assert_trains_as_with_flax(TRANSFORMS[transform])


def test_scan_over_layers():
    scan = nn.scan(nn.remat(Cell), variable_axes=EACH, split_rngs={"params": True}, length=3)
    assert_trains_as_with_flax(
        lambda layer: scan(layer, carries=True), lambda x: (x, None), lambda out: out[0]
    )


def test_scan_over_time():
    """The statistics are carried, so they must be there from the start."""
    shared = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
    scan = nn.scan(Cell, **shared, split_rngs={"params": False})
    assert_trains_as_with_flax(
        lambda layer: scan(layer, carries=False),
        lambda x: (None, x),
        lambda out: out[1],
        start=lambda layer, x: Cell(layer, carries=False).init(KEY, None, x[0]),
    )


# State.


@pytest.mark.parametrize("x_dtype", ["float32", "float64", "bfloat16", "float16", "complex64"])
def test_state_starts_in_the_promotion_of_the_input_with_float32(x_dtype):
    with jax.enable_x64(True):
        layer = bnjax.linen.BatchNorm(use_running_average=False)
        stats = jax.eval_shape(layer.init, KEY, jnp.ones((4, 3), x_dtype))["batch_stats"]
        width = {"bfloat16": "float32", "float16": "float32"}.get(x_dtype, x_dtype)
        assert stats["mean"].dtype == width
        assert stats["var"].dtype == width.replace("complex64", "float32")


def test_an_empty_batch_initializes_and_does_not_train():
    layer, empty = bnjax.linen.BatchNorm(use_running_average=False), jnp.zeros((0, 3))
    y, variables = layer.init_with_output(jax.random.key(0), empty)
    assert y.shape == (0, 3)
    assert variables["batch_stats"]["mean"].shape == (3,)
    with pytest.raises(ValueError, match="no value to measure"):
        layer.apply(variables, empty, mutable=["batch_stats"])
