"""Normalization: its accuracy, its derivatives of every order, and the transformations of JAX."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import largest_error
from derivatives import PLAIN, assert_derivatives
from implementations import (
    IMPLEMENTATIONS,
    alternating,
    every_implementation,
    one_of_each,
    pull_back,
    the_others,
)
from samples import RATIOS, ROWS, normal

import bnjax
from bnjax import Moments

pytestmark = pytest.mark.optimized

# Accuracy


@functools.cache
def measured(step, jit=True, **settings):
    """The step with gradients, compiled once for all mean / std."""
    f = functools.partial(pull_back, step, **settings)
    return jax.jit(f) if jit else f


@functools.cache
def batch(rows, ratio):
    """x, scale, bias and dy of normal data, with the reference's answers."""
    x, dy = normal((rows, 64), ratio), normal((rows, 64), seed=1)
    scale, bias = 1 + normal(64, seed=2) / 4, normal(64, seed=3)
    answers = (
        reference.batch_norm(x, scale, bias),
        reference.moments(x),
        reference.gradient(x, dy, scale),
    )
    return (x, scale, bias, dy), answers


@pytest.mark.parametrize("ratio", RATIOS)
@alternating(("jit", "rows"), [(False, ROWS[1]), *((True, rows) for rows in ROWS)])
def test_outputs_and_gradients_are_accurate(step, jit, rows, ratio):
    inputs, (y, m, grads) = batch(rows, ratio)
    out, (dx, dscale, dbias) = measured(step, jit)(*inputs)
    assert largest_error(out.y, y) <= 2e-6
    assert largest_error(dx, grads.x) <= 5e-6
    assert largest_error(out.var / m.var.astype(np.float64), 1) <= 2e-6
    assert largest_error(out.mean, m.mean) <= 1e-7 * ratio + 1e-7
    # Sums of 4096 terms of size 1: at their own rounding, whatever the mean.
    assert largest_error(dscale, grads.scale) <= 1e-4
    assert largest_error(dbias, grads.bias) <= 1e-4


@functools.cache
def stepping(step, jit=True, **settings):
    """The same without gradients."""
    f = functools.partial(step, **settings)
    return jax.jit(f) if jit else f


@functools.cache
def batch_of_16_bits(dtype, ratio):
    x, scale = normal((4099, 64), ratio, dtype=dtype), 1 + normal(64, seed=2) / 4
    return x, scale, reference.batch_norm(x, scale).astype(dtype)


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4])
@pytest.mark.parametrize(
    ("name", "jit", "dtype"),
    [
        ("batch_norm", False, jnp.bfloat16),
        ("moments, normalize", True, np.float16),
        ("linen", False, np.float16),
        ("nnx", True, jnp.bfloat16),
    ],
)
def test_16_bit_outputs_are_within_one_unit_in_the_last_place(name, jit, dtype, ratio):
    """Of the correctly rounded result.

    And within float32's spacing at 1, the standard deviation: no float32 mean is known better,
    and beside zero 16-bit numbers are finer. Without a bias, which may cancel y to as little.
    At 1e4 the data are what rounding has left of them.
    """
    x, scale, exact = batch_of_16_bits(dtype, ratio)
    y = np.asarray(stepping(IMPLEMENTATIONS[name], jit, dtype=dtype)(x, scale).y)
    assert y.dtype == dtype
    error = np.abs(y.astype(float) - exact.astype(float))
    assert np.all(error <= np.spacing(np.abs(exact)).astype(float) + np.finfo(np.float32).eps)


@functools.cache
def batch_of_64_bits(ratio):
    x, dy = normal((4099, 8), ratio, dtype=np.float64), normal((4099, 8), 0, 1, np.float64)
    scale, bias = normal(8, 1, 2, np.float64), normal(8, 0, 3, np.float64)
    answers = (
        reference.batch_norm(x, scale, bias),
        reference.moments(x),
        reference.gradient(x, dy, scale),
    )
    return (x, scale, bias, dy), answers


@pytest.mark.parametrize("ratio", RATIOS)
@alternating("jit", [False, True])
def test_float64_is_accurate(step, jit, ratio):
    inputs, (y, m, grads) = batch_of_64_bits(ratio)
    with jax.enable_x64(True):
        results = measured(step, jit)(*inputs)
        out, (dx, dscale, dbias) = jax.tree.map(np.asarray, results)
    chex.assert_type([out.y, out.mean, out.var, dx, dscale, dbias], np.float64)
    assert largest_error(out.y, y) <= 1e-12
    assert largest_error(out.var, m.var) <= 1e-12
    assert largest_error(dx, grads.x) <= 1e-12
    assert largest_error(dscale / 4099, grads.scale / 4099) <= 1e-12
    assert largest_error(dbias / 4099, grads.bias / 4099) <= 1e-12


@pytest.mark.parametrize("distance", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("ratio", RATIOS)
@one_of_each
def test_the_running_mean_as_pivot_is_accurate_when_near(step, ratio, distance):
    (x, scale, bias, dy), (y, m, grads) = batch(4099, ratio)
    running = np.full(64, ratio + distance, np.float32), np.ones(64, np.float32)
    out, (dx, _, _) = measured(step, pivot="running")(x, scale, bias, dy, running=running)
    condition = 1 + distance**2  # of the variance, as a difference of m2 and m1**2
    assert largest_error(out.y, y) <= 2e-6 * condition
    assert largest_error(out.var / m.var.astype(np.float64), 1) <= 2e-6 * condition
    assert largest_error(dx, grads.x) <= 5e-6 * condition


# Derivatives


WEIGHTS = np.array([[1.0], [0.0], [2.5], [1.0], [0.5]])
DERIVATIVE_CASES = {
    "mask": {"where": WEIGHTS > 0},
    "weights and pivot": {"where": WEIGHTS, "pivot": np.array([0.5, -0.25])},
}


@pytest.mark.parametrize(
    ("case", "chains"), [("mask", ["ff"]), ("weights and pivot", ["ff", "rr", "fff", "rrr"])]
)
def test_derivatives_to_order_3_forward_and_reverse(case, chains):
    """Of outputs and moments alike, with respect to x, scale and bias."""

    def f(batch_norm, x, scale, bias):
        y, m = batch_norm(x, scale, bias, epsilon=0.1, **DERIVATIVE_CASES[case])
        return jnp.sin(y), m.mean + m.remainder, m.var

    x = normal((5, 2), 1, dtype=np.float64)
    assert_derivatives(f, (x, np.array([0.7, -1.3]), np.array([0.2, 0.4])), ["f", "r", *chains])


@pytest.mark.parametrize(("where", "chains"), [(None, ["f", "ff"]), (WEIGHTS, ["r", "rr"])])
def test_derivatives_of_complex_input(where, chains):
    def f(batch_norm, real, imag):
        y, m = batch_norm(jax.lax.complex(real, imag), where=where, epsilon=0.1)
        return jnp.abs(y + 2) ** 2, m.var, jnp.real(m.mean), jnp.imag(m.mean)

    parts = normal((5, 2), 1, dtype=np.float64), normal((5, 2), seed=1, dtype=np.float64)
    assert_derivatives(f, parts, chains)


def test_derivatives_with_a_scale_and_bias_for_each_example():
    def f(batch_norm, x, scale, bias):
        return batch_norm(x, scale, bias, epsilon=0.1)[0] ** 2

    x = normal((5, 3, 2), dtype=np.float64)
    scale, bias = normal((5, 1, 2), 1, 1, np.float64), normal((5, 3, 1), 0, 2, np.float64)
    assert_derivatives(f, (x, scale, bias), ["f", "r", "ff", "rr"])


def complex_loss(real, imag):
    y, _ = bnjax.batch_norm(jax.lax.complex(real, imag), where=WEIGHTS)
    return jnp.sum(jnp.abs(y + 2) ** 3)


def loss_with_a_scale_for_each_example(x, scale):
    return jnp.sum(jnp.sin(bnjax.batch_norm(x, scale, x[:, :1])[0]))


@pytest.mark.parametrize("loss", [complex_loss, loss_with_a_scale_for_each_example])
def test_products_with_the_hessian_are_the_same_in_both_modes(loss):
    """Forward over reverse, and reverse over reverse."""
    with jax.enable_x64(True):
        args = normal((5, 2), 1, dtype=np.float64), normal((5, 2), seed=1, dtype=np.float64)
        vs = normal((5, 2), seed=2, dtype=np.float64), normal((5, 2), seed=3, dtype=np.float64)
        gradient = jax.grad(loss, (0, 1))

        def along(*args):
            return sum(map(jnp.vdot, gradient(*args), vs))

        def in_both_modes(*args):
            return jax.jvp(gradient, args, vs)[1], jax.grad(along, (0, 1))(*args)

        forward, reverse = jax.jit(in_both_modes, compiler_options=PLAIN)(*args)
        for ours, theirs in zip(forward, reverse, strict=True):
            assert np.abs(theirs).max() > 0.1
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_flow_through_the_returned_moments(weighted):
    """d mean / dx = w / n and d var / dx = 2 w (x - mean) / n."""
    g_mean, g_var = normal((2, 3), seed=1)
    w = np.random.default_rng(2).uniform(0, 2, (4099, 1)).astype(np.float32)
    w = w if weighted else np.ones_like(w)

    @jax.jit
    @jax.grad
    def gradient(x):
        _, m = bnjax.batch_norm(x, where=w if weighted else None)
        return jnp.sum(g_mean * m.mean + g_var * m.var)

    for ratio in RATIOS:
        x = normal((4099, 3), ratio)
        x_hat, r = reference.standardize(x, where=w, epsilon=0)
        expected = reference.wide(w) / np.sum(reference.wide(w)) * (g_mean + 2 * g_var * x_hat / r)
        assert largest_error(np.asarray(gradient(x)) * 4099, expected * 4099) <= 5e-6


def test_gradients_with_respect_to_sample_weights():
    """Against central differences of the reference; a weight of zero has one, too."""
    x, dy = normal((6, 2), 1, dtype=np.float64), normal((6, 2), 0, 1, np.float64)

    def loss(w):
        y = reference.batch_norm(x, where=w[:, None], epsilon=0.1)
        m = reference.moments(x, where=w[:, None])
        return np.sum(dy * y) + np.sum(m.mean) + np.sum(m.var**2) + np.sum(np.log(m.count))

    @jax.jit
    @jax.grad
    def gradient(w):
        y, m = bnjax.batch_norm(x, where=w[:, None], epsilon=0.1)
        return jnp.sum(dy * y) + jnp.sum(m.mean) + jnp.sum(m.var**2) + 2 * jnp.log(m.count)

    h = 1e-6 * np.eye(6)
    for last in (1.5, 0.0):
        w = np.array([1.0, 0.5, 2.0, 0.25, 3.0, last])
        expected = [(loss(w + e) - loss(w - e)) / 2e-6 for e in h]
        with jax.enable_x64(True):
            np.testing.assert_allclose(gradient(w), expected, rtol=1e-9, atol=1e-9)


def test_gradients_with_respect_to_sample_weights_survive_nan_of_weight_zero():
    x = normal((6, 2), 1)
    x[2] = np.nan
    w = np.array([1.0, 0.5, 0.0, 0.25, 3.0, 1.0], np.float32)

    @jax.jit
    @jax.grad
    def gradient(w):
        y, m = bnjax.batch_norm(x, where=w[:, None])
        return jnp.sum(jnp.sin(y)) + jnp.sum(m.mean * m.var)

    chex.assert_tree_all_finite(gradient(w))


def test_a_pivot_is_a_constant():
    """It cancels algebraically, so it has no gradient, and changes none."""
    x = normal((64, 3), 2)

    def loss(x, pivot):
        y, m = bnjax.batch_norm(x, pivot=pivot)
        return jnp.sum(jnp.sin(y)) + jnp.sum(m.mean * m.var)

    @jax.jit
    def with_and_without(x, pivot):
        return jax.grad(loss, (0, 1))(x, pivot), jax.grad(loss)(x, None)

    (dx, dpivot), without = with_and_without(x, np.full(3, 1.5, np.float32))
    np.testing.assert_array_equal(dpivot, np.zeros(3))
    np.testing.assert_allclose(dx, without, atol=2e-6)


@one_of_each
def test_second_derivatives_of_a_constant_channel_are_finite(step):
    def loss(x):
        return jnp.sum(jnp.sin(step(x, np.ones(2, np.float32), np.ones(2, np.float32)).y))

    @jax.jit
    def gradient_and_its_change(x):
        return jax.jvp(jax.grad(loss), (x,), (x + 1,))

    for value in (0.0, -3.0, 1e4, 1e9):
        chex.assert_tree_all_finite(gradient_and_its_change(np.full((7, 2), value, np.float32)))


# Transformations


@functools.cache
def small():
    x, scale, bias, dy = normal((9, 3)), normal(3, 2, 1), normal(3, seed=2), normal((9, 3), seed=3)
    return x, scale, bias, dy


def assert_step_close(out, x, scale, bias):
    m = reference.moments(x)
    np.testing.assert_allclose(out.y, reference.batch_norm(x, scale, bias), atol=5e-6)
    np.testing.assert_allclose(out.mean, m.mean, atol=1e-6)
    np.testing.assert_allclose(out.var, m.var, atol=1e-6)


@the_others
def test_vmap_over_seeds_needs_no_axis_name(step):
    """Each member of an ensemble has statistics of its own, and its own gradients."""
    seeds = [small(), tuple(2 * a + 1 for a in small())]
    stacked = [np.stack(arrays) for arrays in zip(*seeds, strict=True)]
    mapped = jax.jit(jax.vmap(functools.partial(pull_back, step)))
    out, grads = jax.tree.map(np.asarray, mapped(*stacked))
    for i, (x, scale, bias, dy) in enumerate(seeds):
        assert_step_close(jax.tree.map(lambda a, i=i: a[i], out), x, scale, bias)
        for actual, expected in zip(grads, reference.gradient(x, dy, scale), strict=True):
            np.testing.assert_allclose(actual[i], expected, atol=2e-5)


@one_of_each
def test_vmap_of_rows_with_a_name_is_the_whole_batch(step):
    x, scale, bias, _ = small()
    mapped = jax.vmap(lambda row: step(row[None], scale, bias, axis_name="rows"), axis_name="rows")
    out = jax.tree.map(np.asarray, jax.jit(mapped)(x))
    m = reference.moments(x)
    np.testing.assert_allclose(out.y[:, 0], reference.batch_norm(x, scale, bias), atol=5e-6)
    np.testing.assert_allclose(out.var, np.broadcast_to(m.var, (9, 3)), atol=1e-6)


@the_others
def test_jvp_is_the_adjoint_of_vjp(step):
    x, scale, bias, dy = small()
    grads = reference.gradient(x, dy, scale)
    tangents = normal((9, 3), seed=5), normal(3, seed=6), normal(3, seed=7)

    def output(*inputs):
        return step(*inputs).y

    _, dy_forward = jax.jit(functools.partial(jax.jvp, output))((x, scale, bias), tangents)
    expected = sum(np.sum(g * t) for g, t in zip(grads, tangents, strict=True))
    np.testing.assert_allclose(np.sum(dy * np.asarray(dy_forward)), float(expected), rtol=1e-5)


@one_of_each
def test_scan_over_training_steps(step):
    """The running statistics are the carry; what leaves is the formula, applied each time."""
    x = normal((20, 9, 3), 2)

    def body(running, x):
        y, *running = step(x, running=running, momentum=0.9)
        return tuple(running), y

    start = np.zeros(3, np.float32), np.ones(3, np.float32)
    (mean, var), ys = jax.jit(lambda s, x: jax.lax.scan(body, s, x))(start, x)
    expected = np.zeros(3), np.ones(3)
    for part, y in zip(x, ys, strict=True):
        m = reference.moments(part)
        expected = 0.9 * expected[0] + 0.1 * m.mean, 0.9 * expected[1] + 0.1 * m.var
        np.testing.assert_allclose(y, reference.batch_norm(part), atol=5e-6)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-6)
    np.testing.assert_allclose(var, expected[1], rtol=1e-6)


@one_of_each
def test_checkpoint_changes_nothing(step):
    x, scale, bias, dy = small()
    policies = None, jax.checkpoint_policies.nothing_saveable, bnjax.convs_and_dots_saveable

    def loss(x, scale, bias):
        return jnp.sum(dy * step(x, scale, bias).y)

    @jax.jit
    def with_each_policy(*inputs):
        remats = [jax.checkpoint(loss, policy=policy) for policy in policies]
        return [jax.grad(remat, (0, 1, 2))(*inputs) for remat in remats]

    expected = reference.gradient(x, dy, scale)
    for grads in with_each_policy(x, scale, bias):
        for actual, derivative in zip(grads, expected, strict=True):
            np.testing.assert_allclose(actual, derivative, atol=1e-5)


@the_others
def test_a_batch_of_any_size_exports_as_one_program(step):
    """With a symbolic size, about which comparisons are not to be decided."""
    (size,) = jax.export.symbolic_shape("size")
    x, scale, bias, _ = small()
    shape = jax.ShapeDtypeStruct((size, 3), x.dtype)
    out = jax.export.export(jax.jit(step))(shape, scale, bias).call(x, scale, bias)
    assert_step_close(out, x, scale, bias)


# Devices


@functools.cache
def replicated(step):
    def replica(x, scale, bias, dy, where):
        return pull_back(step, x, scale, bias, dy, where=where, axis_name="data")

    return jax.pmap(replica, axis_name="data", in_axes=(0, None, None, 0, 0))


@pytest.mark.parametrize("ratio", [0, 1e4])
@alternating("masked", [False, True])
def test_pmap_over_eight_devices_is_one_device_on_the_whole_batch(step, masked, ratio):
    """Gradients included; with masks the replicas' counts are uneven, one of them zero."""
    x, dy = normal((8, 16, 3), ratio), normal((8, 16, 3), seed=1)
    scale, bias = normal(3, 2, 2), normal(3, seed=3)
    where = None
    if masked:
        shares = np.array([1, 0.1, 0.5, 0, 0.9, 0.3, 0.7, 0.2])[:, None, None]
        where = np.random.default_rng(4).random((8, 16, 1)) < shares
        x[3] = np.nan

    results = replicated(step)(x, scale, bias, dy, where)
    out, (dx, dscale, dbias) = jax.tree.map(np.asarray, results)
    whole = {"where": None if where is None else where.reshape(128, 1)}
    x, dy = x.reshape(128, 3), dy.reshape(128, 3)
    y, m = reference.batch_norm(x, scale, bias, **whole), reference.moments(x, **whole)
    grads = reference.gradient(x, dy, scale, **whole)
    np.testing.assert_allclose(out.y.reshape(128, 3), y, atol=1e-5)
    np.testing.assert_allclose(dx.reshape(128, 3), grads.x, atol=1e-5)
    np.testing.assert_allclose(np.sum(dscale, 0), grads.scale, atol=1e-4)
    np.testing.assert_allclose(np.sum(dbias, 0), grads.bias, atol=1e-4)
    for replica_mean, replica_var in zip(out.mean, out.var, strict=True):
        np.testing.assert_allclose(replica_mean, m.mean, rtol=1e-7, atol=1e-6)
        np.testing.assert_allclose(replica_var, m.var, rtol=2e-6)


# Kinds of input


@pytest.mark.parametrize("ratio", [0, 1e4])
def test_scale_and_bias_for_each_example_and_position(ratio):
    """Conditional batch normalization: of the rank of x, and broadcasting against it."""
    x = normal((5, 7, 3), ratio)
    scale, bias = normal((5, 1, 3), 1, 1), normal((5, 7, 1), 0, 2)
    y, _ = jax.jit(bnjax.batch_norm)(x, scale, bias)
    assert largest_error(y, reference.batch_norm(x, scale, bias)) <= 1e-5
    y, _ = bnjax.batch_norm(x, scale[:, 0, None, :], bias[0, :, 0][None, :, None])
    assert largest_error(y, reference.batch_norm(x, scale, bias[:1])) <= 1e-5


def test_scale_without_bias_and_bias_without_scale():
    x, scale, bias, _ = small()
    y, _ = bnjax.batch_norm(x, scale)
    assert largest_error(y, reference.batch_norm(x, scale)) <= 5e-6
    y, _ = bnjax.batch_norm(x, bias=bias)
    assert largest_error(y, reference.batch_norm(x, bias=bias)) <= 5e-6


@the_others
def test_integers_are_normalized_in_float32(step):
    @jax.jit
    def of_each(xs, scale, bias):
        return [step(x, scale, bias) for x in xs]

    dtypes = np.int8, np.uint8, np.int32, bool
    xs = [(np.arange(24).reshape(8, 3) % 5).astype(dtype) for dtype in dtypes]
    for x, out in zip(
        xs, of_each(xs, np.ones(3, np.float32), np.zeros(3, np.float32)), strict=True
    ):
        assert out.y.dtype == np.float32
        assert_step_close(out, x.astype(int), np.ones(3), np.zeros(3))


@every_implementation
def test_numpy_and_jax_arrays_give_the_same(step):
    x, scale, bias, _ = small()
    chex.assert_trees_all_equal(step(x, scale, bias), step(*map(jnp.asarray, (x, scale, bias))))


@pytest.mark.parametrize("ratio", [0, 1e4])
@alternating("masked", [False, True])
def test_complex_input_is_divided_by_a_real_deviation(step, masked, ratio):
    x = (normal((64, 3), ratio) + 1j * normal((64, 3), -ratio, 1)).astype(np.complex64)
    where = np.random.default_rng(2).random((64, 1)) < 0.5 if masked else None
    scale, bias = normal(3, 1, 2), normal(3, seed=3)
    out = stepping(step)(x, scale, bias, where=where)
    m = reference.moments(x, where=where)
    assert (out.y.dtype, out.mean.dtype, out.var.dtype) == (x.dtype, x.dtype, np.float32)
    assert largest_error(out.y, reference.batch_norm(x, scale, bias, where=where)) <= 1e-5
    assert largest_error(out.mean, m.mean) <= 1e-6 + 2e-7 * ratio
    assert largest_error(out.var, m.var) <= 4e-6


# Inference


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_remembered_statistics_are_applied_as_they_are(dtype):
    x, scale, bias, _ = small()
    x = x.astype(dtype)
    running = {"mean": normal(3, 0, 5), "var": normal(3, 0, 6) ** 2}
    y = bnjax.normalize(x, Moments(**running), scale, bias, epsilon=1e-3)
    expected = reference.normalize(x, running["mean"], running["var"], scale, bias, epsilon=1e-3)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y.astype(np.float32), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-6
    )


def test_inference_on_a_batch_of_any_size_exports_as_one_program():
    (size,) = jax.export.symbolic_shape("size")
    x, m = small()[0], Moments(jnp.full(3, 0.5), jnp.full(3, 4.0))
    shape = jax.ShapeDtypeStruct((size, 3), x.dtype)
    y = jax.export.export(jax.jit(bnjax.normalize))(shape, m).call(x, m)
    assert largest_error(y, reference.normalize(x, m.mean, m.var)) <= 1e-6


def test_inference_is_exact_far_from_zero():
    """Where x * mul + add has lost every digit."""
    x, m = normal((64, 3), 1e6), Moments(jnp.full(3, 1e6), jnp.ones(3))
    y = jax.jit(bnjax.normalize)(x, m)
    expected = reference.normalize(x, np.full(3, 1e6), np.ones(3))
    assert largest_error(y, expected) <= 1e-6


def test_affine_is_the_same_map_as_one_multiplication_and_one_addition():
    x, scale, bias, _ = small()
    m = bnjax.moments(x)
    mul, add = map(np.asarray, bnjax.affine(m, scale, bias, epsilon=1e-3))
    assert largest_error(x * mul + add, reference.batch_norm(x, scale, bias, epsilon=1e-3)) <= 5e-6
    mul, add = map(np.asarray, bnjax.affine(m))
    assert largest_error(x * mul + add, reference.batch_norm(x)) <= 5e-6


def test_affine_counts_the_remainder_in():
    m = Moments(jnp.array([3.0]), jnp.array([4.0]), remainder=jnp.array([0.5]))
    mul, add = bnjax.affine(m, epsilon=1e-12)
    np.testing.assert_allclose((mul[0], add[0]), (0.5, -1.75), rtol=1e-6)
    y = bnjax.normalize(jnp.array([[3.5], [7.5]]), m, epsilon=1e-12)
    np.testing.assert_allclose(y[:, 0], [0.0, 2.0], atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("var", [-5e-4, -1e-30, 0.0, 3e38])
def test_any_variance_above_minus_epsilon(var, jit):
    """Averaged or rounded, a variance may be a little negative."""
    x = small()[0]
    m = bnjax.Moments(np.zeros(3, np.float32), np.full(3, var, np.float32))
    y = (jax.jit(bnjax.normalize, static_argnames="epsilon") if jit else bnjax.normalize)(
        x, m, epsilon=1e-3
    )
    expected = np.asarray(x, np.float64) / np.sqrt(var + 1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
