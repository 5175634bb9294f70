"""Covariances as moments, and whitening with them, beside float64 NumPy."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import reference
from collectives import count_collectives
from derivatives import PLAIN
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

pytestmark = pytest.mark.optimized

each_method = pytest.mark.parametrize("method", METHODS)


@functools.partial(jax.jit, static_argnames=("group_size", "method", "dtype"))
def whiten(x, scale=None, bias=None, *, group_size=None, method="cholesky", **settings):
    """One program for each shape and method: epsilon is a value."""
    m = bnjax.cov_moments(x, group_size=group_size)
    return bnjax.whiten(x, m, scale, bias, **METHODS[method], **settings)


cov_moments = jax.jit(bnjax.cov_moments, static_argnames=("feature_axis", "group_size"))


# Measure


@pytest.mark.parametrize("rows", [2, 60, 4096, 4099])
@pytest.mark.parametrize("ratio", [0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("jit", [False, True])
def test_moments_at_every_mean(jit, ratio, rows):
    x = (ratio + correlated(4099, 3, groups=2)[:rows]).astype(np.float32)
    assert_covariances((cov_moments if jit else bnjax.cov_moments)(x, group_size=3), x, 3)


def test_features_on_any_axes():
    """The features of an array are neighbours in the order of its axes; in groups of any size."""
    cases = {
        ((5, 5, 5, 6), -1): 1,
        ((6, 5, 5, 5), 0): 2,
        ((5, 6, 5, 5), 1): 3,
        ((2, 5, 3, 5), (0, 2)): 6,
        ((5, 2, 5, 3), (1, 3)): 2,
        ((5, 2, 3, 5), (2, 1)): 3,
    }
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal(shape).astype(np.float32) for shape, _ in cases]

    @jax.jit
    def of_each(xs):
        results = []
        for ((_, axis), size), x in zip(cases.items(), xs, strict=True):
            m = bnjax.cov_moments(x, feature_axis=axis, group_size=size)
            results.append((m, m.var, bnjax.whiten(x, m, feature_axis=axis)))
        return results

    results = jax.tree.map(np.asarray, of_each(xs))
    for ((shape, axis), size), x, (m, var, y) in zip(cases.items(), xs, results, strict=True):
        axes, rest = reference.features_of(4, axis)
        flat = x.transpose(rest + axes).reshape(-1, 6)
        assert m.mean.shape == tuple(shape[i] for i in axes)
        np.testing.assert_allclose(var, flat.var(0).reshape(m.mean.shape), rtol=1e-5)
        m = m._replace(mean=m.mean.ravel(), remainder=m.remainder.ravel())
        assert_covariances(m, flat, size)
        y = y.transpose(rest + axes).reshape(-1, 6)
        np.testing.assert_allclose(y, whitened(flat, size, "cholesky"), atol=1e-5)


@pytest.mark.parametrize("rows", [1000, 8191, 65536])
def test_small_groups_add_up_many_rows_accurately(rows):
    """Where XLA multiplies row by row a covariance would be off by up to 7e-3 of itself."""
    x = correlated(rows, 2, 1e3, groups=8).astype(np.float32)
    w = transform(covariance(x, 2), "cholesky", 0)
    m = bnjax.cov_moments(x, group_size=2)
    assert np.abs(w @ np.asarray(m.cov, float) @ np.swapaxes(w, 1, 2) - np.eye(2)).max() < 1e-4


def test_a_mask_is_deletion_and_weights_are_repetition():
    rng = np.random.default_rng(1)
    x = (5 + correlated(60, 4)).astype(np.float32)
    w = rng.integers(0, 4, 60)
    x = np.where((w > 0)[:, None], x, [np.nan, np.inf, -np.inf, 1e30]).astype(np.float32)
    wheres = [a[:, None] for a in (w > 0, w, w.astype(np.float32))]
    repeats = [(w > 0).astype(int), (w > 0).astype(int), w]

    @jax.jit
    def with_each(x, wheres, weights):
        def of(where, weights):
            def loss(x):
                m = bnjax.cov_moments(x, where=where)
                y = bnjax.whiten(x, m, where=where)
                seen = jnp.where(weights > 0, jnp.sin(y) * weights, 0)
                return jnp.sum(seen), (m, y)

            return jax.grad(loss, has_aux=True)(x)

        return [of(*pair) for pair in zip(wheres, weights, strict=True)]

    results = with_each(x, wheres, [a[:, None].astype(np.float32) for a in repeats])
    for w, result in zip(repeats, results, strict=True):
        dx, (m, y) = jax.tree.map(np.asarray, result)
        given = np.repeat(x, w, 0)
        assert_covariances(m, given, 4)
        assert np.isfinite(y[:, 3]).all()
        expected, _ = reference.whiten(given, given, 4)
        np.testing.assert_allclose(np.repeat(y[w > 0], w[w > 0], 0), expected, atol=2e-5)
        _, alone = reference.whiten(given, np.cos(expected), 4)
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
    running = bnjax.CovMoments(
        np.arange(4, dtype=np.float32), np.full((2, 2, 2), 2, np.float32), np.float32(3)
    )
    for kept in (bnjax.ema(running, m, momentum=0.5), bnjax.merge(running, m)):
        np.testing.assert_array_equal(kept.mean, running.mean)
        np.testing.assert_array_equal(kept.cov, running.cov)
        assert kept.count == 3


def test_a_pivot_saves_the_first_pass():
    x = (100 + correlated(64, 3)).astype(np.float32)
    pivot = np.full(3, 100.5, np.float32)
    near = cov_moments(x, pivot=pivot)
    assert_covariances(near, x, 3, tolerance=5e-6)
    sums = [
        str(jax.make_jaxpr(lambda x, c=c: bnjax.cov_moments(x, pivot=c))(x)).count("reduce_sum")
        for c in (None, pivot)
    ]
    assert sums[0] - sums[1] == 1


# A monoid


@jax.jit
def cov_moments_of_parts(parts):
    return [bnjax.cov_moments(p, group_size=4) for p in parts]


def test_the_merge_of_parts_is_the_whole():
    x = (1e3 + correlated(70, 4, groups=2)).astype(np.float32)
    a, b, c = cov_moments_of_parts(np.split(x, [3, 20]))
    merge = jax.jit(bnjax.merge)
    for m in (
        merge(merge(a, b), c),
        merge(a, merge(c, b)),
        functools.reduce(merge, (c, a, b)),
    ):
        assert_covariances(m, x, 4)
    empty = a._replace(
        mean=np.full(8, np.nan, np.float32),
        cov=np.full((2, 4, 4), np.nan, np.float32),
        count=np.float32(0),
    )
    for m in (merge(a, empty), merge(empty, a)):
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
    running = bnjax.CovMoments.initial(4, group_size=2)

    @jax.jit
    def step(running, x):
        m = bnjax.cov_moments(x, group_size=2)
        return bnjax.ema(running, m, momentum=0.7, ddof=1)

    for x in batches:
        running = step(running, x.astype(np.float32))
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
    y = np.asarray(whiten(x, group_size=size, epsilon=1e-12))
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
    x = correlated(512, 8, 30, groups=2).astype(np.float32)
    y = whiten(x, group_size=8, method=method, epsilon=1e-12)
    z = whiten(np.float32(1e3) * x + np.float32(5e3), group_size=8, method=method, epsilon=1e-6)
    np.testing.assert_allclose(z, y, atol=1e-4)


def test_scale_and_bias():
    rng = np.random.default_rng(0)
    x = correlated(64, 4).astype(np.float32)
    shapes = (4,), (64, 1), (64, 4), (1, 4)
    given = [rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes]

    @jax.jit
    def all_shapes(x, given):
        return {
            method: [whiten(x, *both, group_size=2, method=method) for both in given]
            for method in METHODS
        }

    for method, ys in all_shapes(x, given).items():
        for y, (scale, bias) in zip(ys, given, strict=True):
            np.testing.assert_allclose(y, whitened(x, 2, method, 1e-5, scale, bias), atol=2e-5)


@each_method
def test_inference_is_whitening_with_what_was_remembered(method):
    x, other = correlated(64, 4, seed=1), correlated(32, 4, seed=2)
    m = bnjax.CovMoments(np.ones(4, np.float32), covariance(x, 4).astype(np.float32))
    y = bnjax.whiten(other.astype(np.float32), m, **METHODS[method])
    w = transform(covariance(x, 4), method, 1e-5)[0]
    np.testing.assert_allclose(y, (other - 1) @ w.T, atol=2e-5)


def test_one_feature_per_group_is_batch_norm():
    rng = np.random.default_rng(0)
    x = (3 + rng.standard_normal((50, 5)) * [1e-3, 1, 1, 10, 1e3]).astype(np.float32)
    scale, bias = rng.standard_normal((2, 5)).astype(np.float32)
    dy = rng.standard_normal(x.shape).astype(np.float32)

    def plain(x, scale, bias):
        return bnjax.batch_norm(x, scale, bias)[0]

    @jax.jit
    def all_of_them(x, scale, bias, dy):
        ours = [functools.partial(whiten, group_size=1, method=method) for method in METHODS]
        results = [jax.vjp(f, x, scale, bias) for f in (plain, *ours)]
        m = bnjax.cov_moments(x, group_size=1)
        return [(y, *pull(dy)) for y, pull in results], m.cov.ravel(), bnjax.moments(x).var

    (expected, *results), cov, var = all_of_them(x, scale, bias, dy)
    for y, *gradients in results:
        np.testing.assert_allclose(y, expected[0], atol=5e-6)
        for a, b in zip(gradients, expected[1:], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    np.testing.assert_allclose(cov, var, rtol=1e-6)


# Newton-Schulz


def test_the_rate_of_newton_schulz():
    """On each eigenvector with eigenvalue s the error e = 1 - s z^2 becomes (3 + e) e^2 / 4."""
    with jax.enable_x64(True):
        cov = covariance(correlated(100, 6, 100.0), 6)

        @jax.jit
        def roots(cov):
            m = bnjax.CovMoments(np.zeros(6), cov)
            kind = {"method": "newton_schulz"}
            return [bnjax.whiten(np.eye(6), m, iterations=n, **kind) for n in range(1, 16)]

        a = cov[0] + 1e-5 * np.eye(6)
        values, vectors = np.linalg.eigh(a)
        e = 1 - values / values.sum()
        distances = []
        for w in map(np.asarray, roots(cov)):
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
    m = cov_moments(x)
    expected = transform(covariance(x, 8), "zca", 1e-5)[0]

    @jax.jit
    def roots(cov):
        m = bnjax.CovMoments(np.zeros(8, np.float32), cov)
        eye, kind = np.eye(8, dtype=np.float32), {"method": "newton_schulz"}
        return [bnjax.whiten(eye, m, iterations=n, **kind) for n in (20, 40, 80)]

    for w in roots(m.cov):
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


@jax.jit
def gradients(x, scale, bias, dy):
    def with_method(method):
        def loss(x, scale, bias):
            return jnp.sum(whiten(x, scale, bias, group_size=3, method=method) * dy)

        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    return {method: with_method(method) for method in METHODS}


@pytest.mark.parametrize(
    ("data", "wide"), [("correlated", False), ("correlated", True), ("isotropic", True)]
)
def test_gradients_are_those_of_finite_differences(data, wide):
    x = {"correlated": correlated(12, 6, 20.0), "isotropic": isotropic(12, 6)}[data]
    rng = np.random.default_rng(3)
    dy, scale, bias = rng.standard_normal((12, 6)), *rng.standard_normal((2, 6))
    dtype = np.float64 if wide else np.float32
    with jax.enable_x64(wide):
        of_both = gradients(*(a.astype(dtype) for a in (x, scale, bias, dy)))
    for method, ours in of_both.items():
        oracle = functools.partial(whitened, size=3, method=method)
        theirs = (
            numerical_gradient(lambda x, f=oracle: np.sum(dy * f(x, scale=scale, bias=bias)), x),
            numerical_gradient(lambda s, f=oracle: np.sum(dy * f(x, scale=s, bias=bias)), scale),
            numerical_gradient(lambda b, f=oracle: np.sum(dy * f(x, scale=scale, bias=b)), bias),
        )
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=(1e-8 if wide else 3e-5) * np.abs(b).max())


def test_second_derivatives():
    x = correlated(8, 3, 5.0)
    v, dy = np.random.default_rng(0).standard_normal((2, 8, 3))
    with jax.enable_x64(True):

        @jax.grad
        def slope(x, method):
            return jnp.sum(jnp.sin(whiten(x, method=method)) * dy)

        @functools.partial(jax.jit, compiler_options=PLAIN)
        def of_both(x, v):
            return [jax.jvp(functools.partial(slope, method=m), (x,), (v,)) for m in METHODS]

        ours = [change for _, change in of_both(x, v)]
        above, below = (np.asarray([d for d, _ in of_both(x + h * v, v)]) for h in (1e-5, -1e-5))
    for ours_of_one, theirs in zip(ours, (above - below) / 2e-5, strict=True):
        np.testing.assert_allclose(ours_of_one, theirs, atol=1e-6 * np.abs(theirs).max())


@jax.jit
def outputs_and_gradients(x, dy):
    results = [jax.vjp(functools.partial(whiten, method=method), x) for method in METHODS]
    return [(y, *pull(dy)) for y, pull in results]


@pytest.mark.parametrize("kind", ["few rows", "copies", "constants", "all rows alike"])
def test_a_singular_covariance_has_finite_gradients(kind):
    """Where features outnumber samples, at every scale: also where rounding exceeds epsilon."""
    rng = np.random.default_rng(0)
    for shape in ((4, 130), (100, 64)):  # the mean of four that are alike is exact, as of one
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
                for result in outputs_and_gradients(x.astype(np.float32), dy):
                    for a in result:
                        assert np.isfinite(a).all(), (shape, deviation, ratio)


# Devices


def step(x, dy, where, scale, bias, axis_name=None):
    """What `layouts.step` does, with whitening."""

    def apply(x, scale, bias):
        m = bnjax.cov_moments(x, where=where, axis_name=axis_name, group_size=3)
        return bnjax.whiten(x, m, scale, bias, where=where), m

    y, pull, m = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, *pull(dy), m


@pytest.mark.parametrize(
    ("layout", "case", "rows"),
    [
        *((layout, "one replica masked", 64) for layout in ("vmap", "jit, explicit")),
        *((layout, "no mask", 1024) for layout in ("shard_map", "jit, automatic")),
    ],
)
def test_eight_devices_are_one(layout, case, rows):
    """With and without a mask where replicas are mapped, and where XLA cuts.

    Batch norm is tested in every layout with every mask.
    """
    x, dy, scale, bias = layouts.batch(100.0, rows=rows)
    where = layouts.cases(rows)[case]
    result = layouts.LAYOUTS[layout](x, dy, where, scale, bias, step=step)
    weights = None if where is None else np.asarray(where, float)[:, 0]
    assert_covariances(result[-1], x, 3, weights)
    z, dx = reference.whiten(x, np.asarray(dy) * scale, 3, where=where)
    whole = z * scale + bias, dx, np.sum(dy * z, 0), np.sum(dy, 0)
    for a, b in zip(result[:-1], whole, strict=True):
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
    if rows != 1024:  # backward it is as in the other that is cut evenly
        both = counts(lambda x, dy: jax.vjp(f, x)[1](dy), x, x)
        assert both == {"all-reduce": reductions + 1}


def test_replicas_may_whiten_on_their_own():
    x = correlated(64, 6).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def f(x):
        return [whiten(x, group_size=3, method=method) for method in METHODS]

    ys = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)
    for method, y in zip(METHODS, ys, strict=True):
        alone = np.concatenate([whitened(part, 3, method) for part in np.split(x, 8)])
        np.testing.assert_allclose(y, alone, atol=1e-5)


# Memory


@pytest.mark.parametrize(
    ("method", "dtype"), [("cholesky", jnp.bfloat16), ("newton_schulz", jnp.float32)]
)
def test_the_input_alone_is_kept(method, dtype):
    x = jnp.asarray(correlated(4096, 4), dtype)
    _, backward = jax.vjp(jax.jit(lambda x: whiten(x, method=method)), x)
    buffers = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.tree.leaves(backward)}
    matrices = 500 * 4 * 4 * 4  # Newton-Schulz keeps those of its iterations
    assert x.nbytes <= sum(buffers.values()) <= x.nbytes + matrices


# Types


def test_dtypes():
    x = correlated(64, 4)
    narrow = x.astype(jnp.bfloat16)
    inputs = {"bfloat16": narrow, "float16": x.astype(np.float16), "int32": (9 * x).astype(int)}

    @jax.jit
    def all_dtypes(inputs):
        ms = {name: bnjax.cov_moments(x) for name, x in inputs.items()}
        return ms, {name: bnjax.whiten(inputs[name], m) for name, m in ms.items()}

    ms, ys = all_dtypes(inputs)
    for given, y in ys.items():
        assert {p.dtype.name for p in ms[given]} == {"float32"}
        assert y.dtype == (given if given != "int32" else "float32")
    np.testing.assert_array_equal(
        whiten(narrow), whiten(narrow.astype(np.float32)).astype(jnp.bfloat16)
    )
    assert jax.eval_shape(lambda x: whiten(x, dtype=jnp.float32), narrow).dtype == jnp.float32
    with jax.enable_x64(True):
        y = whiten(x)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, whitened(x, 4, "cholesky"), atol=1e-13)


@jax.jit
def of_complex(x):
    """The moments of the whole, of parts merged, remembered, and of replicas; and the outputs."""
    measure = functools.partial(bnjax.cov_moments, group_size=3)
    m = measure(x)
    merged = bnjax.merge(measure(x[:10]), measure(x[10:]))
    fresh = bnjax.CovMoments(jnp.zeros_like(m.mean), jnp.zeros_like(m.cov))
    kept = bnjax.ema(fresh, m, momentum=0.0, ddof=1)
    split = jax.vmap(functools.partial(measure, axis_name="r"), axis_name="r", out_axes=None)
    outputs = {method: bnjax.whiten(x, m, **settings) for method, settings in METHODS.items()}
    return m.cov, merged.cov, kept.cov, split(x.reshape(4, 16, 6)).cov, outputs


def test_complex_input_has_a_hermitian_covariance():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6)) + 1j * correlated(64, 6)
    x = x.astype(np.complex64)
    cov, merged, kept, split, outputs = of_complex(x)
    np.testing.assert_allclose(cov, covariance(x, 3), atol=1e-6)
    np.testing.assert_allclose(merged, cov, atol=1e-6)
    np.testing.assert_allclose(kept, covariance(x, 3) * 64 / 63, atol=1e-6)
    np.testing.assert_allclose(split, cov, atol=1e-6)
    for method, y in outputs.items():
        assert y.dtype == np.complex64
        np.testing.assert_allclose(y, whitened(x, 3, method), atol=2e-5)


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
