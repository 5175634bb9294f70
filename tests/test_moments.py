"""Moments as a value: how exactly they are measured, merged, and remembered."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import assert_accurate
from samples import RATIOS, ROWS, normal

import bnjax
from bnjax import Moments

pytestmark = pytest.mark.optimized

# Measure


@functools.cache
def batch(rows, ratio):
    """Normal data, with the reference's answer."""
    x = normal((rows, 64), ratio)
    return x, reference.moments(x)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("jit", [False, True])
def test_moments_are_accurate(rows, ratio, jit):
    x, expected = batch(rows, ratio)
    m = (jax.jit(bnjax.moments) if jit else bnjax.moments)(x)
    assert_accurate(m, expected)
    np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("jit", [False, True])
def test_moments_of_float64_are_accurate(ratio, jit):
    with jax.enable_x64(True):
        x = normal((4099, 8), ratio, dtype=np.float64)
        m = (jax.jit(bnjax.moments) if jit else bnjax.moments)(x)
        assert m.mean.dtype == m.var.dtype == np.float64
        assert_accurate(m, reference.moments(x), (1e-12, 1e-12))


@pytest.mark.parametrize("distance", [-3.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_pivot_within_a_few_standard_deviations_is_accurate(distance, ratio):
    x = normal((4099, 16), ratio)
    m = jax.jit(bnjax.moments)(x, pivot=np.full(16, ratio + distance, np.float32))
    condition = 1 + distance**2  # of the variance, as a difference of m2 and m1**2
    assert_accurate(m, reference.moments(x), (1e-6 * condition, 2e-6 * condition))


def test_the_count_is_the_sum_of_the_weights():
    """As wide as the weights: a scalar where all features share them."""
    shapes = (8, 1, 1), (1, 5, 1), (1, 1, 3), (8, 1, 3), (8, 5, 3)
    wheres = {}
    for dtype in (bool, np.int32, np.float32):
        for shape in shapes:
            draws = 3 * np.random.default_rng(0).random(shape) + (dtype != np.float32) - 1
            where = np.maximum(draws.astype(dtype), 0).astype(dtype)
            where[0, 0, 0] = 1
            wheres[f"{np.dtype(dtype)}{shape}"] = where

    @jax.jit
    def counts(x, wheres):
        return jax.tree.map(lambda where: bnjax.moments(x, where=where).count, wheres)

    for name, count in counts(normal((8, 5, 3)), wheres).items():
        where = wheres[name]
        chex.assert_shape(count, () if where.shape[-1] == 1 else (3,))
        assert count.dtype == np.float32
        weights = where if where.dtype == np.float32 else where != 0
        expected = np.broadcast_to(weights, (8, 5, 3)).sum((0, 1), dtype=np.float64)
        np.testing.assert_allclose(np.broadcast_to(count, 3), expected, rtol=1e-6, err_msg=name)


def test_the_count_is_static_without_a_mask():
    assert bnjax.moments(normal((8, 5, 3))).count == 40
    assert jax.make_jaxpr(lambda x: bnjax.moments(x).count)(normal((8, 3))).consts == []


def test_the_count_of_a_large_mask_is_exact():
    """Beyond 2**24 values float32 cannot count one by one."""
    n = 2**24 + 64
    where = jnp.ones((n, 1), bool)
    m = bnjax.moments(jnp.zeros((n, 1), jnp.bfloat16), where=where)
    assert int(m.count) == n


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_16_bit_weights_are_added_up_in_float32(dtype):
    """In bfloat16 a sum of ones ends at 256, in float16 at 2048."""
    m = bnjax.moments(np.ones((5000, 2), dtype), where=np.ones((5000, 1), dtype))
    assert (m.count.dtype, m.count) == (np.float32, 5000)


def test_nan_in_a_valid_place_is_not_hidden():
    """It spoils its own feature, and no other."""
    x, where = np.ones((4, 3), np.float32), np.array([True, True, True, False])
    x[1, 0] = x[3, 1] = np.nan
    m = bnjax.moments(x, where=where[:, None])
    np.testing.assert_array_equal(np.isnan(m.mean), [True, False, False])
    np.testing.assert_array_equal(np.isnan(m.var), [True, False, False])


def test_an_all_masked_feature_has_mean_0_and_variance_1():
    where = np.array([[True, False]] * 4)
    m = bnjax.moments(np.full((4, 2), np.nan, np.float32), where=where & [False, False])
    chex.assert_trees_all_equal(m, Moments(jnp.zeros(2), jnp.ones(2), jnp.zeros(2), jnp.zeros(2)))
    m = bnjax.moments(np.full((4, 2), [5.0, np.nan], np.float32), where=where)
    np.testing.assert_array_equal(m.mean, [5, 0])
    np.testing.assert_array_equal(m.var, [0, 1])
    np.testing.assert_array_equal(m.count, [4, 0])


def test_an_all_masked_feature_keeps_a_callers_pivot_as_its_mean():
    x, where = np.full((4, 2), np.nan, np.float32), np.zeros((4, 1), bool)
    m = bnjax.moments(x, where=where, pivot=np.array([3.0, 1e6], np.float32))
    np.testing.assert_array_equal(m.mean + m.remainder, [3.0, 1e6])
    np.testing.assert_array_equal(m.var, [1, 1])


def test_features_on_several_axes_keep_the_order_of_x():
    x = normal((4, 6, 3, 5))
    m = bnjax.moments(x, feature_axis=(-1, 1))
    chex.assert_shape((m.mean, m.var), (6, 5))
    assert_accurate(m, reference.moments(x, feature_axis=(1, 3)))


def test_no_feature_axis_gives_one_mean():
    x = normal((4, 6))
    m = bnjax.moments(x, feature_axis=())
    chex.assert_shape((m.mean, m.var), ())
    assert_accurate(m, reference.moments(x, feature_axis=()))


def test_moments_of_complex_input_have_a_real_variance():
    x = normal((4099, 4), 1e4) + 1j * normal((4099, 4), -1e4, seed=1)
    m = jax.jit(bnjax.moments)(x.astype(np.complex64))
    assert m.mean.dtype == np.complex64
    assert m.var.dtype == m.count.dtype == np.float32
    assert_accurate(m, reference.moments(x.astype(np.complex64)))


# Merge


def parts(ratio, sizes=(1000, 1, 5000, 37), shift=0.0):
    """Uneven batches whose means differ by `shift`, all at about this mean / std."""
    return [normal((n, 16), ratio + i * shift, seed=i) for i, n in enumerate(sizes)]


def merge_all(batches):
    return functools.reduce(bnjax.merge, [bnjax.moments(x) for x in batches])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("jit", [False, True])
def test_merging_parts_gives_the_moments_of_the_whole(ratio, shift, jit):
    """Also as a chain inside one jit, where XLA may rearrange compensated sums."""
    batches = parts(ratio, shift=shift)
    m = (jax.jit(merge_all) if jit else merge_all)(batches)
    assert_accurate(m, reference.merge(batches))


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_long_chain_of_merges_stays_accurate(ratio):
    """A data set in a scan: 200 batches, the variance of a few rows each."""
    x = normal((200, 3, 16), ratio)

    @jax.jit
    def whole(x):
        zero = Moments(jnp.zeros(16), jnp.ones(16), jnp.zeros(()), jnp.zeros(16))
        return jax.lax.scan(lambda m, part: (bnjax.merge(m, bnjax.moments(part)), None), zero, x)

    assert_accurate(whole(x)[0], reference.moments(x.reshape(600, 16)))


@pytest.mark.parametrize("ratio", [0, 1e6])
def test_merge_is_associative_and_commutative(ratio):
    batches = parts(ratio, shift=0.5)
    a, b, c, d = map(bnjax.moments, batches)
    expected = reference.merge(batches)
    merge = jax.jit(bnjax.merge)
    for m in (
        merge(merge(merge(a, b), c), d),
        merge(a, merge(b, merge(c, d))),
        merge(merge(a, b), merge(c, d)),
        merge(d, merge(c, merge(b, a))),
        merge(merge(b, d), merge(a, c)),
    ):
        assert_accurate(m, expected)


@pytest.mark.parametrize("held", [0.0, 1.0, 1e30, np.nan, np.inf])
@pytest.mark.parametrize("jit", [False, True])
def test_count_zero_is_neutral_whatever_else_it_holds(held, jit):
    m = bnjax.moments(normal((100, 4), 1e4))
    full = jnp.full(4, held, jnp.float32)
    nothing = Moments(full, full, jnp.zeros(()), full)
    merge = jax.jit(bnjax.merge) if jit else bnjax.merge
    for merged in (merge(m, nothing), merge(nothing, m)):
        np.testing.assert_array_equal(merged.mean, m.mean)
        np.testing.assert_array_equal(merged.remainder, m.remainder)
        np.testing.assert_array_equal(merged.var, m.var)
        np.testing.assert_array_equal(merged.count, m.count)
    both = merge(nothing, nothing)
    np.testing.assert_array_equal(both.count, 0)
    chex.assert_tree_all_finite(both)


@jax.jit
def merged(x, x_where, y, y_where):
    return bnjax.merge(bnjax.moments(x, where=x_where), bnjax.moments(y, where=y_where))


def test_count_zero_is_neutral_feature_by_feature():
    x, y = normal((10, 3)), normal((20, 3), 5)
    x_where, y_where = np.array([[True, False, False]] * 10), np.array([[True, True, False]] * 20)
    m = merged(x, x_where, y, y_where)
    expected = reference.moments(np.concatenate([x, y]), where=np.concatenate([x_where, y_where]))
    assert_accurate(m, expected)


def test_gradients_through_merge_are_those_of_the_whole():
    """And a neutral operand of NaN does not spoil them."""
    batches = parts(0, sizes=(5, 1, 11))
    nan, zero = np.full(16, np.nan, np.float32), np.float32(0)
    nothing = Moments(nan, nan, zero, np.zeros(16, np.float32))

    def std_over_mean(batches):
        m = bnjax.merge(nothing, bnjax.merge(merge_all(batches), nothing))
        return jnp.sum(jnp.sin(m.mean + m.remainder) + m.var**2)

    grads = np.concatenate(jax.jit(jax.grad(std_over_mean))(batches))
    x = np.concatenate(batches).astype(np.longdouble)
    mean, var = x.mean(0), x.var(0)
    expected = (np.cos(mean) + 4 * var * (x - mean)) / len(x)
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-6)


def test_merging_weighted_moments_weighs_them():
    x, y = normal((6, 2)), normal((9, 2), 3)
    w, v = np.full((6, 1), 0.25, np.float32), np.arange(9, dtype=np.float32)[:, None]
    m = merged(x, w, y, v)
    expected = reference.moments(np.concatenate([x, y]), where=np.concatenate([w, v]))
    assert_accurate(m, expected)


# Merge over a mapped axis


def over_replicas(kind, f):
    """Maps f over the leading axis, all replicas named 'replica'."""
    if kind == "pmap":
        return jax.pmap(f, axis_name="replica")
    return jax.jit(jax.vmap(f, axis_name="replica"))


@functools.cache
def pmerged(kind):
    return over_replicas(kind, lambda x, w: bnjax.pmerge(bnjax.moments(x, where=w), "replica"))


@pytest.mark.parametrize("kind", ["vmap", "pmap"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_pmerge_is_merge_over_the_replicas(kind, ratio):
    """With uneven counts, one of them zero; each replica gets the moments of all."""
    x = normal((8, 64, 4), ratio)
    x[3] = np.nan
    where = np.random.default_rng(1).random((8, 64, 1)) < np.linspace(0.05, 1, 8)[:, None, None]
    where[3] = False
    found = jax.tree.map(np.asarray, pmerged(kind)(x, where))
    expected = reference.moments(x.reshape(-1, 4), where=where.reshape(-1, 1))
    for replica in range(8):
        assert_accurate(jax.tree.map(lambda a, i=replica: a[i], found), expected)


@pytest.mark.parametrize("kind", ["vmap", "pmap"])
def test_pmerge_of_nothing_is_nothing(kind):
    zeros = np.zeros((8, 2), np.float32)
    nothing = Moments(zeros + 7, zeros + 9, zeros[:, 0], zeros)
    m = over_replicas(kind, lambda m: bnjax.pmerge(m, "replica"))(nothing)
    np.testing.assert_array_equal(m.count, np.zeros(8))
    np.testing.assert_array_equal(m.var, np.ones((8, 2)))
    chex.assert_tree_all_finite(m)


@functools.partial(jax.pmap, axis_name="replica", in_axes=(0, None))
def measured_over_replicas(x, pivot):
    return bnjax.moments(x, axis_name="replica", pivot=pivot)


@pytest.mark.parametrize("ratio", [0, 1e4, 1e6])
@pytest.mark.parametrize("pivot", [None, 0.5])
def test_moments_over_a_mapped_axis_are_those_of_the_whole(ratio, pivot):
    x = normal((8, 64, 4), ratio)
    pivot = None if pivot is None else np.full(4, ratio + pivot, np.float32)
    m = measured_over_replicas(x, pivot)
    assert_accurate(jax.tree.map(lambda a: a[5], m), reference.moments(x.reshape(-1, 4)))


def test_groups_of_replicas_share_among_themselves():
    x = normal((8, 16, 4))
    groups = [[0, 1, 2, 5], [3, 4, 6, 7]]
    m = jax.pmap(
        lambda x: bnjax.moments(x, axis_name="replica", axis_index_groups=groups),
        axis_name="replica",
    )(x)
    m = jax.tree.map(np.asarray, m)
    for group in groups:
        expected = reference.moments(x[group].reshape(-1, 4))
        for replica in group:
            assert_accurate(jax.tree.map(lambda a, i=replica: a[i], m), expected)
