"""What holds for every statistic: the neutral element, long chains, and a third class of them."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import assert_same_bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import normal

import bnjax
from bnjax import CovMoments, Moments, _trees

pytestmark = pytest.mark.optimized


class Shared(NamedTuple):
    """Means, and one variance for all features, as layers with one scale would keep it."""

    mean: Any
    power: Any
    count: Any = 0.0
    remainder: Any = 0.0

    @property
    def second(self):
        return self.power

    @property
    def var(self):
        return jnp.broadcast_to(self.power, np.shape(self.mean))

    @classmethod
    def make(cls, mean, second, count=0.0, remainder=0.0):
        return cls(mean, second, count, remainder)

    @staticmethod
    def second_name():
        return "power"

    @staticmethod
    def second_dtype(dtype):
        return jnp.finfo(dtype).dtype

    @staticmethod
    def shift(delta, like):
        return jnp.mean(jnp.abs(delta) ** 2, -1).reshape(like.shape)

    @staticmethod
    def central(m2, m1):
        return m2 - Shared.shift(m1, m2)

    @staticmethod
    def unseen(like):
        return 1


def shared_moments(x, where=None):
    m = bnjax.moments(x, where=where)
    return Shared(m.mean, jnp.mean(m.var), m.count, m.remainder)


@pytest.fixture(autouse=True)
def a_third_kind(monkeypatch):
    monkeypatch.setitem(_trees.STATISTICS, "power", Shared)


class Kind(NamedTuple):
    """How a statistic is measured, how it starts, and its second moment in double precision."""

    measure: Any
    start: Any
    second: Any


def covariance(x):
    """In groups of two of four columns."""
    d = reference.center(reference.wide(x), np.ones(x.shape), (0,))
    return np.stack([d[:, i : i + 2].T @ d[:, i : i + 2] / len(d) for i in (0, 2)])


KINDS = {
    "var": Kind(bnjax.moments, Moments.initial(4), lambda x: reference.moments(x).var),
    "cov": Kind(
        functools.partial(bnjax.cov_moments, group_size=2),
        CovMoments.initial(4, group_size=2),
        covariance,
    ),
    "power": Kind(
        shared_moments,
        Shared(jnp.zeros(4), jnp.ones(()), jnp.zeros(()), jnp.zeros(4)),
        lambda x: reference.moments(x).var.mean(),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def assert_is(m, x, kind, tolerance=2e-6):
    """The statistic of these rows, with errors in units of the standard deviation, which is 1."""
    whole = reference.moments(x)
    off = (reference.wide(m.mean) - whole.mean) + reference.wide(m.remainder)
    assert np.max(np.abs(off)) < tolerance
    assert np.max(np.abs(reference.wide(m.second) - kind.second(x))) < tolerance
    np.testing.assert_array_equal(m.count, len(x))


def spoiled(m, held):
    """Nothing seen, holding this."""
    full = jax.tree.map(lambda p: jnp.full_like(p, held), m)
    return full._replace(count=jnp.zeros_like(m.count))


def stack(*parts):
    return jax.tree.map(lambda *p: jnp.stack(p), *parts)


def pmerge(stacked):
    """Over replicas; as the first of them has it."""
    of_all = jax.vmap(lambda m: bnjax.pmerge(m, "parts"), axis_name="parts")(stacked)
    return jax.tree.map(lambda p: p[0], of_all)


@jax.jit
def in_every_way(a, b, c):
    """The merge of three."""
    return [
        bnjax.merge(bnjax.merge(a, b), c),
        bnjax.merge(c, bnjax.merge(b, a)),
        jax.lax.scan(lambda m, part: (bnjax.merge(m, part), None), a, stack(b, c))[0],
        bnjax.merge_stacked(stack(a, b, c)),
        pmerge(stack(a, b, c)),
    ]


# Merging


@each_kind
def test_parts_are_the_whole(kind):
    x = normal((3, 16, 4), 1e4)
    measure = jax.jit(kind.measure)
    for m in in_every_way(*map(measure, x)):
        assert_is(m, x.reshape(48, 4), kind)
    one = measure(x[0])
    for m in bnjax.merge(kind.start, one), bnjax.merge(one, kind.start):
        assert_is(m, x[0], kind)


@each_kind
@pytest.mark.parametrize("held", [0.0, 1e30, np.nan, np.inf])
def test_count_zero_is_neutral_whatever_else_it_holds(held, kind):
    x = normal((16, 4), 1e4)
    m = jax.jit(kind.measure)(x)
    nothing = spoiled(m, held)
    for merged in in_every_way(nothing, m, nothing):
        assert_is(merged, x, kind)
    for merged in in_every_way(nothing, nothing, nothing):
        chex.assert_tree_all_finite(merged)
        np.testing.assert_array_equal(merged.count, 0)


@each_kind
def test_count_zero_updates_and_recalibrates_nothing(kind):
    m = jax.jit(kind.measure)(normal((16, 4), 1e4))
    nothing = spoiled(m, np.nan)
    assert_same_bits(bnjax.ema(m, nothing, momentum=0.5), m)
    name = m.second_name()
    stats = {"mean": m.mean, name: m.second, "steps": jnp.int32(7)}
    assert_same_bits(bnjax.update_stats(stats, nothing, momentum=None), stats)
    start = {"mean": kind.start.mean, name: kind.start.second}
    exact = bnjax.recalibrate(lambda m: m, start, [nothing, m, nothing])
    np.testing.assert_array_equal(exact["mean"], m.mean)
    np.testing.assert_allclose(exact[name], m.second, rtol=1e-6)


def test_neutral_feature_by_feature():
    """NaN in a feature that one part has no value of."""
    where = np.array([[[True, False]] * 8, [[True, True]] * 8])
    x = normal((2, 8, 2))

    @jax.jit
    def both(x, where):
        m = jax.vmap(lambda x, w: bnjax.moments(x, where=w))(x, where)
        m = m._replace(mean=m.mean.at[0, 1].set(jnp.nan), var=m.var.at[0, 1].set(jnp.nan))
        return bnjax.merge_stacked(m), pmerge(m)

    expected = reference.moments(x.reshape(16, 2), where=where.reshape(16, 2))
    for merged in both(x, where):
        np.testing.assert_allclose(merged.var, expected.var.astype(float), rtol=2e-6)


@pytest.mark.parametrize("kind", [KINDS["var"], KINDS["cov"]], ids=["var", "cov"])
def test_a_neutral_part_has_no_part_in_the_gradient(kind):
    x = normal((16, 4))

    def value(m):
        return jnp.sum(m.mean**2) + jnp.sum(jnp.abs(m.second))

    @jax.jit
    @jax.jacrev
    def of_each(x):
        m = kind.measure(x)
        merged = in_every_way(m, spoiled(m, jnp.nan), spoiled(m, jnp.nan))
        return jnp.stack(list(map(value, [m, *merged])))

    whole, *merged = of_each(x)
    for gradient in merged:
        np.testing.assert_allclose(gradient, whole, atol=1e-6)


# Long chains


def chain(kind, x, swap, start=None):
    """So many merges of one row, the longer chain first or second."""
    start = kind.start if start is None else start

    def step(m, row):
        pair = m, kind.measure(row[None])
        return bnjax.merge(*(pair[::-1] if swap else pair)), None

    return jax.jit(lambda x: jax.lax.scan(step, start, x)[0])(x)


@each_kind
@pytest.mark.parametrize("swap", [False, True])
def test_a_chain_of_100000_merges_adds_up_no_rounding(swap, kind):
    """Only what the last of them rounded is left, a random walk of sqrt(n / 3) half units."""
    x = normal((100_000, 4), 1)
    assert_is(chain(kind, x, swap), x, kind, tolerance=3e-5)


@each_kind
def test_equal_counts_merge_exactly_in_both_orders(kind):
    x = normal((2000, 4), 1e4)
    a, b = kind.measure(x[:1000]), kind.measure(x[1000:])
    assert_is(bnjax.merge(a, b), x, kind)
    assert_is(bnjax.merge(b, a), x, kind)


@each_kind
def test_an_average_over_100000_steps_adds_up_no_rounding(kind):
    """`momentum=0.9999`: 1 - momentum as a factor is off by 3e-8 in each step, 3e-4 in all."""
    x = normal((100_000, 8, 4), 1)
    batches = jax.jit(jax.vmap(kind.measure))(x)

    def step(m, batch):
        return bnjax.ema(m, batch, momentum=0.9999), None

    m, _ = jax.jit(lambda batches: jax.lax.scan(step, kind.start, batches))(batches)
    share, expected = 1 - 0.9999, np.asarray(kind.start.second, float)
    for second in np.asarray(batches.second, float):
        expected = expected + share * (second - expected)
    np.testing.assert_allclose(m.second, expected, rtol=5e-6, atol=5e-6)


@each_kind
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.7])
def test_both_ways_of_an_average_are_its_formula(momentum, kind):
    """A share of 1 gives the batch's second moment to the last bit."""
    x, y = normal((16, 4)), normal((16, 4), seed=1, ratio=3)
    old, new = kind.measure(x), kind.measure(y)
    m = bnjax.ema(old, new, momentum=momentum)
    expected = momentum * kind.second(x) + (1 - momentum) * kind.second(y)
    np.testing.assert_allclose(m.second, expected.astype(float), rtol=1e-6, atol=1e-6)
    if momentum == 0:
        np.testing.assert_array_equal(m.second, new.second)


def test_beyond_2_to_the_24_a_count_stays_and_the_statistics_go_on():
    """They are an average over about the last 2^24 parts; the variance to within a tenth."""
    old = Moments(jnp.zeros(4), jnp.ones(4), jnp.full(4, 2.0**24), jnp.zeros(4))
    m = chain(KINDS["var"], normal((100_000, 4), 1), False, old)
    kept = np.exp(-100_000 / 2.0**24)
    np.testing.assert_array_equal(m.count, 2**24)
    np.testing.assert_allclose(m.mean + m.remainder, 1 - kept, rtol=0.02)
    np.testing.assert_allclose(m.var, 1 + kept * (1 - kept), rtol=5e-3)


def test_a_count_of_large_batches_is_exact_beyond_1e9():
    many = Moments(jnp.zeros(1), jnp.ones(1), jnp.float32(2048 * 600_000))
    batch = Moments(jnp.zeros(1), jnp.ones(1), jnp.float32(2048))
    assert int(bnjax.merge(many, batch).count) == 2048 * 600_001


# The start


CARRIES = [(jnp.float32, None), (jnp.float64, 4), (jnp.complex64, 4), (jnp.bfloat16, 1)]


@pytest.mark.parametrize(("dtype", "masked"), CARRIES, ids=str)
def test_a_scan_starts_from_nothing(dtype, masked):
    """The carry keeps its shapes and dtypes, masks of examples or of features or none."""
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(normal((3, 8, 4)), dtype)
        mask = None if masked is None else np.random.default_rng(0).random((3, 8, masked)) < 0.7
        start = Moments.initial(4, dtype)

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, None), axis_name="replica", out_axes=0)
        def run(x, mask):
            def step(carry, batch):
                merged, shared, running = carry
                m = bnjax.moments(batch[0], where=batch[1])
                shared = bnjax.pmerge(bnjax.merge(shared, m), "replica")
                return (bnjax.merge(merged, m), shared, bnjax.ema(running, m, momentum=0.9)), None

            return jax.lax.scan(step, (start, start, start), (x, mask))[0]

        after = jax.tree.map(lambda p: p[0], run(x[None], mask))
        chex.assert_trees_all_equal_shapes_and_dtypes(after, (start, start, start))
        whole = reference.moments(
            np.asarray(x, np.promote_types(np.float64, x.dtype)).reshape(24, 4),
            where=None if mask is None else mask.reshape(24, masked),
        )
        for m in after[:2]:
            np.testing.assert_allclose(m.var, whole.var.astype(float), rtol=2e-6)


def test_what_nothing_seen_looks_like():
    m = Moments.initial((2, 3), jnp.complex64)
    assert_same_bits(m.mean, jnp.zeros((2, 3), jnp.complex64))
    assert_same_bits(m.var, jnp.ones((2, 3)))
    assert_same_bits(m.count, jnp.zeros((2, 3)))
    assert_same_bits(m.remainder, m.mean)
    m = CovMoments.initial((2, 3), jnp.complex64, group_size=2)
    assert_same_bits(m.cov, jnp.broadcast_to(jnp.eye(2, dtype=jnp.complex64), (3, 2, 2)))
    assert_same_bits(m.count, jnp.zeros(()))
    assert CovMoments.initial(4).cov.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("kind", "measure"), [(Moments, bnjax.moments), (CovMoments, bnjax.cov_moments)]
)
def test_the_start_can_be_donated(kind, measure):
    """As the state of a loop is: JAX refuses to donate an array twice."""
    step = jax.jit(lambda m, x: bnjax.merge(m, measure(x)), donate_argnums=0)
    m = kind.initial(4)
    for _ in range(2):
        m = step(m, normal((8, 4)))
    assert jnp.max(m.count) == 16


def test_a_group_size_that_does_not_divide():
    with pytest.raises(ValueError, match=r"^") as error:
        CovMoments.initial(4, group_size=3)
    assert str(error.value) == ("group_size is 3, but there are 4 features. Choose a divisor of 4.")


# A third class of statistics, which nothing in the package knows


def test_the_third_kind_is_remembered_recalibrated_and_merged_by_layers():
    x = normal((4, 16, 4), 1e3)
    parts = [shared_moments(part) for part in x]
    stats = {"norm": {"mean": jnp.zeros(4), "power": jnp.ones(())}}
    updated = bnjax.update_stats(stats, {"norm": {"moments": parts[0]}}, momentum=0.75)
    np.testing.assert_allclose(updated["norm"]["power"], 0.75 + 0.25 * parts[0].power, rtol=1e-6)
    exact = bnjax.recalibrate(lambda part: {"norm": shared_moments(part)}, stats, x)
    whole = reference.moments(x.reshape(64, 4))
    np.testing.assert_allclose(exact["norm"]["power"], float(whole.var.mean()), rtol=2e-6)
    np.testing.assert_allclose(exact["norm"]["mean"], whole.mean.astype(float), rtol=1e-7)
    replicas = jax.tree.map(
        lambda *p: jnp.stack(p), *({"mean": m.mean, "power": m.power} for m in parts)
    )
    merged = bnjax.merge_stacked({"norm": replicas})
    np.testing.assert_allclose(merged["norm"]["power"], float(whole.var.mean()), rtol=1e-5)


# On an explicit mesh whose devices share the features


@functools.cache
def of_eight_features(remainder):
    start = Moments.initial(8) if remainder else Moments(jnp.zeros(8), jnp.ones(8))
    x = normal((3, 16, 8), 1e3)
    return start, x, jax.jit(run_of_averages)(start, x)


def run_of_averages(start, x):
    def step(carry, x):
        running, stats = carry
        m = bnjax.moments(x)
        running = bnjax.ema(running, m, momentum=0.9)
        return (running, bnjax.update_stats(stats, m, momentum=0.9)), None

    return jax.lax.scan(step, (start, {"mean": start.mean, "var": start.var}), x)[0]


@pytest.mark.parametrize("placed", [P(), P("features")], ids=str)
@pytest.mark.parametrize("remainder", [False, True])
def test_running_statistics_stay_where_they_lie(remainder, placed):
    """A scan can carry them: their type is what it was, as their dtype is."""
    mesh = jax.make_mesh((8,), ("features",), axis_types=(AxisType.Explicit,))
    start, x, expected = of_eight_features(remainder)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P(None, None, "features")))
        start = jax.tree.map(
            lambda p: jax.device_put(p, NamedSharding(mesh, placed if jnp.ndim(p) else P())), start
        )
        after = jax.jit(run_of_averages)(start, x)
        assert jax.typeof(after[0].mean) == jax.typeof(start.mean)
        assert jax.typeof(after[1]["var"]) == jax.typeof(start.var)
    chex.assert_trees_all_close(jax.device_get(after), jax.device_get(expected), rtol=1e-6)


def test_a_scan_of_merges_starts_where_the_features_lie():
    mesh = jax.make_mesh((8,), ("features",), axis_types=(AxisType.Explicit,))
    x = normal((3, 16, 8))
    with jax.set_mesh(mesh):
        start = jax.device_put(Moments.initial(8), NamedSharding(mesh, P("features")))
        placed = jax.device_put(x, NamedSharding(mesh, P(None, None, "features")))
        m = chain(
            KINDS["var"]._replace(measure=lambda x: bnjax.moments(x[0])), placed, False, start
        )
    assert jax.typeof(m.mean) == jax.typeof(start.mean)
    expected = reference.moments(x.reshape(48, 8)).var
    np.testing.assert_allclose(m.var, expected.astype(float), rtol=2e-6)


def test_nothing_changes_no_bit():
    """Also where a remainder is all but half of the mean's last digit, and would round it."""
    mean = normal(640, 8)
    off = np.linspace(-0.55, 0.55, 640) * np.spacing(mean)  # merges leave up to 0.53
    m = bnjax.Moments(mean, normal(640) ** 2, np.full(640, 1797.0), off)
    m = jax.tree.map(np.float32, m)
    nothing = bnjax.Moments(np.full(640, np.nan, np.float32), np.full(640, np.nan, np.float32))
    for merged in (bnjax.merge(m, nothing), jax.jit(bnjax.merge)(nothing, m)):
        chex.assert_trees_all_equal(merged.mean, m.mean)
        chex.assert_trees_all_equal(merged.remainder, m.remainder)
    kept = bnjax.ema(m, nothing, momentum=0.5)
    chex.assert_trees_all_equal((kept.mean, kept.remainder), (m.mean, m.remainder))


def test_a_step_of_zero_has_a_derivative():
    """Two parts of equal means: the merged mean still follows each."""

    def f(delta):
        b = bnjax.Moments(jnp.ones(1) + delta, jnp.ones(1), 3.0)
        return bnjax.merge(bnjax.Moments(jnp.ones(1), jnp.ones(1), 1.0), b).mean[0]

    np.testing.assert_allclose(jax.grad(f)(0.0), 0.75, rtol=1e-6)
