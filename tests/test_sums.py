"""The pair of sums by every backend's program: which pivot it is about, and that none shows."""

import functools

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import reference
from derivatives import assert_derivatives
from implementations import linen_layer, nnx_layer, pull_back
from samples import normal

import bnjax
from bnjax import _sums, _xla

pytestmark = pytest.mark.optimized

every_layer = pytest.mark.parametrize("layer", [linen_layer, nnx_layer])
SHAPES = (12, 50), (64, 7), (32, 7, 7, 3)
BACKENDS = "cpu", "gpu", "tpu"
PIVOTS = "batch", "running", "auto"
FIRED_IN = "pmap", "shard_map", "jit, automatic", "jit, explicit"


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Whose programs run here. What is compiled already knows nothing of it."""
    monkeypatch.setattr(_xla, "forced", request.param)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


OUTPUTS = ("y", "dx"), ("y",), ("dx",)  # of a training step: XLA rounds each in its own way


def programs(features, outputs=OUTPUTS, **settings):
    """A training step of (x, dy, where, running), a program for each of these outputs."""
    ones, zeros = np.ones(features, np.float32), np.zeros(features, np.float32)

    def step(names, x, dy, where, running):
        given = settings | ({} if running is None else {"running": running})
        out, (dx, _, _) = pull_back(linen_layer, x, ones, zeros, dy, where=where, **given)
        found = {"y": out.y, "dx": dx}
        return {name: found[name] for name in names}

    return [jax.jit(functools.partial(step, names)) for names in outputs]


def assert_exact(programs, x, dy, where=None, running=None):
    """y within 2e-6, and dx within 5e-6 of the largest, whatever is returned beside them."""
    expected = reference.batch_norm(x, where=where)
    gradient = reference.gradient(x, dy, where=where).x
    bound = np.full_like(expected, 2e-6)
    if jax.__version_info__ < (0, 10):  # adds squares one by one: half the variance's 2e-6, times y
        bound = np.maximum(bound, 1e-6 * np.abs(expected))
    for program in programs:
        found = program(x, dy, where, running)
        if "y" in found:
            np.testing.assert_array_less(np.abs(np.asarray(found["y"]) - expected), bound)
        if "dx" in found:
            atol = 5e-6 * np.abs(gradient).max()
            np.testing.assert_allclose(found["dx"], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("backend", "pivot", "shape"),
    [
        (backend, pivot, shape)
        for i, backend in enumerate(BACKENDS)
        for j, pivot in enumerate(PIVOTS)
        for k, shape in enumerate(SHAPES)
        if (i + j + k) % 3 == 2
        or (backend == "gpu" and pivot != "auto")
        or (backend == "cpu" and pivot == "auto")
    ],
    indirect=["backend"],
)
def test_every_program_is_exact_at_every_scale(backend, pivot, shape):
    """Any two of the three; all three where each shape has a program of its own."""
    steps, dy = programs(shape[-1], pivot=pivot), normal(shape, seed=1)
    for ratio in (0.0, 1e2, 1e6):
        assert_exact(steps, normal(shape, ratio), dy)


def test_whatever_is_in_the_state(backend):
    steps, dy = programs(5, pivot="running"), normal((12, 5), seed=1)
    for mean in (0.0, 1.0, np.nan, np.inf, 1e20, -1e30):
        running = np.full(5, mean, np.float32), np.ones(5, np.float32)
        for ratio in (0.0, 1e4):
            assert_exact(steps, normal((12, 5), ratio), dy, running=running)


def test_masks_and_weights(backend):
    """Each on every backend, with each of the outputs on one, and with either pivot."""
    rng = np.random.default_rng(2)
    running = np.full(5, 3.0, np.float32), np.ones(5, np.float32)
    wheres = rng.random((24, 1)) < 0.6, rng.random((24, 5)) < 0.7, rng.random((24, 1))
    for i, where in enumerate(wheres, start=BACKENDS.index(backend)):
        where = where if where.dtype == bool else where.astype(np.float32)
        steps = programs(5, [OUTPUTS[i % 3]], pivot=PIVOTS[i % 2])
        x, dy = normal((24, 5), 1e3), normal((24, 5), seed=1)
        assert_exact(steps, x, dy, where, running)


def test_a_feature_without_a_valid_value_and_nan_in_its_state(backend):
    """It is what evaluation with a mean of zero and a variance of one would give."""
    where, x = np.ones((12, 5), bool), normal((12, 5))
    where[:, 2] = False
    running = np.where(where[0], 0, np.nan).astype(np.float32), np.ones(5, np.float32)
    for program in programs(5, OUTPUTS[:2], pivot="running"):
        y = program(x, x, where, running)["y"]
        np.testing.assert_allclose(y[:, 2], x[:, 2] / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_one_feature_far_among_many_near(backend):
    x = normal((32, 20))
    x[:, 3] += 1e5
    assert_exact(programs(20, OUTPUTS[:1], pivot="running"), x, normal((32, 20), seed=1))


def test_complex_input(backend):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((24, 4)) + 1j * rng.standard_normal((24, 4)) + 1e3).astype("complex64")
    m = jax.jit(bnjax.moments)(x, pivot=np.full(4, 2j, np.complex64))
    expected = reference.moments(x)
    np.testing.assert_allclose(m.mean + m.remainder, expected.mean, rtol=1e-7)
    np.testing.assert_allclose(m.var, expected.var, rtol=2e-6)


@pytest.mark.parametrize(
    ("backend", "pivot"), [("cpu", 40.0), ("cpu", 0.5), ("gpu", 40.0)], indirect=["backend"]
)
def test_derivatives_to_the_third_order(backend, pivot):
    """Of x and of weights, about the given pivot and the mean that the guard falls back on.

    A GPU's rule is a TPU's. A CPU's has barriers: it is asked about the third order, too.
    """
    rng = np.random.default_rng(4)

    def f(batch_norm, x, where):
        return jnp.sin(batch_norm(x, where=where, pivot=np.full(2, pivot))[0])

    third = ["fff", "rrr"] if (backend, pivot) == ("cpu", 40) else []
    given = rng.standard_normal((5, 2)), rng.uniform(0.5, 1, (5, 1))
    assert_derivatives(f, given, ["ff", "fr", "rf", "rr", *third])


@pytest.mark.parametrize("layout", FIRED_IN)
def test_a_guard_that_fires_on_one_part_of_the_data(backend, layout):
    """One replica's rows are far from the pivot, and from all others'; all must agree on it.

    With weights in every other case: on each backend, and in each layout.
    """
    x, dy, scale, bias = layouts.batch()
    x = np.array(x)
    x[:8, 2] += 1e3
    weighted = (BACKENDS.index(backend) + FIRED_IN.index(layout)) % 2
    where = layouts.cases()["weights"] if weighted else None
    apply = functools.partial(bnjax.batch_norm, pivot=np.zeros(6, np.float32))
    y, dx, _, _, m = layouts.LAYOUTS[layout](x, dy, where, scale, bias, apply=apply)
    expected = reference.batch_norm(x, scale, bias, where=where)
    gradient = reference.gradient(x, dy, reference.wide(scale), where=where).x
    np.testing.assert_allclose(y, expected, rtol=0, atol=5e-6 * np.abs(expected).max())
    np.testing.assert_allclose(dx, gradient, rtol=0, atol=5e-6 * np.abs(gradient).max())
    np.testing.assert_allclose(m.var, reference.moments(x, where=where).var, rtol=2e-6)


@every_layer
def test_scan_remat_and_a_sudden_shift(backend, layer):
    """Steps in a scan, under remat, whose data jump by 1e4 standard deviations in between."""
    xs = np.stack([normal((16, 3), shift, seed) for seed, shift in enumerate((0.0, 0.0, 1e4, 1e4))])

    @jax.checkpoint
    def step(running, x):
        out = layer(x, running=running, momentum=0.9)
        return (out.mean, out.var), out.y

    _, ys = jax.jit(lambda xs: jax.lax.scan(step, (jnp.zeros(3), jnp.ones(3)), xs))(xs)
    for x, y in zip(xs, ys, strict=True):
        np.testing.assert_allclose(y, reference.batch_norm(x), rtol=0, atol=2e-6)


def test_a_pivot_within_the_guard_costs_no_digits(backend):
    """At the edge, sqrt(FAR) standard deviations off, from either side."""
    x = normal((400, 6))
    for off in (0.99, 1.01):
        pivot = x.mean(0) + off * np.sqrt(_sums.FAR) * x.std(0)
        m = jax.jit(bnjax.moments)(x, pivot=pivot)
        np.testing.assert_allclose(m.var, reference.moments(x).var, rtol=2e-6)


def test_features_that_nobody_saw_fire_no_guard(monkeypatch):
    x, where = normal((8, 2), 5.0), np.array([[True, False]] * 8)
    pivot = np.array([5.0, 1e6], np.float32)
    assert bnjax.moments(x, where=where, pivot=pivot).mean[1] == pivot[1]
    assert bnjax.moments(x, pivot=pivot).mean[1] != pivot[1]


def test_a_constant_feature_is_near_within_epsilon():
    """A dead channel must not measure twice for ever: layers pass their epsilon on."""
    x = np.full((8, 1), 1.0, np.float32)
    guess = _sums.Guess(np.array([1.001], np.float32), "running", 1e-5)
    program = _sums.Program((0,), "running")
    sums = functools.partial(_sums.sums, program, x, guess.mean, None, np.float32(8))
    assert sums(np.float32(guess.slack))[0] == pytest.approx(1.001, abs=1e-6)
    assert sums(np.float32(1e-30))[0] == 1.0


def test_a_program_exported_for_every_platform():
    layer = functools.partial(linen_layer, pivot="auto")
    x = jax.ShapeDtypeStruct((8, 4, 4, 3), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: layer(x).y), platforms=["cpu", "cuda", "tpu"])(x)
    given = normal((8, 4, 4, 3), 1e3)
    y = exported.call(given)
    np.testing.assert_allclose(y, reference.batch_norm(given), rtol=0, atol=2e-6)
