"""`bnjax.nnx.BatchNorm` is a drop-in for flax's layer; where the two differ, it is right."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference
from checks import assert_agree
from flax import nnx
from jax import lax
from samples import around_one, between_signs, fields_of_flaxs_layers, well_scaled

import bnjax.nnx

BOTH = (bnjax.nnx.BatchNorm, nnx.BatchNorm)
FLAXS_FIELDS = inspect.signature(
    nnx.BatchNorm.__init__
).parameters  # newer versions have more of them


def make(layer, num_features=3, seed=0, **fields):
    return layer(num_features, rngs=nnx.Rngs(seed), **fields)


def snapshot(layer):
    """A copy of the state, which `nnx.state` is not: it holds the layer's own variables."""
    return jax.tree.map(jnp.copy, nnx.state(layer))


def assert_same_state(a, b):
    """The same variables of the same types, with the same metadata, dtypes and values."""
    chex.assert_trees_all_equal(nnx.state(a), nnx.state(b), strict=True)


@nnx.jit
def call_of(layer, x, use_running_average=None):
    """One program, where flax's layer alone compiles one for each operation."""
    with jax.numpy_dtype_promotion("standard"):
        return layer(x, use_running_average=use_running_average)


def step(layer, x, dy, **call):
    """A training step: output, and gradients of sum(y dy) by params and x."""

    def loss(layer, x):
        y = layer(x, **call)
        return jnp.sum(y.astype(jnp.float32) * dy), y

    gradients, y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, gradients


# The layer as a drop-in.


def test_constructor_and_call_are_flaxs():
    ours = inspect.signature(bnjax.nnx.BatchNorm.__init__).parameters
    beyond = {"pivot": "auto", "debias": False, "ddof": 0, "emit": False}
    beyond |= {"ghost_batch_size": None, "eval_momentum": 1.0, "skip_nonfinite": False}
    assert {name: p.default for name, p in list(ours.items())[-len(beyond) :]} == beyond
    assert [name for name in ours if name in FLAXS_FIELDS] == list(FLAXS_FIELDS)
    for name, theirs in FLAXS_FIELDS.items():
        assert (ours[name].kind, ours[name].default) == (theirs.kind, theirs.default)
    ours, theirs = (inspect.signature(layer.__call__).parameters.values() for layer in BOTH)
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]


@pytest.mark.parametrize(
    "row",
    fields_of_flaxs_layers(
        x_dtype=[jnp.float32, jnp.float16],
        dtype=[None, jnp.float32, jnp.bfloat16],
        given=["mode", "call"],
        axis=[-1, 1, -3],
    ),
)
def test_agrees_with_flax_over_100_steps(row):
    """Two replicas train; each layer keeps its own statistics, and starts from the other's.

    To a 16-bit `dtype` flax rounds inputs and variables before the arithmetic. With dtype
    float32 it doesn't, and its output, rounded at the end, is the right one.
    """
    fields = dict(row)
    x_dtype, given = fields.pop("x_dtype"), fields.pop("given")
    xs, dys = well_scaled(1, (100, 2, 8, 4, 6), x_dtype), well_scaled(2, (100, 2, 8, 4, 6))
    features = xs.shape[2:][fields["axis"]]
    ours, theirs = (make(layer, features, **fields) for layer in BOTH)
    assert_same_state(ours, theirs)
    dtype = fields["dtype"]
    if dtype in (jnp.bfloat16, jnp.float16):
        theirs = make(nnx.BatchNorm, features, **{**fields, "dtype": jnp.float32})

    def call(layer, x, use_running_average):
        if given == "call":
            layer.use_running_average = not use_running_average
            return layer(x, use_running_average=use_running_average)
        layer.eval() if use_running_average else layer.train()
        return layer(x)

    our_def, params, our_stats = nnx.split(ours, nnx.Param, nnx.BatchStat)
    their_def, _, their_stats = nnx.split(theirs, nnx.Param, nnx.BatchStat)

    def train(graphdef, params, stats, x, dy):
        def output(params, stats, x):
            layer = nnx.merge(graphdef, params, stats)
            return call(layer, x, False), nnx.state(layer, nnx.BatchStat)

        y, pull_back, stats = jax.vjp(output, params, stats, x, has_aux=True)
        d_params, _, dx = pull_back(dy.astype(dtype or jnp.float32).astype(y.dtype))
        return y, stats, d_params, dx

    @functools.partial(jax.vmap, axis_name="replicas")
    def both(carry, batch):
        params, our_stats, their_stats = carry
        a = train(our_def, params, our_stats, *batch)
        with jax.numpy_dtype_promotion("standard"):
            b = train(their_def, params, their_stats, *batch)
            params = jax.tree.map(lambda p, g: (p - 0.01 * g).astype(p.dtype), params, b[2])
        return (params, a[1], b[1]), (a, b)

    @functools.partial(jax.vmap, in_axes=(0, None, None))  # the statistics of both
    @jax.vmap
    def evaluate(stats, params, x):
        with jax.numpy_dtype_promotion("standard"):
            return [
                call(nnx.merge(graphdef, params, stats), x, True)
                for graphdef in (our_def, their_def)
            ]

    @jax.jit
    def run(params, our_stats, their_stats):
        carry, outputs = lax.scan(both, (params, our_stats, their_stats), (xs, dys))
        params, *both_stats = carry
        stats = jax.tree.map(lambda *pair: jnp.stack(pair), *both_stats)
        return outputs, evaluate(stats, params, xs[0])

    start = jax.tree.map(lambda p: np.stack([p, p]), (params, their_stats, our_stats))
    (a, b), (our_y, their_y) = run(*start)
    if dtype or "promote_dtype" in FLAXS_FIELDS:  # before, statistics had no say in the dtype
        expected = jnp.dtype(dtype or b[0].dtype)
        assert {y.dtype for y in (a[0], our_y)} == {expected}
    narrow = dtype or b[0].dtype
    ours, theirs = jax.tree.map(lambda y: y.astype(narrow), ((a[0], our_y), (b[0], their_y)))
    assert_agree(ours, theirs)
    assert_agree(a[1:3], b[1:3])
    assert_agree(a[3], b[3], summed=True)  # the terms through x and through its moments


def test_16_bit_training_as_flax_where_its_rounding_loses_nothing():
    x = np.round(np.asarray(well_scaled(1, (64, 3))) * 16) / 16
    ours, theirs = (make(layer, dtype=jnp.bfloat16) for layer in BOTH)
    assert_agree(ours(x), call_of(theirs, x))
    assert_agree(nnx.state(ours), nnx.state(theirs))


class Network(nnx.Module):
    """Two hidden layers, normalized by `layer`."""

    def __init__(self, layer, rngs):
        linear = functools.partial(nnx.Linear, kernel_init=between_signs, rngs=rngs)
        self.a = linear(4, 16, use_bias=False)
        self.norm_a = layer(16, momentum=0.9, rngs=rngs)
        self.b = linear(16, 16, use_bias=False)
        self.norm_b = layer(16, momentum=0.9, use_bias=False, rngs=rngs)
        self.c = linear(16, 1)

    def __call__(self, x):
        x = nnx.relu(self.norm_a(self.a(x)))
        return self.c(nnx.relu(self.norm_b(self.b(x))))


def test_a_network_trains_as_with_flax():
    """From the same seed, with `nnx.jit`, `nnx.value_and_grad`, `train()` and `eval()`."""
    x = well_scaled(1, (64, 4))
    target = np.sin(np.sum(x, 1, keepdims=True))

    @nnx.jit
    def train(model):
        def loss(model):
            return jnp.mean((model(x) - target) ** 2)

        value, slope = nnx.value_and_grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, slope))
        return value

    def run(layer):
        model = Network(layer, nnx.Rngs(0))
        model.train()
        losses = [train(model) for _ in range(100)]
        model.eval()
        trained = nnx.state(model)
        return trained, losses, nnx.jit(lambda model: model(x))(model)

    ours, theirs = map(run, BOTH)
    assert ours[1][-1] < 0.2 * ours[1][0]
    assert_agree(ours, theirs)


@pytest.mark.parametrize("fields", [{}, {"use_bias": False}, {"use_scale": False}])
def test_variables_and_their_types_are_flaxs_and_load_both_ways(fields):
    fields |= {"bias_init": between_signs, "scale_init": around_one, "param_dtype": jnp.bfloat16}
    x = well_scaled(1, (8, 3))
    ours, theirs = (make(layer, **fields) for layer in BOTH)
    assert_same_state(ours, theirs)
    for variable in (nnx.Param, nnx.BatchStat):
        chex.assert_trees_all_equal(
            nnx.state(ours, variable), nnx.state(theirs, variable), strict=True
        )
    call_of(theirs, x)
    fresh = make(bnjax.nnx.BatchNorm, seed=1, **fields)
    nnx.update(fresh, nnx.state(theirs))
    assert_same_state(fresh, theirs)
    fresh(x)
    nnx.update(theirs, nnx.state(fresh))
    assert_same_state(theirs, fresh)
    fresh.eval()
    theirs.eval()
    assert_agree(fresh(x), call_of(theirs, x))


def test_a_layer_after_it_gets_the_same_keys_as_after_flaxs():
    for fields in ({}, {"use_bias": False}, {"use_scale": False, "use_bias": False}):
        keys = []
        for layer in BOTH:
            rngs = nnx.Rngs(0)
            layer(3, rngs=rngs, **fields)
            keys.append(jax.random.key_data(rngs.params()))
        np.testing.assert_array_equal(*keys)


def test_metadata_of_the_parameters():
    metadata = {"bias_metadata": {"decay": False}, "scale_metadata": {"decay": True}}
    ours = make(bnjax.nnx.BatchNorm, **metadata)
    assert ours.bias.decay is False
    assert ours.scale.decay is True
    if "bias_metadata" in FLAXS_FIELDS:
        assert_same_state(ours, make(nnx.BatchNorm, **metadata))
    ours, theirs = (
        make(layer, bias_init=nnx.with_metadata(between_signs, decay=False)) for layer in BOTH
    )
    assert ours.bias.decay is False
    assert_same_state(ours, theirs)


def test_promote_dtype_decides_the_outputs_dtype_as_in_flax():
    """And no more: the arithmetic is as without it."""

    def to_bfloat16(inputs, *, dtype):
        assert [p is None for p in inputs] == [False, False, False, True, False]
        assert dtype is None
        return tuple(p if p is None else p.astype(jnp.bfloat16) for p in inputs)

    x = np.round(np.asarray(well_scaled(1, (64, 3))) * 16) / 16
    ours = make(bnjax.nnx.BatchNorm, use_scale=False, promote_dtype=to_bfloat16)
    y = ours(x)
    assert y.dtype == jnp.bfloat16
    m = reference.moments(x)
    right = reference.normalize(x, m.mean, m.var)
    np.testing.assert_allclose(y.astype(jnp.float32), right, rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(ours.var[...], 0.99 + 0.01 * m.var, rtol=1e-6)
    if "promote_dtype" in FLAXS_FIELDS:
        theirs = make(nnx.BatchNorm, use_scale=False, promote_dtype=to_bfloat16)
        assert_agree(y, call_of(theirs, x))


# Where flax rounds to `dtype` before the arithmetic.


def test_evaluation_subtracts_before_it_rounds():
    """(1003 - 1001) / 1 is 2; in bfloat16, 1003 and 1001 are 1004 and 1000."""
    layer = make(bnjax.nnx.BatchNorm, 1, dtype=jnp.bfloat16, epsilon=1e-6)
    layer.mean[...] = jnp.array([1001.0])
    layer.eval()
    y = layer(jnp.array([[1003.0], [1001.0], [1000.0]]))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), [[2.0], [0.0], [-1.0]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("evaluates", [True, False])
def test_a_16_bit_dtype_rounds_once_at_the_end(dtype, evaluates):
    x = well_scaled(1, (256, 3)) + 1000
    layer = make(bnjax.nnx.BatchNorm, dtype=dtype, bias_init=between_signs, scale_init=around_one)
    layer.mean[...], layer.var[...] = jnp.full(3, 1001.0), jnp.full(3, 3.9)
    m = reference.moments(x)
    if evaluates:
        m = reference.Reference(layer.mean[...], layer.var[...], 0)
    y = layer(x, use_running_average=evaluates)
    right = reference.normalize(x, m.mean, m.var, layer.scale[...], layer.bias[...])
    assert y.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(y.astype(jnp.float32), right.astype(float), rtol=eps, atol=1e-6)


# Modes, calls and state.


def test_train_and_eval_set_the_mode_and_the_call_comes_first():
    x = well_scaled(1, (8, 3))
    layer = make(bnjax.nnx.BatchNorm, use_running_average=True, pivot="batch")
    evaluated, start = layer(x), snapshot(layer)
    np.testing.assert_allclose(evaluated, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    layer.train()
    np.testing.assert_array_equal(layer(x, use_running_average=True), evaluated)
    chex.assert_trees_all_equal(nnx.state(layer), start, strict=True)
    trained = layer(x)
    m = reference.moments(x)
    np.testing.assert_allclose(trained, reference.normalize(x, m.mean, m.var), atol=2e-6)
    np.testing.assert_allclose(layer.mean[...], 0.01 * m.mean, rtol=1e-6)
    np.testing.assert_allclose(layer.var[...], 0.99 + 0.01 * m.var, rtol=1e-6)
    layer.eval()
    np.testing.assert_array_equal(layer(x, use_running_average=False), trained)
    np.testing.assert_allclose(layer.mean[...], 0.0199 * m.mean, rtol=1e-6)
    mean, var = layer.mean[...], layer.var[...]
    np.testing.assert_allclose(layer(x), reference.normalize(x, mean, var), atol=2e-6)


def test_without_a_mode_it_says_what_to_do():
    layer = make(bnjax.nnx.BatchNorm, use_running_average=None)
    start = snapshot(layer)
    with pytest.raises(ValueError, match="use_running_average") as caught:
        layer(well_scaled(1, (8, 3)))
    assert str(caught.value) == (
        "use_running_average is None, in the constructor and in the call. "
        "Call model.train() or model.eval(), or pass True or False."
    )
    chex.assert_trees_all_equal(nnx.state(layer), start, strict=True)


def test_called_twice_in_a_step_it_updates_twice():
    a, b = well_scaled(1, (8, 3)), 3 * well_scaled(2, (8, 3))
    layers = [make(layer, momentum=0.9) for layer in BOTH]
    ours, theirs = [layers[0](a), layers[0](b)], [call_of(layers[1], x) for x in (a, b)]
    assert_agree(ours, theirs)
    assert_agree(*map(nnx.state, layers))
    first, second = reference.moments(a), reference.moments(b)
    mean = 0.09 * first.mean + 0.1 * second.mean
    np.testing.assert_allclose(layers[0].mean[...], mean, rtol=1e-5)


def test_statistics_are_constants_to_what_comes_after():
    """What a second call reads of a first one's update has no gradient, as in newer flax."""
    x, dy = well_scaled(1, (8, 3)), well_scaled(2, (8, 3))
    layer = make(bnjax.nnx.BatchNorm, momentum=0.0)

    def train_then_evaluate(layer, x):
        layer(x)
        return jnp.sum(layer(x, use_running_average=True) * dy)

    gradient = nnx.jit(nnx.grad(train_then_evaluate, argnums=1))(layer, x)
    sigma = np.sqrt(reference.moments(x).var + 1e-5)
    np.testing.assert_allclose(gradient, np.asarray(dy, float) / sigma.astype(float), rtol=1e-5)


def test_variables_that_are_references_train_under_plain_grad():
    """A reference cannot take a value that is differentiated."""
    x, dy = well_scaled(1, (8, 3)), well_scaled(2, (8, 3))
    references = nnx.use_refs if hasattr(nnx, "use_refs") else lambda on: nnx.var_defaults(ref=on)
    with references(True):
        layer = make(bnjax.nnx.BatchNorm)
        gradient = jax.grad(lambda x: jnp.sum(layer(x) * dy))(x)
    expected = reference.gradient(x, dy).x.astype(float)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.mean[...], 0.01 * reference.moments(x).mean, rtol=1e-6)


@pytest.mark.parametrize("param_dtype", ["float32", "float64", "bfloat16", "float16", "complex64"])
def test_state_starts_in_the_promotion_of_the_parameters_with_float32(param_dtype):
    with jax.enable_x64(True):
        layer = nnx.eval_shape(lambda: make(bnjax.nnx.BatchNorm, param_dtype=param_dtype))
        width = {"bfloat16": "float32", "float16": "float32"}.get(param_dtype, param_dtype)
        assert layer.mean.dtype == width
        assert layer.var.dtype == width.replace("complex64", "float32")


# Flax's transforms. Each function takes the class of the layer and data, and returns the
# layer after the call, the output, and what else it makes.


def jitted(layer, x, dy):
    layer = make(layer, bias_init=between_signs)
    return layer, *nnx.jit(step)(layer, x, dy)


def value_and_grad(layer, x, dy):
    layer = make(layer)
    return layer, *nnx.value_and_grad(lambda layer, x: jnp.sum(layer(x) * dy))(layer, x)


def vmap_a_layer_each(layer, x, dy):
    keys = jax.random.split(jax.random.key(0), len(x))
    layers = nnx.vmap(lambda key: make(layer, seed=key, bias_init=between_signs))(keys)
    return layers, *nnx.vmap(step)(layers, x, dy)


def vmap_one_layer(layer, x, dy):
    layer = make(layer, axis_name="i", bias_init=between_signs)
    call = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="i")
    return layer, *nnx.value_and_grad(lambda layer: jnp.sum(call(layer, x) * dy))(layer)


def pmap_one_layer(layer, x, dy):
    layer = make(layer, axis_name="i", bias_init=between_signs)
    call = nnx.pmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="i")
    return layer, call(layer, x)


def pmap_groups(layer, x, dy):
    layers = nnx.vmap(lambda _: make(layer, axis_name="i", axis_index_groups=[[0, 2], [1, 3]]))(
        jnp.arange(4)
    )
    return layers, *nnx.pmap(step, axis_name="i")(layers, x, dy)


def scan_over_layers(layer, x, dy):
    layers = nnx.vmap(lambda key: make(layer, seed=key, bias_init=between_signs))(
        jax.random.split(jax.random.key(0), 3)
    )
    call = nnx.scan(
        nnx.remat(lambda x, layer: jnp.tanh(layer(x))),
        in_axes=(nnx.Carry, 0),
        out_axes=nnx.Carry,
    )
    return layers, *nnx.value_and_grad(lambda layers: jnp.sum(call(x, layers) * dy))(layers)


def scan_over_time(layer, x, dy):
    layer = make(layer, bias_init=between_signs)

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    def train(layer, x, dy):
        return layer, step(layer, x, dy)

    layer, results = train(layer, x, dy)
    return layer, *results


def branches(layer, x, dy):
    layer = make(layer, bias_init=between_signs)

    @nnx.jit
    def call(layer, x):
        for taken in (jnp.max(x) > 0, jnp.max(x) < 0):
            x = nnx.cond(taken, lambda layer, x: layer(x), lambda layer, x: 2 * x, layer, x)
        return x

    return layer, call(layer, x)


def split_and_merge(layer, x, dy):
    graphdef, params, stats = nnx.split(make(layer, bias_init=between_signs), nnx.Param, ...)

    @jax.jit
    def pure(params, stats, x):
        layer = nnx.merge(graphdef, params, stats)
        return layer(x), nnx.split(layer)

    y, (graphdef, state) = pure(params, stats, x)
    return nnx.merge(graphdef, state), y


COMPILED = (jitted, pmap_one_layer, pmap_groups, split_and_merge)  # the others are, as a whole


@pytest.mark.parametrize(
    "transform",
    [
        jitted,
        value_and_grad,
        vmap_a_layer_each,
        vmap_one_layer,
        pmap_one_layer,
        pmap_groups,
        scan_over_layers,
        scan_over_time,
        branches,
        split_and_merge,
    ],
)
def test_flaxs_transforms(transform):
    x, dy = well_scaled(1, (4, 8, 3)), well_scaled(2, (4, 8, 3))

    def run(layer):
        made, *results = transform(layer, x, dy)
        return nnx.state(made), made.mean[...], results

    if transform not in COMPILED:
        run = jax.jit(run, static_argnums=0)
    (ours, mean, our_results), (theirs, _, their_results) = map(run, BOTH)
    assert_agree(our_results, their_results)
    assert_agree(ours, theirs)
    assert not np.any(np.asarray(mean) == 0)


def test_abstract_initialization():
    def build():
        return make(bnjax.nnx.BatchNorm, axis_name="i", param_dtype=jnp.bfloat16)

    chex.assert_trees_all_equal_shapes_and_dtypes(
        nnx.state(nnx.eval_shape(build)), nnx.state(build())
    )


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this version of flax has no nnx.view")
def test_a_view_has_a_mode_of_its_own_and_the_same_variables():
    x = well_scaled(1, (8, 3))
    layer = make(bnjax.nnx.BatchNorm)
    evaluating = nnx.view(layer, use_running_average=True)
    layer(x)
    assert evaluating.mean is layer.mean
    np.testing.assert_array_equal(evaluating(x), layer(x, use_running_average=True))
    assert nnx.view(evaluating).use_running_average is True
    assert layer.use_running_average is False


@pytest.mark.parametrize("saved", BOTH)
def test_states_of_either_layer_survive_orbax_into_ours(saved, tmp_path):
    x = well_scaled(1, (16, 3))
    layer = make(saved, bias_init=between_signs, scale_init=around_one)
    layer(x)
    abstract = nnx.eval_shape(lambda: make(bnjax.nnx.BatchNorm))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", nnx.state(layer))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "step", nnx.state(abstract))
    restored = make(bnjax.nnx.BatchNorm)
    nnx.update(restored, state)
    assert_same_state(restored, layer)
    layer.eval()
    restored.eval()
    assert_agree(restored(x), layer(x))


def test_num_features_may_be_a_numpy_integer():
    layer = bnjax.nnx.BatchNorm(np.int64(3), rngs=nnx.Rngs(0))
    assert layer.mean[...].shape == layer.scale[...].shape == (3,)
