"""The linen and the NNX layer: the same numbers bit for bit, the same errors and warnings.

And what holds for either: masks as in flax, and what becomes of the state.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import assert_agree, assert_same_bits
from flax import nnx
from flax.errors import ScopeParamShapeError
from implementations import FLAXS, every_layer, pull_back, start
from samples import covering, normal

import bnjax.linen
import bnjax.nnx


def variables_of(*features, dtype="float32"):
    """Parameters and statistics of no particular values."""
    values = np.arange(1.0, 1 + np.prod(features)).reshape(features)
    return {
        "params": {
            "scale": jnp.asarray(values, "float32"),
            "bias": jnp.asarray(-values, "float32"),
        },
        "batch_stats": {
            "mean": jnp.asarray(values / 2, dtype),
            "var": jnp.asarray(3 * values, jnp.finfo(dtype).dtype),
        },
    }


def linen(variables, kind="BatchNorm", **fields):
    """The layer with these variables, to be called; and what statistics it has by then."""
    layer = getattr(bnjax.linen, kind)(**fields).bind(variables, mutable=["batch_stats"])
    return layer, lambda: dict(layer.variables["batch_stats"])


def of_nnx(variables, kind="BatchNorm", **fields):
    features = variables["batch_stats"]["mean"].shape
    layer = getattr(bnjax.nnx, kind)(features, **fields, rngs=nnx.Rngs(0))
    for name, value in variables["batch_stats"].items():
        setattr(layer, name, nnx.BatchStat(value))
    for name, value in variables["params"].items():
        if getattr(layer, name) is not None:
            setattr(layer, name, nnx.Param(value))
    return layer, lambda: {name: getattr(layer, name)[...] for name in variables["batch_stats"]}


both_layers = pytest.mark.parametrize("make", [linen, of_nnx])


# Equal variables, equal bits.


def call_of(make, masked, *, evaluates, **fields):
    """One call on two replicas: output, statistics after it, gradients by params and x."""

    @functools.partial(jax.vmap, in_axes=(None, 0, 0, 0 if masked else None), axis_name="i")
    def call(variables, x, dy, mask):
        def output(params, x):
            layer, stats = make({**variables, "params": params}, **fields)
            return layer(x, use_running_average=evaluates, mask=mask), stats()

        y, pull_back, stats = jax.vjp(output, variables["params"], x, has_aux=True)
        return y, stats, pull_back(dy.astype(y.dtype))

    return call


@functools.partial(jax.jit, static_argnums=0, static_argnames=("evaluates", "param_dtype"))
def forward(make, variables, x, *, evaluates, **fields):
    """The output alone, and the statistics after it."""

    @functools.partial(jax.vmap, axis_name="i")
    def call(x):
        layer, stats = make(variables, axis_name="i", **fields)
        return layer(x, use_running_average=evaluates), stats()

    return call(x)


def program_of(make, variables, x, dy, mask, **fields):
    """As JAX hands it to XLA, with its functions numbered in their order."""
    call = jax.jit(call_of(make, mask is not None, **fields))
    numbers = {}
    text = call.lower(variables, x, dy, mask).as_text()
    return re.sub(r"@\w+", lambda name: f"@{numbers.setdefault(name[0], len(numbers))}", text)


def assert_equal_bits(*args, compiled=True, **fields):
    """Compiled both are one program, so XLA has no say; op by op their numbers are the same."""
    if compiled:
        ours, same = (program_of(make, *args, **fields) for make in (linen, of_nnx))
        assert ours == same
    else:
        masked = args[-1] is not None
        results = [call_of(make, masked, **fields)(*args) for make in (linen, of_nnx)]
        assert_same_bits(*results)
        chex.assert_tree_all_finite(results)


def some_eager(**fields):
    """Rows in which any two values meet; a plain one of training also op by op.

    That is a program for each operation: a hundred of them.
    """
    rows = covering(**fields)
    plain = next(r for r in rows if r["x_dtype"] == "float32" and not r["evaluates"])
    return [*rows, plain | {"compiled": False}]


@pytest.mark.parametrize(
    "row",
    some_eager(
        x_dtype=["float32", "bfloat16", "complex64"],
        mask=[None, "mask", "features", "weights"],
        evaluates=[False, True],
        axis=[-1, 1, (0, 2)],
        dtype=[None, "float32", "float16"],
        pivot=["auto", "batch", "running"],
        axis_name=[None, "i"],
        use_bias=[True, False],
        use_scale=[True, False],
        momentum=[0.99, 0.0],
        epsilon=[1e-5, 1e-2],
    ),
)
def test_equal_variables_give_equal_bits(row):
    fields, rng = dict(row), np.random.default_rng(4)
    x_dtype, mask = fields.pop("x_dtype"), fields.pop("mask")
    x, dy = normal((2, 6, 4, 3), 1, 1), normal((2, 6, 4, 3), 1, 2)
    if x_dtype == "complex64":
        x = x + 1j * normal(x.shape, 1, 3)
        fields["dtype"] = fields["dtype"] and "complex64"
    if not (fields["use_scale"] or fields["use_bias"]):
        # Then the statistics alone have a say beside the input, and in NNX only.
        fields["dtype"] = fields["dtype"] or (None if x_dtype == "complex64" else x_dtype)
    features = {-1: (3,), 1: (4,), (0, 2): (6, 3)}[fields["axis"]]
    mask = {
        None: None,
        "mask": rng.random((2, 6, 4, 1)) < 0.7,
        "features": rng.random((2, 1, 1, 3)) < 0.7,
        "weights": np.where(np.arange(12).reshape(2, 6, 1, 1) < 2, 0, rng.random((2, 6, 1, 3))),
    }[mask]
    mask = mask if mask is None or mask.dtype == bool else mask.astype(np.float32)
    kept = x_dtype if x_dtype == "complex64" else "float32"
    variables = variables_of(*features, dtype=kept)
    assert_equal_bits(variables, x.astype(x_dtype), dy, mask, **fields)


@pytest.mark.parametrize(
    "row",
    covering(
        x_dtype=["float32", "bfloat16", "complex64"],
        mask=[None, "mask", "weights"],
        evaluates=[False, True],
        axis=[-1, 1, (0, 2)],
        group_size=[None, 2],
        method=["cholesky", "newton_schulz"],
        axis_name=[None, "i"],
        ghost_batch_size=[None, 3],
        debias=[False, True],
    ),
)
def test_equal_variables_give_equal_bits_also_decorrelated(row):
    """Op by op they do in `test_decorrelated.py`."""
    fields, rng = dict(row, kind="DecorrelatedBatchNorm"), np.random.default_rng(4)
    x_dtype, mask = fields.pop("x_dtype"), fields.pop("mask")
    if fields["axis"] == (0, 2):
        fields["ghost_batch_size"] = None  # the first axis holds features
    x, dy = normal((2, 6, 8, 4), 1, 1), normal((2, 6, 8, 4), 1, 2)
    if x_dtype == "complex64":
        x = x + 1j * normal(x.shape, 1, 3)
    features = {-1: (4,), 1: (8,), (0, 2): (6, 4)}[fields["axis"]]
    examples = tuple(
        1 if i in np.atleast_1d(fields["axis"]) % 3 else n for i, n in enumerate((6, 8, 4))
    )
    mask = {
        None: None,
        "mask": rng.random((2, *examples)) < 0.7,
        "weights": rng.random((2, *examples)).astype(np.float32),
    }[mask]
    variables = variables_of(*features, dtype="complex64" if x_dtype == "complex64" else "float32")
    stats, count = variables["batch_stats"], int(np.prod(features))
    del stats["var"]
    size = fields["group_size"] or count
    cov = 1 + np.tile(2 * np.eye(size, dtype=stats["mean"].dtype), (count // size, 1, 1))
    stats["cov"], stats["steps"] = jnp.asarray(cov), jnp.asarray(3)
    if not fields["debias"]:
        del stats["steps"]
    assert_equal_bits(variables, x.astype(x_dtype), dy, mask, **fields)


@pytest.mark.parametrize("evaluates", [False, True])
def test_16_bit_input_and_parameters_differ_in_the_last_cast_alone(evaluates):
    """As in flax: the float32 statistics have a say in the dtype of NNX's output."""
    x = normal((2, 16, 3), 1, 1, jnp.bfloat16)
    variables = variables_of(3)
    variables["params"] = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables["params"])
    (a, stats), (b, same_stats) = (
        forward(make, variables, x, evaluates=evaluates, param_dtype=jnp.bfloat16)
        for make in (linen, of_nnx)
    )
    assert (a.dtype, b.dtype) == (jnp.bfloat16, jnp.float32)
    # Of two compiled programs: in float32 they may differ by a rounding, and b lie at a tie.
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=0)
    assert_same_bits(stats, same_stats)


# Equal errors.


ERRORS = {
    "axis above": (
        {"axis": 2},
        (4, 3),
        None,
        "feature_axis (a layer's axis) is 2, but x has shape (4, 3). Choose from -2 to 1.",
    ),
    "axis below": (
        {"axis": (-3, 1)},
        (4, 3),
        None,
        "feature_axis (a layer's axis) is (-3, 1), but x has shape (4, 3). Choose from -2 to 1.",
    ),
    "axis named twice": (
        {"axis": (1, -1)},
        (4, 3),
        None,
        "feature_axis (a layer's axis) is (1, -1), but that names an axis of x twice. "
        "Name each axis once.",
    ),
    "scalar input": (
        {},
        (),
        None,
        "feature_axis (a layer's axis) is -1, but x has shape (). Give x a feature axis.",
    ),
    "epsilon of zero": (
        {"epsilon": 0.0},
        (4, 3),
        None,
        "epsilon is 0.0, but it keeps the variance away from zero. "
        "Choose a positive number, such as 1e-5.",
    ),
    "negative epsilon": (
        {"epsilon": -1e-5},
        (4, 3),
        None,
        "epsilon is -1e-05, but it keeps the variance away from zero. "
        "Choose a positive number, such as 1e-5.",
    ),
    "momentum above": (
        {"momentum": 1.1},
        (4, 3),
        None,
        "momentum is 1.1, but it is the share of the running statistics that is kept. "
        "Choose a number from 0 to 1.",
    ),
    "momentum below": (
        {"momentum": -0.1},
        (4, 3),
        None,
        "momentum is -0.1, but it is the share of the running statistics that is kept. "
        "Choose a number from 0 to 1.",
    ),
    "pivot": (
        {"pivot": "mean"},
        (4, 3),
        None,
        "pivot is 'mean'. Choose 'auto', 'batch' or 'running'.",
    ),
    "mask of another shape": (
        {},
        (4, 3),
        np.ones((5, 3), bool),
        "where (a layer's mask) has shape (5, 3) and x has shape (4, 3): they do not broadcast. "
        "Give a mask that broadcasts to x as in NumPy.",
    ),
    "mask without the feature axis": (
        {},
        (2, 4, 3),
        np.ones((2, 4), bool),
        "where (a layer's mask) has shape (2, 4) and x has shape (2, 4, 3): they do not "
        "broadcast. Write mask[..., None].",
    ),
    "mask without the feature axis, channels first": (
        {"axis": 1},
        (2, 3, 5),
        np.ones((2, 5), bool),
        "where (a layer's mask) has shape (2, 5) and x has shape (2, 3, 5): they do not "
        "broadcast. Write mask.reshape((2, 1, 5)).",
    ),
    "ambiguous mask": (
        {},
        (3, 3),
        np.ones(3, bool),
        "where (a layer's mask) has shape (3,) and x has shape (3, 3): examples or features could "
        "be meant. For a mask of the examples write mask[..., None], of the last axes "
        "mask.reshape((1, 3)).",
    ),
    "complex mask": (
        {},
        (4, 3),
        np.ones((4, 1), np.complex64),
        "where (a layer's mask) has dtype complex64. "
        "Give booleans or integers as a mask, or floats >= 0 as sample weights.",
    ),
    "negative weights": (
        {},
        (4, 3),
        np.array([[1.0], [-2.0], [0.5], [0.0]], np.float32),
        "where (a layer's mask) holds the negative weight -2.0. "
        "Sample weights must not be negative: clip them at 0.",
    ),
    "empty batch": (
        {},
        (0, 3),
        None,
        "x has shape (0, 3), so there is no value to measure. Leave empty batches out.",
    ),
    "statistics of other features": (
        {"use_bias": False, "use_scale": False},
        (4, 2),
        None,
        "running.mean has shape (3,), but the features of x have shape (2,). "
        "Give one value for each feature.",
    ),
}


@both_layers
@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_refused_and_the_state_stays(case, make):
    fields, shape, mask, message = ERRORS[case]
    layer, stats = make(variables_of(3), **fields)
    before = stats()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer(jnp.ones(shape), use_running_average=False, mask=mask)
    assert_same_bits(stats(), before)


@both_layers
@pytest.mark.parametrize("case", ["axis above", "scalar input", "epsilon of zero", "pivot"])
def test_settings_are_refused_in_evaluation_too(case, make):
    fields, shape, _, message = ERRORS[case]
    layer, _ = make(variables_of(3), **fields)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer(jnp.ones(shape), use_running_average=True)


@both_layers
@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("name", ["mean", "var"])
def test_loaded_statistics_of_another_shape_are_refused(name, evaluates, make):
    variables = variables_of(3)
    variables["batch_stats"][name] = jnp.ones(2)
    layer, stats = make(variables)
    before = stats()
    said = name if evaluates else f"running.{name}"
    message = (
        f"{said} has shape (2,), but the features of x have shape (3,). "
        "Give one value for each feature."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer(normal((4, 3), 1, 1), use_running_average=evaluates)
    assert_same_bits(stats(), before)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("name", ["scale", "bias"])
def test_loaded_parameters_of_another_shape_are_refused(name, evaluates):
    """Linen checks them itself, with an error of its own."""
    variables = variables_of(3)
    variables["params"][name] = jnp.ones(2)
    linens = (
        f'For parameter "{name}" in "/", the given initializer is expected to generate shape '
        "(3,), but the existing parameter it received has shape (2,)."
    )
    ours = (
        f"{name} has shape (2,), but x has shape (4, 3) and features of shape (3,). "
        "Give one value for each feature, or an array of x's rank that broadcasts to x."
    )
    for make, error, message in (
        (linen, ScopeParamShapeError, f"^{re.escape(linens)}"),
        (of_nnx, ValueError, f"^{re.escape(ours)}$"),
    ):
        layer, stats = make(variables)
        before = stats()
        with pytest.raises(error, match=message):
            layer(normal((4, 3), 1, 1), use_running_average=evaluates)
        assert_same_bits(stats(), before)


@both_layers
def test_complex_input_does_not_fit_real_statistics(make):
    layer, stats = make(variables_of(3))
    before = stats()
    message = (
        "running.mean is float32, which cannot hold a mean of complex input. "
        "Initialize the running statistics with complex input."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer(jnp.ones((4, 3), jnp.complex64), use_running_average=False)
    assert_same_bits(stats(), before)


@both_layers
@pytest.mark.parametrize("axis_name", ["rows", ("i", "rows")])
def test_an_unknown_axis_name_is_an_error_in_training_alone(axis_name, make):
    layer, stats = make(variables_of(3), axis_name=axis_name)
    before = stats()
    with pytest.raises(NameError) as from_jax:
        jax.lax.psum(1, axis_name)
    message = (
        f"axis_name is {axis_name!r}, but no such axis is mapped here ({from_jax.value}). "
        "Call this under jax.pmap, jax.shard_map or jax.vmap with that axis name, or "
        "leave axis_name out: plain jit over sharded arrays needs none."
    )
    x = normal((4, 3), 1, 1)
    with pytest.raises(NameError, match=f"^{re.escape(message)}$"):
        layer(x, use_running_average=False)
    assert_same_bits(stats(), before)
    plain, _ = make(variables_of(3))
    assert_same_bits(layer(x, use_running_average=True), plain(x, use_running_average=True))


# Equal warnings.


@both_layers
@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)])
def test_one_value_per_feature_gives_the_bias_and_a_warning(shape, make):
    variables = variables_of(3)
    layer, stats = make(variables, momentum=0.5)
    message = (
        f"One value per feature: x has shape {shape}, so the output is the bias. "
        "Train with more examples, or pass use_running_average=True."
    )
    x = np.arange(1, 4, dtype=np.float32).reshape(shape)  # nothing is rounded
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        y = layer(x, use_running_average=False)
    assert len(caught) == 1
    np.testing.assert_array_equal(y.reshape(3), variables["params"]["bias"])
    old = variables["batch_stats"]
    np.testing.assert_allclose(stats()["mean"], (old["mean"] + x.reshape(3)) / 2, rtol=1e-6)
    np.testing.assert_array_equal(stats()["var"], old["var"] / 2)


@both_layers
def test_one_value_per_feature_is_no_matter_in_evaluation_or_over_replicas(make):
    variables = variables_of(3)
    layer, _ = make(variables)
    x = normal((1, 3), 1, 1)
    y = layer(x, use_running_average=True)
    right = reference.normalize(x, **variables["batch_stats"], **variables["params"])
    np.testing.assert_allclose(y, right.astype(float), rtol=1e-5)
    xs = normal((8, 1, 3), 1, 2)
    y, _ = forward(make, variables, xs, evaluates=False)
    m = reference.moments(xs)
    right = reference.normalize(xs, m.mean, m.var, **variables["params"])
    np.testing.assert_allclose(y, right.astype(float), atol=1e-5)


# Masks and state.


@functools.partial(jax.jit, static_argnums=0, static_argnames=("kind", "momentum"))
def step_with_gradients(step, x, dy, **settings):
    """With a scale and a bias of no particular values."""
    params = variables_of(x.shape[-1])["params"]
    return pull_back(step, x, params["scale"], params["bias"], dy, **settings)


@every_layer
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((6, 5, 3), bool), ((6, 1, 1), np.int32), ((5, 1), bool)],
)
def test_masks_as_flax(step, shape, dtype):
    x, dy = normal((6, 5, 3), 1, 1), normal((6, 5, 3), 1, 2)
    mask = (np.random.default_rng(0).random(shape) < 0.7).astype(dtype)
    ours = step_with_gradients(step, x, dy, where=mask)
    # Flax's NNX layer takes booleans only.
    whole = np.broadcast_to(mask.astype(bool), x.shape)
    theirs = step_with_gradients(step, x, dy, where=whole, kind=FLAXS[step])
    assert_agree(ours, theirs)


@every_layer
def test_a_feature_mask_and_a_batch_of_one_are_masks_as_any(step):
    x, dy = normal((6, 5, 3), 1, 1), normal((6, 5, 3), 1, 2)
    start = variables_of(3)["batch_stats"]
    running = start["mean"], start["var"]
    run = functools.partial(step, running=running, momentum=0.9)
    seen = np.array([True, False, True])

    @jax.jit
    def forward(x, *masks):
        return [run(x, where=mask) for mask in (None, *masks)]

    unmasked, *masked = forward(x, seen, seen[None, None])
    for out in masked:
        for old, new, all_seen in zip(running, out[1:], unmasked[1:], strict=True):
            np.testing.assert_allclose(new, np.where(seen, all_seen, old), rtol=1e-6)
        assert np.all(np.isfinite(out.y))

    @jax.jit
    def with_gradients(x, dy, *masks):
        params = variables_of(3)["params"].values()
        return [pull_back(run, x, *params, dy, where=mask) for mask in (None, *masks)]

    unmasked, *masked = with_gradients(x[:1], dy[:1], np.ones((1, 5, 1), bool), np.array(True))
    for results in masked:
        assert_agree(results, unmasked)


@every_layer
@pytest.mark.parametrize("mask", [np.zeros((8, 1), bool), np.zeros((8, 1), np.float32), False])
def test_an_all_masked_batch_leaves_the_state_untouched(step, mask):
    x, dy = normal((8, 3), 1, 1), normal((8, 3), 1, 2)
    x[2] = np.nan
    running = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    running, where = tuple(running), np.asarray(mask)
    out, gradients = step_with_gradients(step, x, dy, where=where, running=running, momentum=0.0)
    assert_same_bits(out[1:], running)
    chex.assert_tree_all_finite((out.y, gradients))


@every_layer
@pytest.mark.parametrize("x_dtype", ["float32", "float64", "bfloat16", "float16", "complex64"])
def test_state_keeps_its_dtype_over_100_steps(step, x_dtype):
    with jax.enable_x64(True):
        xs = normal((100, 16, 3), 1, 1, np.float64)
        if x_dtype == "complex64":
            xs = xs + 1j * normal(xs.shape, 1, 2, np.float64)
        xs = xs.astype(x_dtype)

        def body(running, x):
            return step(x, running=running, momentum=0.9)[1:], None

        (mean, var), _ = jax.jit(lambda s, xs: jax.lax.scan(body, s, xs))(start(xs[0]), xs)
        right = 0, 1
        for x in np.asarray(xs).astype(np.complex128 if x_dtype == "complex64" else float):
            m = reference.moments(x)
            right = 0.9 * right[0] + 0.1 * m.mean, 0.9 * right[1] + 0.1 * m.var
        rtol = 1e-13 if x_dtype == "float64" else 1e-6
        np.testing.assert_allclose(mean, right[0], rtol=rtol)
        np.testing.assert_allclose(var, right[1], rtol=rtol)
