"""Bad input: each error with its whole message, and what is accepted all the same."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import assert_refused
from jax import lax

import bnjax
from bnjax import Moments

X = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
SQUARE = np.arange(9, dtype=np.float32).reshape(3, 3)
M = Moments(np.zeros(3, np.float32), np.ones(3, np.float32))


def both(x, **settings):
    """Each way to give a function x and these settings."""
    return {
        "moments": lambda: bnjax.moments(x, **settings),
        "normalize": lambda: bnjax.normalize(x, M, **settings),
        "batch_norm": lambda: bnjax.batch_norm(x, **settings),
        "jit": lambda: jax.jit(lambda x: bnjax.batch_norm(x, **settings))(x),
    }


every_function = pytest.mark.parametrize("function", ["moments", "normalize", "batch_norm", "jit"])


@every_function
@pytest.mark.parametrize(
    ("feature_axis", "message"),
    [
        (
            3,
            "feature_axis (a layer's axis) is 3, but x has shape (2, 4, 3). Choose from -3 to 2.",
        ),
        (
            (-1, -4),
            "feature_axis (a layer's axis) is (-1, -4), but x has shape (2, 4, 3). "
            "Choose from -3 to 2.",
        ),
        (
            (-1, 0, 2),
            "feature_axis (a layer's axis) is (-1, 0, 2), but that names an axis of x twice. "
            "Name each axis once.",
        ),
    ],
)
def test_feature_axes_out_of_range_or_twice(function, feature_axis, message):
    assert_refused(both(X, feature_axis=feature_axis)[function], message)


def test_a_scalar_has_no_feature_axis():
    message = "feature_axis (a layer's axis) is -1, but x has shape (). Give x a feature axis."
    assert_refused(lambda: bnjax.moments(1.0), message)


@every_function
@pytest.mark.parametrize("feature_axis", [1.0, None, "C", (0, 1.0)])
def test_a_feature_axis_that_is_no_integer(function, feature_axis):
    message = (
        f"feature_axis (a layer's axis) is {feature_axis!r}, but axes are whole numbers. "
        "Choose one, such as -1, or several."
    )
    assert_refused(both(X, feature_axis=feature_axis)[function], message, TypeError)


@pytest.mark.parametrize("epsilon", [0, 0.0, -1e-5, np.float32(-1), float("nan")])
def test_an_epsilon_that_is_not_positive(epsilon):
    message = (
        f"epsilon is {epsilon}, but it keeps the variance away from zero. "
        "Choose a positive number, such as 1e-5."
    )
    assert_refused(lambda: bnjax.normalize(X, M, epsilon=epsilon), message)
    assert_refused(lambda: bnjax.batch_norm(X, epsilon=epsilon), message)
    assert_refused(lambda: bnjax.affine(M, epsilon=epsilon), message)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, np.float32(2), float("nan")])
def test_a_momentum_outside_0_to_1(momentum):
    message = (
        f"momentum is {momentum}, but it is the share of the running statistics that is kept. "
        "Choose a number from 0 to 1."
    )
    assert_refused(lambda: bnjax.ema(M, bnjax.moments(X), momentum=momentum), message)


def test_an_epsilon_that_is_zero_in_the_dtype():
    """Division by zero; in double precision it is a number."""
    message = (
        "epsilon is 1e-40, zero in float32, but it keeps the variance away from zero. "
        "Choose a positive number, such as 1e-5."
    )
    cov = bnjax.CovMoments.initial(3)
    assert_refused(lambda: bnjax.batch_norm(X, epsilon=1e-40), message)
    assert_refused(lambda: bnjax.affine(M, epsilon=1e-40), message)
    assert_refused(lambda: bnjax.whiten(X, cov, epsilon=1e-40), message)
    renorm = {"r_max": 3.0, "d_max": 5.0, "epsilon": 1e-40}
    assert_refused(lambda: bnjax.batch_renorm(X, M, **renorm), message)
    with jax.enable_x64(True):
        constant = np.ones((4, 3))
        assert np.all(bnjax.batch_norm(constant, epsilon=1e-40)[0] == 0)
        cov = bnjax.CovMoments.initial(3, np.float64)
        assert np.isfinite(bnjax.whiten(constant, cov, epsilon=1e-40)).all()


CURES = {
    "epsilon": "Choose a positive number, such as 1e-5.",
    "momentum": "Choose a number from 0 to 1.",
    "r_max": "Choose a number from 1 (no correction) upwards, such as 3.",
    "d_max": "Choose a number from 0 (no correction) upwards, such as 5.",
}
NO_NUMBERS = {
    "an array": (np.full(3, 0.5), "has shape (3,)"),
    "a JAX array": (jnp.full(3, 0.5), "has shape (3,)"),
    "a list": ([0.5, 0.5, 0.5], "has shape (3,)"),
    "one value in an array": (np.full(1, 0.5), "has shape (1,)"),
    "a word": ("0.5", "is '0.5'"),
    "a complex number": (0.5j, "is 0.5j"),
    "nothing": (None, "is None"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [pair for pair in itertools.product(CURES, NO_NUMBERS) if pair != ("momentum", "nothing")],
)
def test_what_is_no_number(name, kind):
    """Also traced, where a shape is known."""
    given, said = NO_NUMBERS[kind]
    limits = {"r_max": 3.0, "d_max": 5.0}
    calls = {
        "epsilon": [
            lambda p: bnjax.batch_norm(X, epsilon=p),
            lambda p: bnjax.affine(M, epsilon=p),
            lambda p: bnjax.whiten(X, bnjax.CovMoments.initial(3), epsilon=p),
            lambda p: bnjax.batch_renorm(X, M, epsilon=p, **limits),
            lambda p: bnjax.drift({"mean": M.mean, "var": M.var}, bnjax.moments(X), epsilon=p),
        ],
        "momentum": [
            lambda p: bnjax.ema(M, bnjax.moments(X), momentum=p),
            lambda p: bnjax.ema(M, bnjax.moments(X), momentum=lambda steps: p, steps=0),
        ],
        "r_max": [lambda p: bnjax.batch_renorm(X, M, **limits | {"r_max": p})],
        "d_max": [lambda p: bnjax.batch_renorm(X, M, **limits | {"d_max": p})],
    }[name]
    message = f"{name} {said}, but it is one number for all features. {CURES[name]}"
    for call in calls:
        assert_refused(lambda call=call: call(given), message)
        if isinstance(given, jax.Array):
            assert_refused(lambda call=call: jax.jit(call)(given), message)


@pytest.mark.parametrize("given", [0.5, np.float32(0.5), np.array(0.5), jnp.array(0.5)])
def test_every_kind_of_number_is_one(given):
    half = bnjax.ema(M, bnjax.moments(X), momentum=0.5)
    chex.assert_trees_all_equal(bnjax.ema(M, bnjax.moments(X), momentum=given), half)
    y, _ = bnjax.batch_norm(X, epsilon=0.5)
    np.testing.assert_array_equal(bnjax.batch_norm(X, epsilon=given)[0], y)


def test_debias_with_a_schedule():
    message = (
        "debias is True and momentum is a schedule, but debiasing needs one momentum for all "
        "steps. Leave one of the two out."
    )
    batch = bnjax.moments(X)
    assert_refused(
        lambda: bnjax.ema(M, batch, momentum=lambda t: 0.9, steps=0, debias=True), message
    )


def test_averages_that_count_steps_without_them():
    message = (
        "steps is None, but momentum=None, a schedule and debias=True depend on the number of "
        "updates so far. Pass it as steps, or give the running statistics that leaf."
    )
    batch = bnjax.moments(X)
    for how in ({"momentum": None}, {"momentum": 0.9, "debias": True}, {"momentum": lambda t: 0.9}):
        assert_refused(lambda how=how: bnjax.ema(M, batch, **how), message)


@pytest.mark.parametrize("ddof", [-1, 0.5, None])
def test_degrees_of_freedom(ddof):
    message = (
        f"ddof is {ddof!r}, but the variance is divided by count - ddof. "
        "Choose 0, or 1 for the unbiased variance."
    )
    assert_refused(lambda: bnjax.ema(M, bnjax.moments(X), momentum=0.9, ddof=ddof), message)


@pytest.mark.parametrize("momentum", [0, 1, 0.0, 1.0, np.float32(0.5), jnp.float32(0.5)])
def test_a_momentum_from_0_to_1_is_fine(momentum):
    batch = bnjax.moments(X)
    expected = float(momentum) * M.mean + (1 - float(momentum)) * batch.mean
    np.testing.assert_allclose(bnjax.ema(M, batch, momentum=momentum).mean, expected)


def test_traced_settings_are_taken_as_they_come():
    """Their values are not known when the program is built."""
    f = jax.jit(lambda x, epsilon: bnjax.batch_norm(x, epsilon=epsilon)[0])
    y = f(X, 0.1)
    np.testing.assert_allclose(y, reference.batch_norm(X, epsilon=0.1), atol=1e-6)
    f = jax.jit(lambda batch, momentum: bnjax.ema(M, batch, momentum=momentum))
    batch = bnjax.moments(X)
    np.testing.assert_array_equal(f(batch, 0.0).mean, batch.mean)


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("shape", [(), (4,), (1,), (2, 3), (3, 4, 3), (1, 1, 1, 3)])
def test_a_scale_or_bias_that_does_not_fit(name, shape):
    message = (
        f"{name} has shape {shape}, but x has shape (2, 4, 3) and features of shape (3,). "
        "Give one value for each feature, or an array of x's rank that broadcasts to x."
    )
    p = {name: np.ones(shape, np.float32)}
    assert_refused(lambda: bnjax.normalize(X, M, **p), message)
    assert_refused(lambda: bnjax.batch_norm(X, **p), message)


@pytest.mark.parametrize("name", ["mean", "var"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 4, 3)])
def test_statistics_that_do_not_fit(name, shape):
    message = (
        f"{name} has shape {shape}, but the features of x have shape (3,). "
        "Give one value for each feature."
    )
    m = M._replace(**{name: np.ones(shape, np.float32)})
    assert_refused(lambda: bnjax.normalize(X, m), message)


def test_a_pivot_that_does_not_fit():
    message = (
        "pivot has shape (4,), but the features of x have shape (3,). "
        "Give one value for each feature."
    )
    assert_refused(lambda: bnjax.moments(X, pivot=np.ones(4, np.float32)), message)
    assert_refused(lambda: bnjax.batch_norm(X, pivot=np.ones(4, np.float32)), message)


@pytest.mark.parametrize("name", ["mean", "var"])
def test_running_statistics_that_do_not_fit(name):
    message = (
        f"running.{name} has shape (4,), but the features of x have shape (3,). "
        "Give one value for each feature."
    )
    running = M._replace(**{name: np.ones(4, np.float32)})
    assert_refused(lambda: bnjax.ema(running, bnjax.moments(X), momentum=0.9), message)


def test_complex_statistics_do_not_fit_into_a_real_state():
    message = (
        "running.mean is float32, which cannot hold a mean of complex input. "
        "Initialize the running statistics with complex input."
    )
    batch = bnjax.moments(X.astype(np.complex64))
    assert_refused(lambda: bnjax.ema(M, batch, momentum=0.9), message)


@every_function
@pytest.mark.parametrize(
    ("shape", "cure"),
    [
        ((2, 4), "Write mask[..., None]."),
        ((2,), "Write mask.reshape((2, 1, 1))."),
        ((4,), "Give a mask that broadcasts to x as in NumPy."),
        ((4, 2), "Give a mask that broadcasts to x as in NumPy."),
        ((5, 3), "Give a mask that broadcasts to x as in NumPy."),
        ((1, 2, 4, 3), "Give a mask that broadcasts to x as in NumPy."),
    ],
)
def test_masks_that_do_not_broadcast(function, shape, cure):
    message = (
        f"where (a layer's mask) has shape {shape} and x has shape (2, 4, 3): "
        f"they do not broadcast. {cure}"
    )
    assert_refused(both(X, where=np.ones(shape, bool))[function], message)


def test_the_cure_for_a_mask_of_examples_with_features_first():
    message = (
        "where (a layer's mask) has shape (2, 3) and x has shape (2, 4, 3): "
        "they do not broadcast. Write mask.reshape((2, 1, 3))."
    )
    assert_refused(lambda: bnjax.moments(X, feature_axis=1, where=np.ones((2, 3), bool)), message)
    cured = bnjax.moments(X, feature_axis=1, where=np.ones((2, 1, 3), bool))
    assert cured.count == 6


@every_function
@pytest.mark.parametrize(
    ("x", "shape", "examples", "features"),
    [
        (SQUARE, (3,), "mask[..., None]", "mask.reshape((1, 3))"),
        (np.ones((3, 3, 3), np.float32), (3, 3), "mask[..., None]", "mask.reshape((1, 3, 3))"),
        (
            np.ones((3, 2, 3), np.float32),
            (3,),
            "mask.reshape((3, 1, 1))",
            "mask.reshape((1, 1, 3))",
        ),
    ],
    ids=["[N] on [N, N]", "[N, N] on [N, N, N]", "[N] on [N, T, N]"],
)
def test_ambiguous_masks(function, x, shape, examples, features):
    message = (
        f"where (a layer's mask) has shape {shape} and x has shape {x.shape}: examples or "
        f"features could be meant. For a mask of the examples write {examples}, of the last "
        f"axes {features}."
    )
    assert_refused(both(x, where=np.ones(shape, bool))[function], message)


def test_both_cures_for_an_ambiguous_mask_work():
    mask = np.array([True, True, False])
    over_examples = bnjax.moments(SQUARE, where=mask[..., None])
    np.testing.assert_array_equal(over_examples.mean, SQUARE[:2].mean(0))
    over_features = bnjax.moments(SQUARE, where=mask.reshape((1, 3)))
    np.testing.assert_array_equal(over_features.count, [3, 3, 0])


@every_function
def test_negative_weights(function):
    message = (
        "where (a layer's mask) holds the negative weight -0.5. "
        "Sample weights must not be negative: clip them at 0."
    )
    where = np.array([1.0, -0.5], np.float32).reshape(2, 1, 1)
    assert_refused(both(X, where=where)[function], message)


@every_function
def test_weights_that_are_no_numbers(function):
    message = (
        "where (a layer's mask) holds the weight nan. "
        "Sample weights must not be negative: clip them at 0."
    )
    where = np.array([1.0, np.nan], np.float32).reshape(2, 1, 1)
    assert_refused(both(X, where=where)[function], message)


@every_function
def test_complex_masks(function):
    message = (
        "where (a layer's mask) has dtype complex64. "
        "Give booleans or integers as a mask, or floats >= 0 as sample weights."
    )
    assert_refused(both(X, where=np.ones((2, 1, 1), np.complex64))[function], message)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
@pytest.mark.parametrize("function", ["moments", "batch_norm", "jit"])
def test_empty_batches(function, shape):
    message = f"x has shape {shape}, so there is no value to measure. Leave empty batches out."
    assert_refused(both(np.zeros(shape, np.float32))[function], message)


def test_inference_on_an_empty_batch_is_empty():
    chex.assert_shape(bnjax.normalize(np.zeros((0, 3), np.float32), M), (0, 3))


@pytest.mark.parametrize("axis_name", ["dta", ("data", "dta")])
def test_an_axis_name_that_is_not_mapped(axis_name):
    def inside(f):
        return jax.vmap(f, axis_name="data")(X)

    with pytest.raises(NameError) as from_jax:
        inside(lambda x: lax.psum(1, axis_name))
    message = (
        f"axis_name is {axis_name!r}, but no such axis is mapped here ({from_jax.value}). "
        "Call this under jax.pmap, jax.shard_map or jax.vmap with that axis name, or "
        "leave axis_name out: plain jit over sharded arrays needs none."
    )
    for call in (
        lambda x: bnjax.moments(x, axis_name=axis_name),
        lambda x: bnjax.batch_norm(x, axis_name=axis_name),
        lambda x: bnjax.pmerge(bnjax.moments(x), axis_name),
    ):
        assert_refused(lambda call=call: inside(call), message, NameError)


def test_groups_where_jax_has_none():
    groups = [[0], [1]]

    def inside(f):
        return jax.vmap(f, axis_name="data")(X)

    message = (
        f"axis_index_groups is {groups}, and JAX has no groups under this transformation. "
        "Use jax.pmap or jax.shard_map(check_vma=False), or a mesh with one more axis."
    )
    assert_refused(
        lambda: inside(lambda x: bnjax.moments(x, axis_name="data", axis_index_groups=groups)),
        message,
        NotImplementedError,
    )


# What is accepted


@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (1, 3), (4, 3), (4, 1), (2, 1, 1), (1, 4, 1), (1, 1, 3), (2, 4, 3)]
)
@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_masks_broadcast_as_in_numpy(shape, dtype):
    """Also with fewer axes than x, where only the features can be meant."""
    where = np.ones(shape, dtype)
    if where.ndim:
        where[..., -1:] = where.shape[-1] == 1
    m = bnjax.moments(X, where=where)
    expected = reference.moments(X, where=where)
    np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(m.var, expected.var, rtol=1e-6)
    np.testing.assert_array_equal(np.broadcast_to(m.count, 3), expected.count)


def test_a_mask_of_features_is_accepted_where_only_features_can_be_meant():
    m = bnjax.moments(X[0], where=np.array([True, False, True]))
    np.testing.assert_array_equal(m.count, [4, 0, 4])


def test_any_integer_but_zero_is_in_the_mask():
    where = np.array([7, 0], np.int32).reshape(2, 1, 1)
    np.testing.assert_array_equal(bnjax.moments(X, where=where).mean, X[0].mean(0))


def test_lists_are_masks_too():
    m = bnjax.moments(X, where=[[[True]], [[False]]], feature_axis=[2])
    np.testing.assert_array_equal(m.mean, X[0].mean(0))


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)])
def test_one_value_for_each_feature_gives_the_bias(shape):
    """Functions accept a batch of one; it is the layers that warn."""
    x = np.broadcast_to(np.array([1.5, -2.0, 1e6], np.float32), shape)
    y, m = bnjax.batch_norm(x, bias=np.array([1.0, 2.0, 3.0], np.float32))
    np.testing.assert_allclose(y.reshape(3), [1, 2, 3], atol=1e-4)
    np.testing.assert_array_equal(m.mean + m.remainder, x.reshape(3))
    np.testing.assert_allclose(m.var, np.zeros(3), atol=1e-9)
    assert m.count == 1


def test_every_axis_may_be_a_feature_axis():
    m = bnjax.moments(X, feature_axis=(0, 1, 2))
    np.testing.assert_array_equal(m.mean + m.remainder, X)
    np.testing.assert_allclose(m.var, np.zeros_like(X), atol=1e-9)


# What is no statistic, or not of the kind that is needed

COV = bnjax.CovMoments(np.zeros(3, np.float32), np.eye(3, dtype=np.float32)[None], 8.0)
TWO = Moments(np.zeros(2, np.float32), np.ones(2, np.float32), 8.0)
TAKERS = {
    "merge a": ("a", lambda m: bnjax.merge(m, M)),
    "merge b": ("b", lambda m: bnjax.merge(M, m)),
    "pmerge": ("m", lambda m: bnjax.pmerge(m, "replicas")),
    "ema running": ("running", lambda m: bnjax.ema(m, M, momentum=0.9)),
    "ema batch": ("batch", lambda m: bnjax.ema(M, m, momentum=0.9)),
    "normalize": ("m", lambda m: bnjax.normalize(X, m)),
    "affine": ("m", lambda m: bnjax.affine(m)),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("given", [{"mean": X, "var": X}, X, (X, M), None], ids=type)
def test_what_is_no_statistic(taker, given):
    name, call = TAKERS[taker]
    assert_refused(
        lambda: call(given),
        f"{name} is of type {type(given).__name__}, but bnjax.Moments or another statistic is "
        "needed. Measure it with bnjax.moments, or write bnjax.Moments(mean, var).",
        TypeError,
    )


def test_two_kinds_of_statistics():
    cure = "Measure both with the same function."
    said = f"a is a Moments, but b is a CovMoments. {cure}"
    assert_refused(lambda: bnjax.merge(M, COV), said, TypeError)
    said = f"running is a CovMoments, but batch is a Moments. {cure}"
    assert_refused(lambda: bnjax.ema(COV, M, momentum=0.9), said, TypeError)
    said = (
        "m is of type Moments, but whitening needs covariances. "
        "Measure them with bnjax.cov_moments."
    )
    assert_refused(lambda: bnjax.whiten(X, M), said, TypeError)


def test_merging_moments_of_other_features():
    said = "{}.mean has shape (3,), but {}.mean has shape (2,). Take both from the same features."
    assert_refused(lambda: bnjax.merge(M, TWO), said.format("a", "b"))
    stats = {"norm": {"mean": M.mean, "var": M.var}}
    assert_refused(lambda: bnjax.drift(stats, {"norm": TWO}), said.format("batch_stats", "moments"))
    a, b = (bnjax.cov_moments(np.ones((8, 4), np.float32), group_size=size) for size in (2, 4))
    said = (
        "a.cov has shape (2, 2, 2), but b.cov has shape (1, 4, 4). "
        "Take both from the same features."
    )
    assert_refused(lambda: bnjax.merge(a, b), said)


# Numbers and names as other libraries give them


def test_whole_numbers_of_numpy():
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    m = bnjax.cov_moments(x, group_size=np.int64(2), feature_axis=np.int64(1))
    chex.assert_trees_all_equal(m, bnjax.cov_moments(x, group_size=2))
    y = bnjax.whiten(x, m, method="newton_schulz", iterations=np.int32(3))
    chex.assert_trees_all_equal(y, bnjax.whiten(x, m, method="newton_schulz", iterations=3))
    bnjax.ema(M, M._replace(count=8.0), momentum=0.9, ddof=np.int64(1))


def test_names_and_groups_in_lists_and_arrays():
    x = np.arange(8, dtype=np.float32).reshape(4, 2, 1)

    def measured(axis_name, measure):
        return jax.jit(jax.vmap(lambda x: measure(x, axis_name), axis_name="i"))(x)

    for measure in (
        lambda x, name: bnjax.moments(x, axis_name=name),
        lambda x, name: bnjax.cov_moments(x, axis_name=name),
        lambda x, name: bnjax.pmerge(bnjax.moments(x), name),
    ):
        chex.assert_trees_all_equal(measured(["i"], measure), measured("i", measure))
    groups = np.arange(4).reshape(2, 2)
    f = [
        jax.pmap(lambda x, g=g: bnjax.moments(x, axis_name="i", axis_index_groups=g), axis_name="i")
        for g in (groups, groups.tolist())
    ]
    chex.assert_trees_all_equal(f[0](x), f[1](x))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
def test_numbers_that_jax_does_not_promote(dtype):
    x = jnp.asarray(np.arange(6).reshape(3, 2)).astype(dtype)
    wide = x.astype(jnp.float32)
    chex.assert_trees_all_equal(bnjax.moments(x), bnjax.moments(wide))
    y, expected = bnjax.batch_norm(x)[0], bnjax.batch_norm(wide)[0]
    assert y.dtype == (x.dtype if dtype.startswith("float") else jnp.float32)
    chex.assert_trees_all_equal(y, expected.astype(y.dtype))


def test_an_epsilon_in_bfloat16():
    y, _ = bnjax.batch_norm(X, epsilon=jnp.bfloat16(0.5))
    np.testing.assert_allclose(y, bnjax.batch_norm(X, epsilon=0.5)[0], rtol=1e-6)


def test_real_input_and_complex_moments():
    """Nothing of what is complex is dropped."""
    x = X + 1j * X[::-1]
    m = bnjax.moments(x)
    np.testing.assert_allclose(
        bnjax.normalize(X, m), bnjax.normalize(X.astype(np.complex64), m), rtol=1e-6
    )
    y = bnjax.normalize(X, M, scale=1j * np.ones(3, np.float32))
    np.testing.assert_allclose(y, 1j * np.asarray(bnjax.normalize(X, M)), rtol=1e-6)


def test_no_features():
    x, empty = np.zeros((4, 0), np.float32), Moments(np.zeros(0), np.ones(0))
    m = bnjax.moments(x, where=np.ones((4, 0), bool))
    assert bnjax.ema(empty, m, momentum=0.9).mean.shape == (0,)
