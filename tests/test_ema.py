"""Running averages: what they remember, exactly how much of it, and in which dtype."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from samples import RATIOS, normal

import bnjax
from bnjax import Moments


def steps(dtype, n=100, ratio=2):
    """A run of batches, as a scan sees it."""
    x = normal((n, 8, 3), ratio)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * normal((n, 8, 3), -ratio, seed=1)
    return x.astype(dtype)


@pytest.mark.parametrize(
    "dtype", [np.float32, jnp.bfloat16, np.float16, np.float64, np.complex64], ids=str
)
def test_the_running_average_is_a_carry_of_scan(dtype):
    """From Moments(zeros, ones): the state keeps its dtypes and shapes, and follows the formula."""
    with jax.enable_x64(dtype == np.float64):
        x = steps(dtype)
        real = np.float32 if dtype == np.complex64 else dtype
        start = Moments(jnp.zeros(3, dtype), jnp.ones(3, real))

        def step(running, x):
            return bnjax.ema(running, bnjax.moments(x), momentum=0.9), None

        running, _ = jax.jit(lambda m, x: jax.lax.scan(step, m, x))(start, x)
        chex.assert_trees_all_equal_shapes_and_dtypes(running, jax.tree.map(jnp.asarray, start))
        assert running.count == 800
        mean, var = np.zeros(3, np.clongdouble), np.ones(3, np.longdouble)
        for part in x:
            m = reference.moments(part)
            mean, var = 0.9 * mean + 0.1 * m.mean, 0.9 * var + 0.1 * m.var
        # Each of the last ten or so steps rounds once to the state's dtype.
        tolerance = 8 * jnp.finfo(dtype).eps
        np.testing.assert_allclose(np.asarray(running.mean, mean.dtype), mean, rtol=tolerance)
        np.testing.assert_allclose(np.asarray(running.var, var.dtype), var, rtol=tolerance)


def test_ema_is_its_formula():
    old = Moments(jnp.array([1.0, -2.0]), jnp.array([4.0, 0.5]), jnp.array(10.0))
    new = Moments(jnp.array([5.0, 2.0]), jnp.array([2.0, 1.5]), jnp.array(6.0))
    m = bnjax.ema(old, new, momentum=0.75)
    np.testing.assert_array_equal(m.mean, [2.0, -1.0])
    np.testing.assert_array_equal(m.var, [3.5, 0.75])
    assert (m.count, m.remainder) == (16, 0)


@pytest.mark.parametrize("jit", [False, True])
def test_momentum_0_takes_the_batch_and_1_keeps_the_state(jit):
    ema = jax.jit(bnjax.ema) if jit else bnjax.ema
    new = bnjax.moments(normal((4099, 3), 1e4))
    old = bnjax.moments(normal((100, 3), -7))
    taken, kept = ema(old, new, momentum=0.0), ema(old, new, momentum=1.0)
    np.testing.assert_array_equal(taken.mean, new.mean)
    np.testing.assert_allclose(taken.remainder, new.remainder, atol=1e-10)
    np.testing.assert_array_equal(taken.var, new.var)
    np.testing.assert_array_equal(kept.mean, old.mean)
    np.testing.assert_array_equal(kept.remainder, old.remainder)
    np.testing.assert_array_equal(kept.var, old.var)


def test_counts_add_up_and_a_scalar_count_takes_the_largest():
    where = np.array([[True, False, True]] * 3 + [[True, False, False]] * 2)
    batch = bnjax.moments(normal((5, 3)), where=where)
    wide = Moments(jnp.zeros(3), jnp.ones(3), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(bnjax.ema(wide, batch, momentum=0.5).count, [6, 2, 6])
    scalar = Moments(jnp.zeros(3), jnp.ones(3), jnp.array(10.0))
    assert bnjax.ema(scalar, batch, momentum=0.5).count == 15


@pytest.mark.parametrize("held", [0.0, np.nan, np.inf])
def test_features_without_a_value_stay_as_they_were(held):
    """Bit for bit, whatever the batch holds there."""
    old = Moments(
        jnp.array([1.1, -2.2]), jnp.array([3.3, 4.4]), jnp.array([5.0, 6.0]), jnp.array([0.0, 1e-8])
    )
    batch = Moments(
        jnp.array([1.0, held]),
        jnp.array([1.0, held]),
        jnp.array([1.0, 0.0]),
        jnp.array([0.0, held]),
    )
    m = jax.jit(bnjax.ema)(old, batch, momentum=0.9)
    for after, before in zip(m, old, strict=True):
        assert after[1] == before[1]
    np.testing.assert_allclose(m.mean[0], 1.09, rtol=1e-6)


def test_a_batch_without_any_value_changes_nothing():
    old = Moments(jnp.array([1.1, -2.2]), jnp.array([3.3, 4.4]), jnp.array(5.0))
    batch = bnjax.moments(np.full((4, 2), np.nan, np.float32), where=np.zeros((4, 1), bool))
    chex.assert_trees_all_equal(bnjax.ema(old, batch, momentum=0.0), jax.tree.map(jnp.asarray, old))


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_remainder_as_long_as_the_mean_keeps_what_the_mean_cannot_hold(ratio):
    """Over 100 steps in one scan; a scalar remainder stays zero."""
    x = normal((100, 8, 3), ratio)

    @jax.jit
    def run(start, x):
        return jax.lax.scan(
            lambda m, x: (bnjax.ema(m, bnjax.moments(x), momentum=0.9), None), start, x
        )[0]

    start = Moments(jnp.full(3, ratio, jnp.float32), jnp.ones(3), jnp.zeros(()), jnp.zeros(3))
    mean = np.full(3, ratio, np.longdouble)
    for part in x:
        mean = mean + np.longdouble(np.float32(0.1)) * (reference.moments(part).mean - mean)
    running = run(start, x)
    kept = reference.wide(running.mean) + reference.wide(running.remainder)
    np.testing.assert_array_less(np.abs(kept - mean), 2e-6)
    running = run(start._replace(remainder=jnp.zeros(())), x)
    chex.assert_trees_all_equal(running.remainder, jnp.zeros(()))


def test_ema_of_float32_state_and_16_bit_batches_does_not_round_the_batch():
    """Statistics of a bfloat16 input are float32, so the running mean is, too."""
    x = normal((4096, 3), 100).astype(jnp.bfloat16)
    m = bnjax.ema(Moments(jnp.zeros(3), jnp.ones(3)), bnjax.moments(x), momentum=0.0)
    np.testing.assert_allclose(m.mean, reference.moments(x).mean.astype(float), rtol=1e-6)
    np.testing.assert_allclose(m.var, reference.moments(x).var.astype(float), rtol=1e-6)


# Averages by choice


def averaged(x, **how):
    """The running moments after all batches of x, counting steps as a layer does."""

    def step(carry, x):
        running, steps = carry
        return (bnjax.ema(running, bnjax.moments(x), steps=steps, **how), steps + 1), None

    start = Moments(jnp.zeros(x.shape[-1], x.dtype), jnp.ones(x.shape[-1], x.dtype))
    run = jax.jit(lambda carry, x: jax.lax.scan(step, carry, x)[0])
    return run((start, jnp.zeros((), jnp.int32)), x)[0]


def closed_form(x, weights, ddof=0):
    """The weighted averages of the batches' means and variances, in longdouble."""
    batches = [reference.moments(part) for part in x]
    weights = np.asarray(weights, np.longdouble) / np.sum(weights, dtype=np.longdouble)
    mean = sum(w * m.mean for w, m in zip(weights, batches, strict=True))
    var = sum(w * m.var for w, m in zip(weights, batches, strict=True))
    n = x.shape[1]
    return mean.astype(float), (var * n / (n - ddof)).astype(float)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("t", [1, 2, 10, 100])
def test_debiased_averages_are_the_closed_form(momentum, t):
    """sum(m^(t-i) batch_i) / sum(m^(t-i)): for mean and variance alike, from the first step."""
    x = normal((t, 8, 3), 3)
    running = averaged(x, momentum=momentum, debias=True)
    weights = [np.longdouble(momentum) ** (t - i) for i in range(1, t + 1)]
    mean, var = closed_form(x, weights)
    np.testing.assert_allclose(running.mean, mean, rtol=2e-6)
    np.testing.assert_allclose(running.var, var, rtol=2e-6)


@pytest.mark.parametrize("how", [{"momentum": 0.999, "debias": True}, {"momentum": None}])
def test_after_one_step_the_average_is_the_batch(how):
    x = normal((1, 64, 3), 1e4)
    running, batch = averaged(x, **how), bnjax.moments(x[0])
    np.testing.assert_array_equal(running.mean, batch.mean)
    np.testing.assert_array_equal(running.var, batch.var)


def test_debias_with_a_traced_momentum():
    x = normal((7, 8, 3), 3)
    traced = jax.jit(lambda m: averaged(x, momentum=m, debias=True))
    for momentum in (0.9, 1.0):
        expected = averaged(x, momentum=momentum, debias=True)
        chex.assert_trees_all_close(traced(momentum), expected, rtol=1e-5)


@jax.jit
def share_and_its_derivatives(momentum, steps):
    def share(m):
        old, new = Moments(jnp.zeros(1), jnp.zeros(1)), Moments(jnp.ones(1), jnp.ones(1), 1.0)
        return bnjax.ema(old, new, momentum=m, steps=steps, debias=True).var[0]

    first = jax.grad(share)
    return share(momentum), first(momentum), jax.grad(first)(momentum)


@pytest.mark.parametrize("t", [1, 2, 3, 10])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5, 0.9])
def test_the_derivative_of_a_debiased_average_with_respect_to_its_momentum(momentum, t):
    """Of (1 - m) / (1 - m^t) = 1 / (1 + m + ... + m^(t - 1)), to the second order, from 0 on."""
    share, first, second = share_and_its_derivatives(momentum, t - 1)
    total = np.polynomial.Polynomial(np.ones(t))
    f, df, ddf = (total.deriv(k)(momentum) if k else total(momentum) for k in range(3))
    np.testing.assert_allclose(share, 1 / f, rtol=1e-6)
    np.testing.assert_allclose(first, -df / f**2, rtol=1e-4, atol=1e-6)
    if momentum < 0.5:
        np.testing.assert_allclose(second, 2 * df**2 / f**3 - ddf / f**2, rtol=1e-4)


@pytest.mark.parametrize("ddof", [0, 1])
def test_the_plain_average_over_steps(ddof):
    with jax.enable_x64(True):
        x = normal((20, 8, 3), 3, dtype=np.float64)
        running = averaged(x, momentum=None, ddof=ddof)
        mean, var = closed_form(x, np.ones(20), ddof)
        np.testing.assert_allclose(running.mean, mean, rtol=1e-10)
        np.testing.assert_allclose(running.var, var, rtol=1e-10)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_the_running_statistics_of_pytorch(momentum):
    torch = pytest.importorskip("torch")
    x = normal((20, 8, 3), 3, dtype=np.float64)
    theirs = torch.nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    for part in x:
        theirs(torch.from_numpy(part))
    with jax.enable_x64(True):
        ours = averaged(x, momentum=None if momentum is None else 1 - momentum, ddof=1)
        np.testing.assert_allclose(ours.mean, theirs.running_mean, rtol=1e-10)
        np.testing.assert_allclose(ours.var, theirs.running_var, rtol=1e-10)


def test_a_momentum_schedule_is_asked_for_each_step():
    schedule = optax.linear_schedule(0.0, 0.9, 9)
    x = normal((5, 8, 3), 3)
    mean, var = np.zeros(3), np.ones(3)
    for step, part in enumerate(x):
        m = reference.moments(part)
        mean = 0.1 * step * mean + (1 - 0.1 * step) * m.mean
        var = 0.1 * step * var + (1 - 0.1 * step) * m.var
    running = averaged(x, momentum=schedule)
    np.testing.assert_allclose(running.mean, mean.astype(float), rtol=1e-6)
    np.testing.assert_allclose(running.var, var.astype(float), rtol=1e-6)


def test_ddof_1_divides_by_the_count_minus_1_and_weights_are_counts():
    x = normal((6, 2))
    where = np.array([[3.0], [1.0], [0.0], [2.0], [1.0], [1.0]], np.float32)
    repeated = np.repeat(x, where[:, 0].astype(int), 0)
    start = Moments(jnp.zeros(2), jnp.ones(2))
    m = bnjax.ema(start, bnjax.moments(x, where=where), momentum=0.0, ddof=1)
    np.testing.assert_allclose(m.var, repeated.astype(float).var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_where_the_unbiased_variance_does_not_exist_the_variance_stays(count):
    where = np.arange(4)[:, None] < count
    start = Moments(jnp.full(2, 0.5), jnp.full(2, 7.0))
    m = bnjax.ema(start, bnjax.moments(normal((4, 2)), where=where), momentum=0.9, ddof=1)
    np.testing.assert_array_equal(m.var, [7, 7])
    assert (m.mean != 0.5).all() == bool(count)
