"""Batch renormalization against the formulas of Ioffe (2017), written out in NumPy."""

import functools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import reference
from checks import assert_refused, largest_error
from flax import nnx
from layouts import LAYOUTS
from samples import between_signs

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import Moments

WIDE = {"r_max": np.inf, "d_max": np.inf}
NONE = {"r_max": 1.0, "d_max": 0.0}
LIMITS = {"r_max": 1.2, "d_max": 0.3}


# The reference: section 3 of the paper


class Renormed(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray
    r: np.ndarray
    d: np.ndarray


def renorm(x, mean, var, scale, bias, dy, *, r_max, d_max, w=None, epsilon=1e-5):
    """Algorithm 1, and the paper's derivatives, over the first axis. w: weights of the rows."""
    x, mean, var, scale, bias, dy = map(reference.wide, (x, mean, var, scale, bias, dy))
    share = np.ones((len(x), 1)) if w is None else reference.wide(w)
    share = share / share.sum(0)
    x_less_mu = x - (share * x).sum(0)
    x_less_mu = x_less_mu - (share * x_less_mu).sum(0)
    mu_b_less_mu = (share * (x - mean)).sum(0)
    sigma_b = np.sqrt((share * x_less_mu**2).sum(0) + reference.wide(epsilon))
    sigma = np.sqrt(var + reference.wide(epsilon))
    r = np.clip(sigma_b / sigma, 1 / reference.wide(r_max), r_max)
    d = np.clip(mu_b_less_mu / sigma, -d_max, d_max)
    x_hat = x_less_mu / sigma_b * r + d
    dx_hat = dy * scale
    dsigma_b = (dx_hat * x_less_mu * -r / sigma_b**2).sum(0)
    dmu_b = (dx_hat * -r / sigma_b).sum(0)
    dx = dx_hat * r / sigma_b + dsigma_b * share * x_less_mu / sigma_b + dmu_b * share
    return Renormed(x_hat * scale + bias, dx, (dy * x_hat).sum(0), dy.sum(0), r, d)


def pull_back(x, running, scale, bias, dy, **settings):
    """y, the gradients of sum(dy * y), and the batch's moments."""

    def apply(x, scale, bias):
        return bnjax.batch_renorm(x, running, scale, bias, **settings)

    y, pull, m = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, *pull(dy), m


@functools.cache
def compiled(**limits):
    """`pull_back` in one program for all values."""
    return jax.jit(functools.partial(pull_back, **limits))


def batch(rows=33, features=8, ratio=0.0, dtype=np.float32, seed=0):
    """x, scale, bias and dy. The features differ in mean and standard deviation."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, rows, features))
    x = ratio + x * np.linspace(0.5, 2, features) + np.linspace(-1, 1, features)
    scale, bias = 1 + rng.standard_normal((2, features)) / 4
    return tuple(a.astype(dtype) for a in (x, scale, bias, dy))


def start(features=8, dtype=np.float32):
    return Moments(np.zeros(features, dtype), np.ones(features, dtype))


# Values


@pytest.mark.parametrize(
    ("dtype", "tolerance", "weighted"), [(np.float32, 1e-5, True), (np.float64, 1e-12, False)]
)
def test_twenty_steps_equal_the_paper(dtype, tolerance, weighted):
    """The limits open from 1 and 0, and bind ever less; each step sees new data."""
    clipped, free = 0, 0
    mean, var = np.zeros(8, np.longdouble), np.ones(8, np.longdouble)
    with jax.enable_x64(dtype == np.float64):
        running = start(dtype=dtype)

        @jax.jit
        def step(x, running, *inputs, **settings):
            *results, m = pull_back(x, running, *inputs, **settings)
            return results, bnjax.ema(running, m, momentum=0.9)

        for i in range(20):
            r_max, d_max = 1 + 0.5 * i / 19, i / 19
            x, scale, bias, dy = batch(dtype=dtype, seed=i)
            w = np.random.default_rng(i).random((33, 1)).astype(dtype) if weighted else None
            expected = renorm(x, mean, var, scale, bias, dy, r_max=r_max, d_max=d_max, w=w)
            found, running = step(
                x, running, scale, bias, dy,
                r_max=jnp.asarray(r_max, dtype), d_max=jnp.asarray(d_max, dtype), where=w,
            )  # fmt: skip
            for actual, right in zip(found, expected, strict=False):
                assert largest_error(actual, right) <= tolerance * np.abs(right).max()
            measured = reference.moments(x, where=w)
            mean = 0.9 * mean + np.longdouble(0.1) * measured.mean
            var = 0.9 * var + np.longdouble(0.1) * measured.var
            chex.assert_type([*found, running.mean, running.var], dtype)
            assert largest_error(running.mean, mean) <= tolerance
            assert largest_error(running.var, var) <= tolerance
            inside = (expected.r > 1 / r_max) & (expected.r < r_max) & (abs(expected.d) < d_max)
            clipped, free = clipped + np.sum(~inside), free + np.sum(inside)
    assert min(clipped, free) > 40  # of 160 features and steps


def test_without_correction_it_is_batch_norm():
    """With and without a mask."""
    x, scale, bias, dy = batch()
    running = Moments(np.full(8, 3, np.float32), np.full(8, 0.1, np.float32))

    @jax.jit
    def both(where):
        batch_norm = functools.partial(bnjax.batch_norm, where=where)
        y, pull, m = jax.vjp(batch_norm, x, scale, bias, has_aux=True)
        return pull_back(x, running, scale, bias, dy, where=where, **NONE), (y, *pull(dy), m)

    for where in None, np.arange(33)[:, None] < 20:
        (*found, m), (*expected, same) = both(where)
        chex.assert_trees_all_equal(m, same)
        chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("jit", [False, True])
def test_with_wide_limits_it_is_inference_at_every_mean_to_std(jit, ratio):
    x, scale, bias, dy = batch(4099, ratio=ratio)
    running = Moments(np.full(8, ratio, np.float32), np.full(8, 1.5, np.float32))
    f = compiled(**WIDE) if jit else functools.partial(pull_back, **WIDE)
    y, dx, *_ = f(x, running, scale, bias, dy)
    assert largest_error(y, reference.normalize(x, running.mean, running.var, scale, bias)) <= 4e-6
    expected = renorm(x, running.mean, running.var, scale, bias, dy, **WIDE)
    assert largest_error(dx, expected.dx) <= 5e-6


@pytest.mark.parametrize("jit", [False, True])
def test_the_remainder_of_the_running_mean_counts(jit):
    """float32 holds numbers near 1e6 to 0.06 only; the running mean's remainder has the rest."""
    x, _, _, _ = batch(4099, ratio=1e6)
    running = Moments(np.full(8, 1e6, np.float32), np.ones(8), 0.0, np.full(8, 0.02, np.float32))
    running = running._replace(var=running.var.astype(np.float32))
    f = functools.partial(bnjax.batch_renorm, **WIDE)
    y, _ = (jax.jit(f) if jit else f)(x, running)
    mean = reference.wide(running.mean) + reference.wide(running.remainder)
    assert largest_error(y, reference.normalize(x, mean, running.var)) <= 4e-6


def test_running_statistics_are_constants():
    x, scale, bias, dy = batch()

    def output(running):
        return jnp.sum(dy * bnjax.batch_renorm(x, running, scale, bias, **LIMITS)[0])

    grads = jax.grad(output)(start())
    chex.assert_trees_all_equal((grads.mean, grads.var), (np.zeros(8, np.float32),) * 2)


@pytest.mark.parametrize("limits", [NONE, LIMITS, WIDE], ids=["none", "limits", "wide"])
@pytest.mark.parametrize("var", [0.0, 1.0])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_a_constant_channel_has_finite_outputs_and_gradients(value, var, limits):
    x = np.full((6, 2), value, np.float32)
    running = Moments(np.zeros(2, np.float32), np.full(2, var, np.float32))
    ones = np.ones(2, np.float32)
    found = compiled()(x, running, ones, ones, x, **limits)
    chex.assert_tree_all_finite(found)
    expected = renorm(x, running.mean, running.var, ones, ones, x, **limits)
    assert largest_error(found[0], expected.y) <= 1e-6 * np.abs(expected.y).max()


def test_features_on_other_axes():
    x = np.random.default_rng(0).standard_normal((4, 3, 5, 2)).astype(np.float32)
    running = Moments(np.ones((3, 2), np.float32), np.full((3, 2), 2, np.float32))
    scale = np.full((3, 2), 2, np.float32)
    f = jax.jit(functools.partial(bnjax.batch_renorm, **LIMITS), static_argnames="feature_axis")
    y, m = f(x, running, scale, feature_axis=(1, -1))
    flat = x.transpose(0, 2, 1, 3).reshape(20, 6)
    flat_running = Moments(running.mean.reshape(6), running.var.reshape(6))
    same, _ = f(flat, flat_running, scale.reshape(6))
    chex.assert_shape(m.mean, (3, 2))
    same = np.asarray(same).reshape(4, 5, 3, 2).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(y, same, rtol=1e-6, atol=1e-6)


def test_scale_and_bias_for_each_example():
    x, _, _, dy = batch()
    rng = np.random.default_rng(1)
    shapes = (33, 1), (1, 8), (33, 8)
    given = [rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes]

    @jax.jit
    def of_each(given):
        return [pull_back(x, start(), *affine, dy, **LIMITS)[:2] for affine in given]

    for (y, dx), (scale, bias) in zip(of_each(given), given, strict=True):
        expected = renorm(x, np.zeros(8), np.ones(8), scale, bias, dy, **LIMITS)
        assert largest_error(y, expected.y) <= 1e-5
        assert largest_error(dx, expected.dx) <= 1e-5


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_scale_and_bias_may_be_left_out(given):
    x, scale, bias, dy = batch()
    scale, bias = scale if given[0] else None, bias if given[1] else None
    y, _ = bnjax.batch_renorm(x, start(), scale, bias, **LIMITS)
    ones, zeros = np.ones(8), np.zeros(8)
    scale, bias = ones if scale is None else scale, zeros if bias is None else bias
    assert largest_error(y, renorm(x, zeros, ones, scale, bias, dy, **LIMITS).y) <= 1e-5


# Masks, replicas, dtypes, memory


def test_a_mask_is_deletion_and_hides_nan():
    x, scale, bias, dy = batch()
    keep = np.arange(33) % 3 > 0
    dirty = np.where(keep[:, None], x, np.nan)
    found = compiled(**LIMITS)(
        dirty, start(), scale, bias, np.where(keep[:, None], dy, 0), where=keep[:, None]
    )
    y, dx, dscale, dbias, m = jax.tree.map(np.asarray, found)
    expected = renorm(x[keep], np.zeros(8), np.ones(8), scale, bias, dy[keep], **LIMITS)
    for actual, right in zip((y[keep], dx[keep], dscale, dbias), expected, strict=False):
        np.testing.assert_allclose(actual, right, rtol=1e-5, atol=1e-5)
    measured = reference.moments(x[keep])
    np.testing.assert_allclose(m.mean + m.remainder, measured.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(m.var, measured.var, rtol=1e-5)
    assert m.count == keep.sum()
    chex.assert_tree_all_finite((y, dx))


def test_a_wholly_masked_batch_is_finite():
    x, scale, bias, dy = batch()
    found = compiled(**LIMITS)(x, start(), scale, bias, dy, where=np.zeros((33, 1), bool))
    chex.assert_tree_all_finite(found)
    kept = bnjax.ema(start(), found[-1], momentum=0.9)
    chex.assert_trees_all_equal((kept.mean, kept.var), start()[:2])


def renorm_with_running_second(x, scale, bias, **settings):
    return bnjax.batch_renorm(x, start(6), scale, bias, **LIMITS, **settings)


@pytest.mark.parametrize("layout", ["vmap", "shard_map", "jit, automatic", "jit, explicit"])
def test_eight_devices_equal_one(layout):
    """As one replica in each way, and as XLA cuts; batch norm is tested in every layout."""
    x, dy, scale, bias = layouts.batch(ratio=2.0)
    where = layouts.cases()["one replica masked"]
    step = jax.jit(layouts.step, static_argnames="apply")
    whole = step(x, dy, where, scale, bias, apply=renorm_with_running_second)
    parts = LAYOUTS[layout](x, dy, where, scale, bias, apply=renorm_with_running_second)
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, parts), jax.tree.map(np.asarray, whole), rtol=1e-5, atol=2e-5
    )


def test_groups_of_replicas_share():
    x, *_ = batch(32)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    f = functools.partial(bnjax.batch_renorm, axis_name="i", axis_index_groups=groups, **LIMITS)
    y, _ = jax.pmap(lambda x: f(x, start()), axis_name="i")(x.reshape(8, 4, 8))
    halves = [bnjax.batch_renorm(half, start(), **LIMITS)[0] for half in (x[:16], x[16:])]
    np.testing.assert_allclose(y.reshape(32, 8), np.concatenate(halves), atol=1e-5)


def test_the_pivot_is_that_of_moments():
    x, *_ = batch()
    pivot = bnjax.moments(x).mean + 0.5  # so far away that it shows in last bits
    _, m = bnjax.batch_renorm(x, start(), pivot=pivot, **LIMITS)
    chex.assert_trees_all_equal(m, bnjax.moments(x, pivot=pivot))
    assert jnp.any(m.var != bnjax.moments(x).var)


def test_the_output_has_the_dtype_of_the_input():
    x, scale, bias, _ = batch()
    dtypes = jnp.bfloat16, np.float16, np.float32

    @jax.jit
    def of_each(xs):
        apply = functools.partial(bnjax.batch_renorm, running=start(), **LIMITS)
        return [(apply(x, scale=scale, bias=bias), apply(x, dtype=np.float32)[0]) for x in xs]

    xs = [x.astype(dtype) for dtype in dtypes]
    for x, dtype, ((y, m), in_float32) in zip(xs, dtypes, of_each(xs), strict=True):
        chex.assert_type([y, m.mean], [dtype, jnp.float32])
        exact = renorm(x, np.zeros(8), np.ones(8), scale, bias, np.ones((33, 8)), **LIMITS).y
        assert largest_error(y, exact) <= 4 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()
        assert in_float32.dtype == jnp.float32


def test_complex_input_is_corrected_along_the_difference_of_the_means():
    x = np.array([[3 + 3j], [3 + 5j], [3 + 4j]], np.complex64)  # mean 3 + 4j, 5 from the origin
    running = Moments(np.zeros(1, np.complex64), np.ones(1, np.float32))
    y, _ = bnjax.batch_renorm(x, running, r_max=1.0, d_max=2.0, epsilon=1e-12)
    expected = (x - (3 + 4j)) / np.sqrt(2 / 3) + 2 * (3 + 4j) / 5
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_keeps_its_input_and_vectors_only(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 16, 8)), dtype)
    ones = jnp.ones(8)
    f = jax.jit(lambda x: bnjax.batch_renorm(x, start(), ones, ones, **LIMITS)[0])
    _, backward = jax.vjp(f, x)
    buffers = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.tree.leaves(backward)}
    assert sum(buffers.values()) <= x.nbytes + 16 * 8 * 4


def test_scan_over_steps_and_vmap_over_seeds():
    """As reinforcement learners train: limits that change by step, several seeds at once."""
    seeds, steps = 3, 6
    x = np.random.default_rng(0).standard_normal((seeds, steps, 16, 8)).astype(np.float32) + 1

    def learn(x):
        def step(carry, x):
            running, i = carry
            open_now = i >= 3
            y, m = bnjax.batch_renorm(
                x,
                running,
                r_max=jnp.where(open_now, 3.0, 1.0),
                d_max=jnp.where(open_now, 5.0, 0.0),
            )
            return (bnjax.ema(running, m, momentum=0.9), i + 1), y

        (running, _), y = jax.lax.scan(step, (jax.tree.map(jnp.asarray, start()), 0), x)
        return running, y

    running, y = jax.jit(jax.vmap(learn))(x)
    for seed in range(seeds):
        mean, var = np.zeros(8), np.ones(8)
        for i in range(steps):
            limits = {"r_max": 3.0, "d_max": 5.0} if i >= 3 else NONE
            expected = renorm(x[seed, i], mean, var, 1, 0, x[seed, i], **limits).y
            assert largest_error(y[seed, i], expected) <= 1e-5
            mean = 0.9 * mean + 0.1 * x[seed, i].mean(0, np.float64)
            var = 0.9 * var + 0.1 * x[seed, i].var(0, np.float64)
        assert largest_error(running.mean[seed], mean) <= 1e-6
        assert largest_error(running.var[seed], var) <= 1e-6


# The layers


def open_late(start, end, at):
    """A schedule as in optax, with a jump."""
    return lambda steps: jnp.where(steps < at, start, end)


FIELDS = {"momentum": 0.9, "r_max": open_late(1.0, 1.3, 3), "d_max": open_late(0.0, 0.4, 3)}


def linen_steps(xs, scale, bias, *, jit=jax.jit, **fields):
    """The outputs of training on each of xs in turn, and the statistics after it."""
    layer = bnjax.linen.BatchRenorm(use_running_average=False, **fields)
    stats, ys = layer.init(jax.random.key(0), xs[0])["batch_stats"], []

    @jit
    def step(stats, x):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return layer.apply(variables, x, mutable=["batch_stats"])

    for x in xs:
        y, updates = step(stats, x)
        stats = updates["batch_stats"]
        ys.append(y)
    return jnp.stack(ys), stats


def nnx_steps(xs, scale, bias, *, jit=nnx.jit, **fields):
    layer = bnjax.nnx.BatchRenorm(xs.shape[-1], rngs=nnx.Rngs(0), **fields)
    layer.scale[...], layer.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    step = jit(lambda layer, x: layer(x))
    ys = jnp.stack([step(layer, x) for x in xs])
    return ys, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))


every_layer = pytest.mark.parametrize("steps", [linen_steps, nnx_steps])


@pytest.mark.parametrize(("steps", "ghost_batch_size"), [(linen_steps, 11), (nnx_steps, None)])
def test_a_layer_counts_its_steps_and_opens_its_limits(steps, ghost_batch_size):
    """Without ghosts both layers give the same bits, below."""
    xs = np.stack([batch(seed=i)[0] for i in range(6)])
    _, scale, bias, dy = batch()
    ys, stats = steps(xs, scale, bias, ghost_batch_size=ghost_batch_size, **FIELDS)
    mean, var = np.zeros(8, np.longdouble), np.ones(8, np.longdouble)
    size = ghost_batch_size or 33
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        limits = {"r_max": 1.3, "d_max": 0.4} if i >= 3 else NONE
        for j in range(0, 33, size):
            part = slice(j, j + size)
            expected = renorm(x[part], mean, var, scale, bias, dy[part], **limits).y
            assert largest_error(y[part], expected) <= 1e-5
        whole = reference.moments(x)
        mean = 0.9 * mean + np.longdouble(0.1) * whole.mean
        var = 0.9 * var + np.longdouble(0.1) * whole.var
    assert largest_error(stats["mean"], mean) <= 1e-6
    assert largest_error(stats["var"], var) <= 1e-6
    assert stats["steps"] == 6
    chex.assert_type(stats["steps"], jnp.int32)


def test_the_layers_agree_bit_for_bit():
    xs = jnp.stack([batch(seed=i)[0] for i in range(5)])
    _, scale, bias, _ = batch()
    linen = linen_steps(xs, scale, bias, jit=lambda f: f, **FIELDS)
    chex.assert_trees_all_equal(nnx_steps(xs, scale, bias, jit=lambda f: f, **FIELDS), linen)
    jitted = nnx_steps(xs, scale, bias, **FIELDS)
    chex.assert_trees_all_close(jitted, linen, rtol=1e-6, atol=1e-6)


@every_layer
def test_limits_that_are_numbers_count_no_steps(steps):
    x, scale, bias, dy = batch()
    y, stats = steps(x[None], scale, bias, **LIMITS)
    assert set(stats) == {"mean", "var"}
    expected = renorm(x, np.zeros(8), np.ones(8), scale, bias, dy, **LIMITS).y
    assert largest_error(y[0], expected) <= 1e-5


def test_evaluation_and_variables_are_those_of_batch_norm():
    x, *_ = batch()
    layer, plain = bnjax.linen.BatchRenorm(), bnjax.linen.BatchNorm()
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    stats = {"mean": jnp.full(8, 0.5), "var": jnp.full(8, 2.0)}
    variables = variables | {"batch_stats": stats}
    y = layer.apply(variables, x, use_running_average=True)
    chex.assert_trees_all_equal(y, plain.apply(variables, x, use_running_average=True))
    model = bnjax.nnx.BatchRenorm(8, use_running_average=True, rngs=nnx.Rngs(0))
    model.mean[...], model.var[...] = stats["mean"], stats["var"]
    chex.assert_trees_all_equal(model(x), y)


def test_a_layer_shares_over_replicas_and_masks():
    x, scale, bias, dy = batch(32)
    where = np.arange(32)[:, None] % 3 > 0
    layer = bnjax.linen.BatchRenorm(False, momentum=0.9, axis_name="i", **LIMITS)
    stats = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    y, updates = jax.pmap(
        lambda x, where: layer.apply(variables, x, mask=where, mutable=["batch_stats"]),
        axis_name="i",
    )(x.reshape(8, 4, 8), where.reshape(8, 4, 1))
    expected = renorm(x, np.zeros(8), np.ones(8), scale, bias, dy, w=where, **LIMITS).y
    assert largest_error(y.reshape(32, 8), expected) <= 1e-5
    mean = reference.moments(x, where=where).mean
    for replica in updates["batch_stats"]["mean"]:
        assert largest_error(replica, mean * np.longdouble(0.1)) <= 1e-6


def test_emitted_moments_are_the_batch_s():
    x, *_ = batch()
    layer = bnjax.linen.BatchRenorm(False, **FIELDS)
    variables = layer.init(jax.random.key(0), x)
    _, emitted = layer.apply(variables, x, mutable=["moments"])
    chex.assert_trees_all_equal(emitted["moments"]["moments"], bnjax.moments(x))
    updated = bnjax.update_stats(variables["batch_stats"], emitted["moments"], momentum=0.9)
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updated, updates["batch_stats"])


@pytest.mark.parametrize("limits", [{"r_max": 0.5}, {"r_max": lambda steps: 0.5}], ids=["0", "f"])
def test_a_layer_refuses_limits_out_of_range(limits):
    x, *_ = batch()
    message = (
        "r_max is 0.5, but the correction r stays between 1 / r_max and r_max. "
        "Choose a number from 1 (no correction) upwards, such as 3."
    )
    layer = bnjax.nnx.BatchRenorm(8, rngs=nnx.Rngs(0), **limits)
    assert_refused(lambda: layer(x), message)
    chex.assert_trees_all_equal(layer.mean[...], jnp.zeros(8))
    layer = bnjax.linen.BatchRenorm(False, **limits)
    assert_refused(lambda: layer.init(jax.random.key(0), x), message)


class Critic(nn.Module):
    """As in CrossQ: both halves of a joint batch in one training call, so one set of moments."""

    @nn.compact
    def __call__(self, x, train):
        dense = functools.partial(nn.Dense, kernel_init=lambda *args: between_signs(*args) / 2)
        x = nn.relu(dense(8)(x))
        x = bnjax.linen.BatchRenorm(**FIELDS)(x, use_running_average=not train)
        return dense(1)(x)[..., 0]


def test_reinforcement_learners_scan_jit_and_vmap_over_seeds():
    """Several critics learn at once; each step trains on a joint batch and evaluates alone."""
    seeds, steps = 3, 5
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((seeds, steps, 16, 4)).astype(np.float32)
    critic = Critic()

    def learn(key, xs):
        variables = critic.init(key, xs[0], False)

        def step(carry, x):
            params, stats = carry
            current = critic.apply({"params": params, "batch_stats": stats}, x, False)

            def loss(params):
                q, updates = critic.apply(
                    {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
                )
                target = jax.lax.stop_gradient(0.9 * q[8:] + x[:8, 0])
                return jnp.mean((q[:8] - target) ** 2), updates["batch_stats"]

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
            params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
            return (params, stats), (value, current)

        return jax.lax.scan(step, (variables["params"], variables["batch_stats"]), xs)

    keys = jax.random.split(jax.random.key(0), seeds)

    @jax.jit
    def together_and_alone(keys, xs):
        return jax.vmap(learn)(keys, xs), learn(keys[1], xs[1])

    together, alone = together_and_alone(keys, xs)
    chex.assert_tree_all_finite(together)
    assert np.all(together[0][1]["BatchRenorm_0"]["steps"] == steps)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[1], together), alone, rtol=1e-4, atol=1e-5)


# Bad input


@pytest.mark.parametrize("r_max", [0.5, np.nan, jnp.float32(0.5)])
def test_r_max_below_one(r_max):
    x, *_ = batch()
    assert_refused(
        lambda: bnjax.batch_renorm(x, start(), r_max=r_max, d_max=0.0),
        f"r_max is {r_max}, but the correction r stays between 1 / r_max and r_max. "
        "Choose a number from 1 (no correction) upwards, such as 3.",
    )


def test_negative_d_max():
    x, *_ = batch()
    assert_refused(
        lambda: bnjax.batch_renorm(x, start(), r_max=1.0, d_max=-1),
        "d_max is -1, but the correction d stays between -d_max and d_max. "
        "Choose a number from 0 (no correction) upwards, such as 5.",
    )


@pytest.mark.parametrize("name", ["mean", "var"])
def test_running_statistics_of_another_shape(name):
    x, *_ = batch()
    running = start()._replace(**{name: np.ones(3, np.float32)})
    assert_refused(
        lambda: bnjax.batch_renorm(x, running, **LIMITS),
        f"running.{name} has shape (3,), but the features of x have shape (8,). "
        "Give one value for each feature.",
    )


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_scale_or_bias_of_another_shape(name):
    x, *_ = batch()
    assert_refused(
        lambda: bnjax.batch_renorm(x, start(), **{name: np.ones(3, np.float32)}, **LIMITS),
        f"{name} has shape (3,), but x has shape (33, 8) and features of shape (8,). "
        "Give one value for each feature, or an array of x's rank that broadcasts to x.",
    )


def test_epsilon_that_is_not_positive():
    x, *_ = batch()
    assert_refused(
        lambda: bnjax.batch_renorm(x, start(), epsilon=0.0, **LIMITS),
        "epsilon is 0.0, but it keeps the variance away from zero. "
        "Choose a positive number, such as 1e-5.",
    )
