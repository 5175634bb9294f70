"""Covariances as moments, and whitening with them, beside float64 NumPy."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from collectives import count_collectives
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from whitening import (
    METHODS,
    assert_covariances,
    correlated,
    covariance,
    transform,
    whitened,
)

import bnjax
import bnjax.linen

each_method = pytest.mark.parametrize("method", METHODS)


def whiten(x, scale=None, bias=None, *, group_size=None, method="cholesky", **settings):
    m = bnjax.cov_moments(x, group_size=group_size)
    return bnjax.whiten(x, m, scale, bias, **METHODS[method], **settings)


# Measure


@pytest.mark.parametrize("rows", [2, 60, 4096, 4099])
@pytest.mark.parametrize("ratio", [0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("jit", [False, True])
def test_moments_at_every_mean(jit, ratio, rows):
    x = (ratio + correlated(4099, 3, groups=2)[:rows]).astype(np.float32)
    measure = functools.partial(bnjax.cov_moments, group_size=3)
    assert_covariances((jax.jit(measure) if jit else measure)(x), x, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), (1, 3), (2, 1)])
def test_features_on_any_axes(axis, size):
    """The features of an array are neighbours in the order of its axes."""
    rng = np.random.default_rng(0)
    axes = tuple(sorted(np.atleast_1d(axis) % 4))
    shape = [6 if axes == (i,) else [2, 3][axes.index(i)] if i in axes else 5 for i in range(4)]
    x = rng.standard_normal(shape).astype(np.float32)
    m = bnjax.cov_moments(x, feature_axis=axis, group_size=size)
    rest = tuple(i for i in range(4) if i not in axes)
    flat = x.transpose(rest + axes).reshape(-1, 6)
    assert m.mean.shape == tuple(shape[i] for i in axes)
    assert_covariances(m._replace(mean=m.mean.ravel(), remainder=m.remainder.ravel()), flat, size)
    np.testing.assert_allclose(m.var, flat.var(0).reshape(m.mean.shape), rtol=1e-5)
    y = bnjax.whiten(x, m, feature_axis=axis).transpose(rest + axes).reshape(-1, 6)
    np.testing.assert_allclose(y, whitened(flat, size, "cholesky"), atol=1e-5)


@pytest.mark.parametrize("rows", [1000, 8191, 65536])
def test_small_groups_add_up_many_rows_accurately(rows):
    """Where XLA multiplies row by row a covariance would be off by up to 7e-3 of itself."""
    x = correlated(rows, 2, 1e3, groups=8).astype(np.float32)
    w = transform(covariance(x, 2), "cholesky", 0)
    m = bnjax.cov_moments(x, group_size=2)
    assert np.abs(w @ np.asarray(m.cov, float) @ np.swapaxes(w, 1, 2) - np.eye(2)).max() < 1e-4


@pytest.mark.parametrize("kind", ["mask", "integers", "weights"])
def test_a_mask_is_deletion_and_weights_are_repetition(kind):
    rng = np.random.default_rng(1)
    x = (5 + correlated(60, 4)).astype(np.float32)
    w = rng.integers(0, 4, 60)
    where = {"mask": w > 0, "integers": w, "weights": w.astype(np.float32)}[kind][:, None]
    w = w if kind == "weights" else (w > 0).astype(int)
    x = np.where((w > 0)[:, None], x, [np.nan, np.inf, -np.inf, 1e30]).astype(np.float32)
    given = np.repeat(x, w, 0)
    m = bnjax.cov_moments(x, where=where)
    assert_covariances(m, given, 4)

    @jax.jit
    @jax.grad
    def gradient(x, where):
        y = bnjax.whiten(x, bnjax.cov_moments(x, where=where), where=where)
        return jnp.sum(jnp.sin(y[w > 0]) * w[w > 0, None].astype(np.float32))

    y = bnjax.whiten(x, m, where=where)
    assert np.isfinite(y[:, 3]).all()
    np.testing.assert_allclose(
        np.repeat(y[w > 0], w[w > 0], 0), whitened(given, 4, "cholesky"), atol=2e-5
    )
    dx = gradient(x, where)
    alone = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(whiten(x)))))(given))
    first = np.cumsum(w[w > 0]) - w[w > 0]
    np.testing.assert_allclose(dx[w > 0], alone[first] * w[w > 0, None], atol=5e-5)
    np.testing.assert_array_equal(dx[w == 0], 0)


def test_nothing_seen():
    x = np.full((5, 4), np.nan, np.float32)
    nothing = np.zeros((5, 1), bool)
    m = bnjax.cov_moments(x, where=nothing, group_size=2)
    np.testing.assert_array_equal(m.mean, np.zeros(4))
    np.testing.assert_array_equal(m.cov, np.tile(np.eye(2), (2, 1, 1)))
    assert np.isfinite(bnjax.whiten(x, m, where=nothing)).all()
    running = bnjax.CovMoments(jnp.arange(4.0), 2 * jnp.ones((2, 2, 2)), 3.0)
    for kept in (bnjax.ema(running, m, momentum=0.5), bnjax.merge(running, m)):
        np.testing.assert_array_equal(kept.mean, running.mean)
        np.testing.assert_array_equal(kept.cov, running.cov)
        assert kept.count == 3


def test_a_pivot_saves_the_first_pass():
    x = (100 + correlated(64, 3)).astype(np.float32)
    near = bnjax.cov_moments(x, pivot=jnp.full(3, 100.5))
    assert_covariances(near, x, 3, tolerance=5e-6)
    sums = [
        str(jax.make_jaxpr(lambda x, c=c: bnjax.cov_moments(x, pivot=c))(x)).count("reduce_sum")
        for c in (None, jnp.full(3, 100.5))
    ]
    assert sums[0] - sums[1] == 1


# A monoid


def test_the_merge_of_parts_is_the_whole():
    x = (1e3 + correlated(70, 4, groups=2)).astype(np.float32)
    a, b, c = (bnjax.cov_moments(p, group_size=4) for p in np.split(x, [3, 20]))
    for m in (
        bnjax.merge(bnjax.merge(a, b), c),
        bnjax.merge(a, bnjax.merge(c, b)),
        functools.reduce(bnjax.merge, (c, a, b)),
    ):
        assert_covariances(m, x, 4)
    empty = bnjax.CovMoments(jnp.full(8, jnp.nan), jnp.full((2, 4, 4), jnp.nan), 0.0)
    for m in (bnjax.merge(a, empty), bnjax.merge(empty, a)):
        np.testing.assert_allclose(m.cov, a.cov, rtol=1e-7)
        np.testing.assert_array_equal(m.mean, a.mean)


def test_stacked_parts_merge():
    x = (10 + correlated(60, 4)).astype(np.float32)
    parts = jax.vmap(functools.partial(bnjax.cov_moments, group_size=2))(x.reshape(3, 20, 4))
    assert_covariances(bnjax.merge_stacked({"a": {"moments": parts}})["a"]["moments"], x, 2)
    replicas = {"mean": parts.mean, "cov": parts.cov}
    merged = bnjax.merge_stacked(replicas)
    np.testing.assert_allclose(merged["cov"], covariance(x, 2), rtol=1e-4)


def test_the_running_average():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((20, 4)) @ rng.standard_normal((4, 4)) for _ in range(5)]
    mean, cov = np.zeros(4), np.tile(np.eye(2), (2, 1, 1))
    running = bnjax.CovMoments(jnp.zeros(4), jnp.tile(jnp.eye(2), (2, 1, 1)))
    for x in batches:
        m = bnjax.cov_moments(x.astype(np.float32), group_size=2)
        running = bnjax.ema(running, m, momentum=0.7, ddof=1)
        mean = 0.7 * mean + 0.3 * x.mean(0)
        cov = 0.7 * cov + 0.3 * covariance(x, 2) * 20 / 19
    np.testing.assert_allclose(running.mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(running.cov, cov, rtol=1e-4, atol=1e-6)
    assert running.count == 100


# Apply


@pytest.mark.parametrize("shape", [(256, 2, 4), (1000, 3, 4), (4096, 16, 3), (2048, 64, 2)])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("ratio", [0, 1e3])
def test_cholesky_gives_the_identity(ratio, condition, shape):
    rows, size, groups = shape
    x = correlated(rows, size, condition, groups)
    x = (x + ratio).astype(np.float32)
    y = whiten(x, group_size=size, epsilon=1e-12)
    assert np.abs(covariance(y, size) - np.eye(size)).max() < 1e-4
    assert np.abs(np.mean(y, 0)).max() < 1e-5


@each_method
@pytest.mark.parametrize("epsilon", [1e-5, 1e-2, 3.0])
def test_the_output_and_its_regularized_covariance(epsilon, method):
    """With A = cov + epsilon I its covariance is I - epsilon W W^H."""
    x = correlated(512, 8, 1e3, groups=2).astype(np.float32)
    y = whiten(x, group_size=8, epsilon=epsilon, method=method)
    np.testing.assert_allclose(y, whitened(x, 8, method, epsilon), atol=1e-3)
    w = transform(covariance(x, 8), method, epsilon)
    expected = np.eye(8) - epsilon * w @ np.swapaxes(w, 1, 2)
    np.testing.assert_allclose(covariance(y, 8), expected, atol=1e-4)


@each_method
def test_units_of_the_input_do_not_matter(method):
    x = jnp.asarray(correlated(256, 4, 30), jnp.float32)
    y = whiten(x, method=method, epsilon=1e-12)
    z = whiten(1e3 * x + 5e3, method=method, epsilon=1e-6)
    np.testing.assert_allclose(z, y, atol=1e-4)


@each_method
def test_scale_and_bias(method):
    rng = np.random.default_rng(0)
    x = correlated(64, 4).astype(np.float32)
    for shape in ((4,), (64, 1), (64, 4), (1, 4)):
        scale, bias = rng.standard_normal((2, *shape)).astype(np.float32)
        y = whiten(x, scale, bias, group_size=2, method=method)
        np.testing.assert_allclose(y, whitened(x, 2, method, 1e-5, scale, bias), atol=2e-5)


@each_method
def test_inference_is_whitening_with_what_was_remembered(method):
    x, other = correlated(64, 4, seed=1), correlated(32, 4, seed=2)
    m = bnjax.CovMoments(jnp.ones(4), jnp.asarray(covariance(x, 4), jnp.float32))
    y = bnjax.whiten(other.astype(np.float32), m, **METHODS[method])
    w = transform(covariance(x, 4), method, 1e-5)[0]
    np.testing.assert_allclose(y, (other - 1) @ w.T, atol=2e-5)


@each_method
def test_one_feature_per_group_is_batch_norm(method):
    rng = np.random.default_rng(0)
    x = (3 + rng.standard_normal((50, 5)) * [1e-3, 1, 1, 10, 1e3]).astype(np.float32)
    scale, bias = rng.standard_normal((2, 5)).astype(np.float32)

    def ours(x, scale, bias):
        return whiten(x, scale, bias, group_size=1, method=method)

    def plain(x, scale, bias):
        return bnjax.batch_norm(x, scale, bias)[0]

    results = [jax.vjp(f, x, scale, bias) for f in (ours, plain)]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=5e-6)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    for a, b in zip(*(pull(dy) for _, pull in results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    m = bnjax.cov_moments(x, group_size=1)
    np.testing.assert_allclose(m.cov.ravel(), bnjax.moments(x).var, rtol=1e-6)


# Newton-Schulz


def test_the_rate_of_newton_schulz():
    """On each eigenvector with eigenvalue s the error e = 1 - s z^2 becomes (3 + e) e^2 / 4."""
    with jax.enable_x64(True):
        cov = covariance(correlated(100, 6, 100.0), 6)
        m = bnjax.CovMoments(jnp.zeros(6), jnp.asarray(cov))
        a = cov[0] + 1e-5 * np.eye(6)
        values, vectors = np.linalg.eigh(a)
        e = 1 - values / values.sum()
        distances = []
        for iterations in range(1, 16):
            w = bnjax.whiten(np.eye(6), m, method="newton_schulz", iterations=iterations)
            e = (3 + e) * e**2 / 4
            np.testing.assert_allclose(
                np.diagonal(vectors.T @ w @ a @ w @ vectors), 1 - e, atol=1e-12
            )
            distances.append(np.abs(w - transform(cov, "zca", 1e-5)[0]).max())
    assert distances[-1] < 1e-11
    last = [d for d in distances if 1e-10 < d < 0.1]  # here the error is squared each time
    assert len(last) >= 2
    assert all(b < 2 * a**2 for a, b in itertools.pairwise(last))


def test_newton_schulz_stays_at_the_limit():
    """The iteration as published, P <- (3 P - P^3 S) / 2, leaves it by its rounding errors."""
    x = correlated(512, 8, 100.0).astype(np.float32)
    m = bnjax.cov_moments(x)
    expected = transform(covariance(x, 8), "zca", 1e-5)[0]
    for iterations in (20, 40, 80):
        w = bnjax.whiten(
            np.eye(8, dtype=np.float32),
            m._replace(mean=jnp.zeros(8), remainder=0.0),
            method="newton_schulz",
            iterations=iterations,
        )
        np.testing.assert_allclose(w, expected, atol=1e-3)
    s = np.asarray(m.cov[0]) / np.trace(m.cov[0])
    p = np.eye(8, dtype=np.float32)
    with np.errstate(all="ignore"):
        for _ in range(40):
            p = 1.5 * p - 0.5 * p @ p @ p @ s
    assert not np.abs(p).max() < 1e3


# Gradients


def numerical_gradient(f, x, step=1e-5):
    """Central differences in double precision."""
    x = np.asarray(x, np.float64)
    g = np.empty_like(x)
    for i in np.ndindex(*x.shape):
        h = np.zeros_like(x)
        h[i] = step
        g[i] = (f(x + h) - f(x - h)) / (2 * step)
    return g


def isotropic(rows, size):
    """Data whose covariance is the identity: all eigenvalues coincide."""
    x = correlated(rows, size, 1.0)
    return x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / rows)).T


@pytest.mark.parametrize(
    ("data", "wide"), [("correlated", False), ("correlated", True), ("isotropic", True)]
)
@each_method
def test_gradients_are_those_of_finite_differences(method, data, wide):
    x = {"correlated": correlated(12, 6, 20.0), "isotropic": isotropic(12, 6)}[data]
    size = 3 if data == "correlated" else 6
    rng = np.random.default_rng(3)
    dy, scale, bias = rng.standard_normal((12, 6)), *rng.standard_normal((2, 6))
    dtype = np.float64 if wide else np.float32

    def loss(x, scale, bias):
        y = whiten(x, scale, bias, group_size=size, method=method)
        return jnp.sum(y * dy.astype(dtype))

    with jax.enable_x64(wide):
        args = (a.astype(dtype) for a in (x, scale, bias))
        ours = jax.jit(jax.grad(loss, (0, 1, 2)))(*args)
    oracle = functools.partial(whitened, size=size, method=method)
    theirs = (
        numerical_gradient(lambda x: np.sum(dy * oracle(x, scale=scale, bias=bias)), x),
        numerical_gradient(lambda s: np.sum(dy * oracle(x, scale=s, bias=bias)), scale),
        numerical_gradient(lambda b: np.sum(dy * oracle(x, scale=scale, bias=b)), bias),
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=(1e-8 if wide else 3e-5) * np.abs(b).max())


@each_method
def test_second_derivatives(method):
    x = correlated(8, 3, 5.0)
    v, dy = np.random.default_rng(0).standard_normal((2, 8, 3))
    with jax.enable_x64(True):

        @jax.jit
        @jax.grad
        def slope(x):
            return jnp.sum(jnp.sin(whiten(x, method=method)) * dy)

        ours = jax.jit(lambda x, v: jax.jvp(slope, (x,), (v,))[1])(x, v)
        theirs = (np.asarray(slope(x + 1e-5 * v)) - np.asarray(slope(x - 1e-5 * v))) / 2e-5
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


@functools.partial(jax.jit, static_argnames="method")
def output_and_gradient(x, dy, method):
    y, pull = jax.vjp(lambda x: whiten(x, method=method), x)
    return y, *pull(dy)


@pytest.mark.parametrize("kind", ["few rows", "copies", "constants", "all rows alike"])
@each_method
def test_a_singular_covariance_has_finite_gradients(method, kind):
    """Where features outnumber samples, at every scale: also where rounding exceeds epsilon."""
    rng = np.random.default_rng(0)
    for shape in ((1, 4), (5, 64), (4, 256), (100, 64)):
        for deviation in (1e-3, 1.0, 1e6):
            for ratio in (0.0, 1e3):
                x = deviation * (ratio + rng.standard_normal(shape))
                if kind == "copies":
                    x[:, 1:] = x[:, :1]
                if kind == "constants":
                    x[:, ::2] = x[:1, ::2]
                if kind == "all rows alike":
                    x[:] = x[0]
                dy = rng.standard_normal(shape).astype(np.float32)
                for result in output_and_gradient(x.astype(np.float32), dy, method):
                    assert np.isfinite(result).all(), (shape, deviation, ratio)


# Devices


def step(x, dy, where, scale, bias, axis_name=None):
    """What `layouts.step` does, with whitening."""

    def apply(x, scale, bias):
        m = bnjax.cov_moments(x, where=where, axis_name=axis_name, group_size=3)
        return bnjax.whiten(x, m, scale, bias, where=where), m

    y, pull, m = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, *pull(dy), m


@pytest.mark.parametrize(("case", "rows"), [("no mask", 1024), ("one replica masked", 64)])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_eight_devices_are_one(layout, case, rows, monkeypatch):
    monkeypatch.setattr(layouts, "step", step)
    x, dy, scale, bias = layouts.batch(100.0, rows=rows)
    where = layouts.cases(rows)[case]
    whole = jax.jit(step)(x, dy, where, scale, bias)
    result = layouts.LAYOUTS[layout](x, dy, where, scale, bias)
    weights = None if where is None else np.asarray(where, float)[:, 0]
    assert_covariances(result[-1], x, 3, weights)
    for a, b in zip(result[:-1], whole[:-1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(("rows", "reductions"), [(64, 4), (8 * 77, 2), (1024, 2)])
def test_sharded_batches_meet_only_in_all_reduces(rows, reductions):
    """Two forward and one backward, as batch norm's; four where a block lies on many devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = jax.ShapeDtypeStruct((rows, 6), np.float32, sharding=NamedSharding(mesh, P("data")))

    def f(x):
        return whiten(x, group_size=3, method="newton_schulz")

    def counts(f, *args):
        return count_collectives(jax.jit(f).lower(*args).compile())

    assert counts(f, x) == {"all-reduce": reductions}
    both = counts(lambda x, dy: jax.vjp(f, x)[1](dy), x, x)
    assert both == {"all-reduce": reductions + 1}


def test_replicas_may_whiten_on_their_own():
    x = jnp.asarray(correlated(64, 6), jnp.float32)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for settings in METHODS.values():

        def f(x, settings=settings):
            return bnjax.whiten(x, bnjax.cov_moments(x, group_size=3), **settings)

        y = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)
        np.testing.assert_allclose(y, jax.vmap(f)(x.reshape(8, 8, 6)).reshape(64, 6), atol=1e-5)


# Memory


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@each_method
def test_the_input_alone_is_kept(method, dtype):
    x = jnp.asarray(correlated(4096, 4), dtype)
    _, backward = jax.vjp(jax.jit(lambda x: whiten(x, method=method)), x)
    buffers = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.tree.leaves(backward)}
    matrices = 500 * 4 * 4 * 4  # Newton-Schulz keeps those of its iterations
    assert x.nbytes <= sum(buffers.values()) <= x.nbytes + matrices


# Types


def test_dtypes():
    x = correlated(64, 4)
    for given, kept in {"bfloat16": "float32", "float16": "float32", "int32": "float32"}.items():
        m = bnjax.cov_moments(jnp.asarray(10 * x, given))
        assert {p.dtype.name for p in m} == {kept}
        y = bnjax.whiten(jnp.asarray(x, given), m)
        assert y.dtype == (given if given != "int32" else "float32")
    exact = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
    y = whiten(jnp.asarray(x, jnp.bfloat16))
    np.testing.assert_array_equal(y, whiten(exact).astype(jnp.bfloat16))
    assert whiten(jnp.asarray(x, jnp.bfloat16), dtype=jnp.float32).dtype == jnp.float32
    with jax.enable_x64(True):
        y = whiten(x)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, whitened(x, 4, "cholesky"), atol=1e-13)


@each_method
def test_complex_input_has_a_hermitian_covariance(method):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6)) + 1j * correlated(64, 6)
    x = x.astype(np.complex64)
    m = bnjax.cov_moments(x, group_size=3)
    np.testing.assert_allclose(m.cov, covariance(x, 3), atol=1e-6)
    y = bnjax.whiten(x, m, **METHODS[method])
    assert y.dtype == np.complex64
    np.testing.assert_allclose(y, whitened(x, 3, method), atol=2e-5)
    parts = [bnjax.cov_moments(p, group_size=3) for p in (x[:10], x[10:])]
    np.testing.assert_allclose(bnjax.merge(*parts).cov, m.cov, atol=1e-6)
    fresh = bnjax.CovMoments(jnp.zeros(6, m.mean.dtype), jnp.zeros_like(m.cov))
    kept = bnjax.ema(fresh, m, momentum=0.0, ddof=1)
    np.testing.assert_allclose(kept.cov, covariance(x, 3) * 64 / 63, atol=1e-6)
    split = jax.vmap(
        lambda x: bnjax.cov_moments(x, group_size=3, axis_name="r"), axis_name="r", out_axes=None
    )
    np.testing.assert_allclose(split(x.reshape(4, 16, 6)).cov, m.cov, atol=1e-6)


# Errors

X = np.ones((8, 4), np.float32)
COV = bnjax.CovMoments(np.zeros(4, np.float32), np.eye(4, dtype=np.float32)[None])
REFUSED = {
    "group size": (
        lambda: bnjax.cov_moments(X, group_size=3),
        "group_size is 3, but there are 4 features. Choose a divisor of 4.",
    ),
    "no group size": (
        lambda: bnjax.cov_moments(X, group_size=0),
        "group_size is 0, but there are 4 features. Choose a divisor of 4.",
    ),
    "empty": (
        lambda: bnjax.cov_moments(X[:0]),
        "x has shape (0, 4), so there is no value to measure. Leave empty batches out.",
    ),
    "mask of features": (
        lambda: bnjax.cov_moments(X, where=X > 0),
        "where (a layer's mask) has shape (8, 4) and x has shape (8, 4), but a covariance needs "
        "all features of an example. Give one value for each example.",
    ),
    "pivot": (
        lambda: bnjax.cov_moments(X, pivot=np.zeros(3)),
        "pivot has shape (3,), but the features of x have shape (4,). "
        "Give one value for each feature.",
    ),
    "mean": (
        lambda: bnjax.whiten(X, COV._replace(mean=np.zeros(3))),
        "mean has shape (3,), but the features of x have shape (4,). "
        "Give one value for each feature.",
    ),
    "cov": (
        lambda: bnjax.whiten(X, COV._replace(cov=np.eye(4))),
        "cov has shape (4, 4), but x has 4 features. "
        "Give one of shape [groups, size, size], where groups * size is their number.",
    ),
    "groups": (
        lambda: bnjax.whiten(X, COV._replace(cov=np.zeros((3, 2, 2)))),
        "cov has shape (3, 2, 2), but x has 4 features. "
        "Give one of shape [groups, size, size], where groups * size is their number.",
    ),
    "method": (
        lambda: bnjax.whiten(X, COV, method="pca"),
        "method is 'pca'. Choose 'cholesky' or 'newton_schulz'.",
    ),
    "iterations": (
        lambda: bnjax.whiten(X, COV, method="newton_schulz", iterations=0),
        "iterations is 0. Choose a whole number, at least 1.",
    ),
    "epsilon": (
        lambda: bnjax.whiten(X, COV, epsilon=0.0),
        "epsilon is 0.0, but it keeps the variance away from zero. "
        "Choose a positive number, such as 1e-5.",
    ),
    "scale": (
        lambda: bnjax.whiten(X, COV, np.ones(3)),
        "scale has shape (3,), but x has shape (8, 4) and features of shape (4,). "
        "Give one value for each feature, or an array of x's rank that broadcasts to x.",
    ),
    "running": (
        lambda: bnjax.ema(COV, bnjax.cov_moments(X, group_size=2), momentum=0.9),
        "running.cov has shape (1, 4, 4), but the batch's has shape (2, 2, 2). "
        "Measure both with the same group_size.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    attempt, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        attempt()
    assert str(error.value) == message


def test_an_axis_that_is_not_mapped():
    with pytest.raises(NameError, match="axis_name is 'typo', but no such axis is mapped here"):
        bnjax.cov_moments(X, axis_name="typo")
