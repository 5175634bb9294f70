"""Functions and layers times every named property, on inputs that hypothesis chooses.

An example's program decides whether it is tried on a function or on a layer. The two functions
share what they call, and so do the two layers: they take turns.
"""

import functools
import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from derivatives import PLAIN
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, alternating, pull_back

pytestmark = pytest.mark.optimized

# The same examples in every run, no clock, and no shrinking.
reproducible = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=24,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
EXACT = (np.float32, np.float64)
DTYPES = (*EXACT, jnp.bfloat16, np.float16)
MASKS = (None, bool, np.int32, "weights")
RATIOS = (0, 1, -1e2, 1e4, 1e6)  # mean / std


class Batch(NamedTuple):
    """An input with all that goes with it."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    dy: np.ndarray
    feature_axis: Any = -1
    where: Any = None
    epsilon: float = 1e-5
    step: str = "batch_norm"

    @property
    def settings(self):
        return {"feature_axis": self.feature_axis, "where": self.where, "epsilon": self.epsilon}

    @property
    def reduced(self):
        return reference.features_of(self.x.ndim, self.feature_axis)[1]

    def moments(self):
        return reference.moments(self.x, feature_axis=self.feature_axis, where=self.where)

    def spread(self, p):
        return reference.spread(p, self.x.shape, self.feature_axis)


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


class Program(NamedTuple):
    """What decides over compilation: the values vary freely, and these little."""

    shape: tuple
    feature_axis: Any
    dtype: Any
    mask: Any  # the dtype of a mask, or "weights"
    narrow: tuple  # its shape: on each axis as long as x or 1
    step: str


# Shapes, and their feature axes as an int or a tuple, counted from either end.
LAYOUTS = [
    ((6, 3), -1),
    ((2, 3, 4), 1),
    ((2, 4), (-1,)),
    ((3, 5, 2), (-1, 0)),
    ((4, 1, 3, 2), (1, -1)),
    ((2, 6, 1, 3), -3),
    ((1, 3, 4, 2), (-2,)),
]
# Every mask in float32 on functions and on layers; the other dtypes take turns.
KINDS = [
    (
        [
            *((np.float32, mask) for mask in (*MASKS, None, bool)),
            *((np.float64, mask) for mask in (bool, None)),
            *((jnp.bfloat16, "weights"), (np.float16, None)),
        ],
        ("batch_norm", "moments, normalize"),
    ),
    (
        [
            *((np.float32, mask) for mask in (bool, *MASKS, None)),
            *((np.float64, mask) for mask in ("weights", None)),
            *((jnp.bfloat16, None), (np.float16, bool)),
        ],
        ("linen", "nnx"),
    ),
]


def programs():
    """The kinds on the layouts in turn.

    Masks of booleans, and weights of float32, are as large as x.
    """
    rng = np.random.default_rng(7)
    layouts = itertools.cycle(LAYOUTS)
    for kinds, steps in KINDS:
        for (dtype, mask), step in zip(kinds, itertools.cycle(steps), strict=False):
            shape, feature_axis = next(layouts)
            whole = mask is bool or (dtype, mask) == (np.float32, "weights")
            narrow = np.where(whole | (rng.random(len(shape)) < 0.5), shape, 1)
            yield Program(shape, feature_axis, dtype, mask, tuple(narrow.tolist()), step)


PROGRAMS = list(programs())


@st.composite
def batches(draw, *, dtypes=DTYPES, masks_of=MASKS, ratios=RATIOS, empty=False):
    """Normal data of any mean / std for a program; the values of a feature differ.

    With `empty` there may be features without any value.
    """
    fitting = [p for p in PROGRAMS if p.dtype in dtypes and p.mask in masks_of]
    shape, feature_axis, dtype, mask, narrow, step = draw(st.sampled_from(fitting))
    rng, dtype = draw(seeds), np.dtype(dtype)
    where = None
    if mask == "weights":
        where = rng.choice([0.0, 0.25, 1.0, 3.0], narrow).astype(np.float32)
    elif mask is not None:
        where = (rng.random(narrow) < 0.7).astype(mask)
    ratios = [r for r in ratios if dtype in EXACT or abs(r) <= 1e2]
    mean, std = draw(st.sampled_from(ratios)), draw(st.sampled_from([0.25, 1, 30]))
    features, _ = reference.features_of(len(shape), feature_axis)
    sizes = [shape[i] for i in features]
    params = dtype if dtype == np.float64 else np.float32
    batch = Batch(
        x=(std * (mean + rng.standard_normal(shape))).astype(dtype),
        scale=rng.uniform(0.5, 2, sizes).astype(params),
        bias=rng.uniform(-1, 1, sizes).astype(params),
        dy=rng.standard_normal(shape).astype(dtype),
        feature_axis=feature_axis,
        where=where,
        epsilon=draw(st.sampled_from([1e-5, 0.1, 1.0])),
        step=step,
    )
    m = batch.moments()
    assume(np.all(((m.count > 0) | empty) & (np.sqrt(m.var) > 0.2 * std)))
    return batch


@functools.cache
def program(step, feature_axis, dtype, jit):
    """The step with its gradients; the output is in the dtype of x."""
    f = functools.partial(pull_back, step, feature_axis=feature_axis, dtype=dtype)
    return jax.jit(f) if jit else f


def run(batch, *, jit=True, running=None, momentum=0.0):
    """A step from these running statistics, with its gradients, as NumPy arrays."""
    f = program(IMPLEMENTATIONS[batch.step], batch.feature_axis, batch.x.dtype, jit)
    if running is None:
        running = np.zeros_like(batch.bias), np.ones_like(batch.bias)
    with jax.enable_x64(batch.x.dtype == np.float64):
        out, grads = f(
            batch.x,
            batch.scale,
            batch.bias,
            batch.dy,
            where=batch.where,
            epsilon=batch.epsilon,
            running=running,
            momentum=momentum,
        )
        return jax.tree.map(np.asarray, (out, reference.Gradient(*grads)))


def expect(batch):
    """The reference's output, moments and gradients."""
    y = reference.batch_norm(batch.x, batch.scale, batch.bias, **batch.settings)
    return y, batch.moments(), reference.gradient(batch.x, batch.dy, batch.scale, **batch.settings)


def eps(dtype):
    """The rounding unit of the arithmetic: that of float32 for narrower dtypes."""
    return np.finfo(np.float64 if dtype == np.float64 else np.float32).eps


def peak(a, reduced):
    """The largest magnitude in each feature, with the rank of x."""
    return np.max(np.abs(reference.wide(a)), reduced, keepdims=True)


def assert_close(actual, expected, size):
    """Equal to a few roundings of numbers of this size, and to one of the result to its dtype."""
    expected = reference.wide(expected)
    bound = 4 * eps(actual.dtype) * size + jnp.finfo(actual.dtype).eps * np.abs(expected)
    error = np.abs(reference.wide(actual) - expected)
    assert np.all(error <= bound), f"{np.max(error / bound):.2g} times the bound"


def gradient_sizes(batch):
    """The sizes of the terms that dx, dscale and dbias are sums of."""
    x_hat, r = reference.standardize(batch.x, **batch.settings)
    dy = peak(batch.dy, batch.reduced)
    total = np.sum(np.abs(reference.wide(batch.dy)), batch.reduced, keepdims=True)
    # In 16 bits dx is the rounded sum of two rounded terms: directly, and through the moments.
    roundings = (
        1 + peak(x_hat, batch.reduced) + 0.5 * jnp.finfo(batch.x.dtype).eps / eps(batch.x.dtype)
    )
    sizes = (
        r * batch.spread(batch.scale) * dy * roundings,
        (total * peak(x_hat, batch.reduced)).squeeze(batch.reduced),
        total.squeeze(batch.reduced),
    )
    return reference.Gradient(*sizes)


def assert_gradients_close(actual, expected, batch):
    jax.tree.map(assert_close, actual, expected, gradient_sizes(batch))


@given(batch=batches(empty=True))
@settings(reproducible, max_examples=40)
def test_it_matches_the_reference(batch):
    out, grads = run(batch)
    y, m, expected = expect(batch)
    assert_close(out.y, y, peak(y, batch.reduced))
    assert_close(out.mean, m.mean, np.sqrt(m.var))
    assert_close(out.var, m.var, m.var)
    assert_gradients_close(grads, expected, batch)


@st.composite
def batches_of_rows(draw, mask, weights):
    """Float32 rows with one mask or weight for each, the first of them positive."""
    batch = draw(batches(dtypes=[np.float32], masks_of=[mask]))
    axis = batch.reduced[0]
    w = draw(seeds).choice(weights, batch.x.shape[axis])
    w[0] = max(weights)
    narrow = [len(w) if i == axis else 1 for i in range(batch.x.ndim)]
    batch = batch._replace(where=np.broadcast_to(w.reshape(narrow), batch.x.shape))
    assume(np.all(batch.moments().var > 0.04 * np.var(batch.x, batch.reduced)))
    return batch, axis, w


@given(given_rows=batches_of_rows(bool, weights=[True, False]))
@reproducible
def test_a_mask_is_the_deletion_of_rows(given_rows):
    batch, axis, w = given_rows

    def keep(a):
        return np.compress(w, a, axis)

    batch = batch._replace(dy=batch.dy * batch.where)
    rows = batch._replace(x=keep(batch.x), dy=keep(batch.dy), where=None)
    out, grads = run(batch)
    y, m, expected = expect(rows)
    assert_close(keep(out.y), y, peak(y, rows.reduced))
    assert_close(out.mean, m.mean, np.sqrt(m.var))
    assert_close(out.var, m.var, m.var)
    assert_gradients_close(grads._replace(x=keep(grads.x)), expected, rows)
    assert not np.any(np.compress(~w, grads.x, axis))


@given(given_rows=batches_of_rows("weights", weights=[0.0, 1.0, 2.0, 3.0]))
@reproducible
def test_integer_weights_are_the_repetition_of_rows(given_rows):
    batch, axis, w = given_rows
    batch = batch._replace(where=batch.where.astype(np.float32))

    def repeat(a):
        return np.repeat(a, w.astype(int), axis)

    rows = batch._replace(x=repeat(batch.x), dy=repeat(batch.dy), where=None)
    out, grads = run(batch._replace(dy=batch.dy * batch.where))
    y, m, expected = expect(rows)
    assert_close(repeat(out.y), y, peak(y, rows.reduced))
    assert_close(out.mean, m.mean, np.sqrt(m.var))
    assert_close(out.var, m.var, m.var)
    # A row of weight w stands for w equal rows, so its gradient is the sum of theirs.
    starts = np.cumsum(w[w > 0].astype(int)) - w[w > 0].astype(int)
    summed = expected._replace(x=np.add.reduceat(expected.x, starts, axis))
    kept = grads._replace(x=np.compress(w > 0, grads.x, axis))
    sizes = gradient_sizes(rows)
    jax.tree.map(assert_close, kept, summed, sizes._replace(x=3 * sizes.x))


@given(batch=batches(), rng=seeds)
@reproducible
def test_the_order_of_samples_is_irrelevant(batch, rng):
    axis = batch.reduced[0]
    order = rng.permutation(batch.x.shape[axis])

    def shuffle(a):
        return a if a is None or a.shape[axis] == 1 else np.take(a, order, axis)

    shuffled = batch._replace(**{k: shuffle(getattr(batch, k)) for k in ("x", "dy", "where")})
    (out, grads), (again, grads_again) = run(batch), run(shuffled)
    assert_close(again.y, shuffle(out.y), peak(out.y, batch.reduced))
    m = batch.moments()
    assert_close(again.mean, out.mean, np.sqrt(m.var))
    assert_close(again.var, out.var, m.var)
    assert_gradients_close(grads_again, grads._replace(x=shuffle(grads.x)), batch)


@given(
    batch=batches(dtypes=EXACT, ratios=[0]),
    a=st.sampled_from([0.5, 1, 3]),
    c=st.sampled_from([0, 1e2, -1e4, 1e6]),
)
@reproducible
def test_y_is_unchanged_under_scale_and_shift_of_x(batch, a, c):
    """With epsilon scaled alongside, exactly; the values are so chosen that a x + c is exact."""
    batch = batch._replace(x=np.round(8 * batch.x / np.max(np.abs(batch.x))))
    assume(np.all(batch.moments().var > 0.25))
    moved = batch._replace(x=a * batch.x + batch.x.dtype.type(c), epsilon=a * a * batch.epsilon)
    (out, grads), (again, grads_again) = run(batch), run(moved)
    assert_close(again.y, out.y, peak(out.y, batch.reduced))
    assert_gradients_close(grads_again, grads._replace(x=grads.x / a), moved)


@given(batch=batches(dtypes=EXACT))
@reproducible
def test_the_gradient_spends_nothing_on_shift_and_scale(batch):
    """Along the mean it is zero; along x_hat it is r epsilon / (var + epsilon) <dy scale, x_hat>.

    The terms are those of notebooks/guide/contributing.md, on the reference's x_hat, in longdouble.
    """
    _, grads = run(batch)
    x_hat, r = reference.standardize(batch.x, **batch.settings)
    dx, dy = reference.wide(grads.x), reference.wide(batch.dy)
    var = batch.spread(batch.moments().var)
    along = np.sum(dy * batch.spread(batch.scale) * x_hat, batch.reduced, keepdims=True)
    expected = r * batch.epsilon / (var + batch.epsilon) * along
    terms = gradient_sizes(batch).x * np.sqrt(np.prod([batch.x.shape[i] for i in batch.reduced]))
    bound = 4 * eps(grads.x.dtype) * terms
    assert np.all(np.abs(np.sum(dx, batch.reduced, keepdims=True)) <= bound)
    component = np.sum(dx * x_hat, batch.reduced, keepdims=True)
    assert np.all(np.abs(component - expected) <= bound * peak(x_hat, batch.reduced))


@given(batch=batches(dtypes=EXACT, masks_of=[None]))
@reproducible
def test_the_mean_of_the_output_is_the_bias(batch):
    out, _ = run(batch)
    mean = np.mean(reference.wide(out.y), batch.reduced)
    size = peak(out.y, batch.reduced).squeeze(batch.reduced)
    assert np.all(np.abs(mean - batch.bias) <= eps(out.y.dtype) * size)


@pytest.mark.parametrize(("feature_axis", "step"), [(-1, "batch_norm"), (1, "linen")])
def test_a_convolution_has_one_mean_and_variance_per_feature_map(feature_axis, step):
    rng = np.random.default_rng(0)
    batch = Batch(
        x=(1e3 + rng.standard_normal((8, 6, 7, 6))).astype(np.float32),
        scale=rng.uniform(0.5, 2, 6).astype(np.float32),
        bias=rng.uniform(-1, 1, 6).astype(np.float32),
        dy=rng.standard_normal((8, 6, 7, 6)).astype(np.float32),
        feature_axis=feature_axis,
        step=step,
    )
    out, _ = run(batch)
    for feature in range(6):
        values = reference.wide(np.take(batch.x, feature, feature_axis))
        y = reference.wide(np.take(out.y, feature, feature_axis))
        assert abs(out.mean[feature] - np.mean(values)) <= 2e-7 * 1e3
        assert abs(out.var[feature] - np.var(values)) <= 2e-6
        assert abs(np.mean(y) - batch.bias[feature]) <= eps(np.float32) * np.max(np.abs(y))


@given(
    batch=batches(dtypes=DTYPES, masks_of=[None, bool]), value=st.sampled_from([0, -3, 1e4, 1e9])
)
@reproducible
def test_a_constant_channel_has_finite_outputs_and_gradients(batch, value):
    """Its output is the bias, but for what the rounding of x weighs at this epsilon."""
    value = min(value, float(jnp.finfo(batch.x.dtype).max))
    batch = batch._replace(x=np.full_like(batch.x, value))
    out, grads = run(batch)
    chex.assert_tree_all_finite((out, grads))
    k = batch.spread(batch.scale) / np.sqrt(batch.epsilon)
    bound = jnp.finfo(out.y.dtype).eps + 4 * eps(out.y.dtype) ** 2 * abs(value) * k
    assert np.all(np.abs(reference.wide(out.y) - batch.spread(batch.bias)) <= bound)
    assert np.all((out.var >= 0) & (out.var <= (4 * eps(out.y.dtype) * abs(value)) ** 2))


def spoil(batch, rng):
    """Puts NaN and infinities in all masked-out places, and keeps the rest."""
    out = np.broadcast_to(np.asarray(batch.where) == 0, batch.x.shape)
    bad = rng.choice([np.nan, np.inf, -np.inf], batch.x.shape).astype(batch.x.dtype)
    return batch._replace(x=np.where(out, bad, batch.x)), out


@given(batch=batches(masks_of=[bool, np.int32, "weights"]), rng=seeds, everywhere=st.booleans())
@reproducible
def test_nan_in_masked_places_never_spreads(batch, rng, everywhere):
    """With a loss over valid entries and over all: there, masked NaN yields the bias as output."""
    spoiled, out_of_mask = spoil(batch, rng)
    if not everywhere:
        spoiled = spoiled._replace(dy=np.where(out_of_mask, 0, batch.dy).astype(batch.dy.dtype))
    out, grads = run(spoiled)
    y, m, expected = expect(spoiled)
    assert_close(out.y, y, peak(y, batch.reduced))
    assert_close(out.mean, m.mean, np.sqrt(m.var))
    assert_close(out.var, m.var, m.var)
    assert_gradients_close(grads, expected, spoiled)
    assert not np.any(grads.x[out_of_mask])


@given(batch=batches(masks_of=[bool]), rng=seeds, finite=st.booleans())
@reproducible
def test_an_all_masked_feature_keeps_its_state(batch, rng, finite):
    """Its outputs and gradients are finite, and the other features are remembered as usual."""
    sizes = batch.bias.shape
    seen = rng.random(sizes) < 0.5
    where = batch.spread(seen).astype(bool)
    batch = batch._replace(where=np.broadcast_to(where, batch.x.shape))
    if not finite:
        batch, _ = spoil(batch, rng)
    kept = batch.bias.dtype
    running = rng.standard_normal(sizes).astype(kept), rng.uniform(1, 2, sizes).astype(kept)
    out, grads = run(batch, running=running, momentum=0.75)
    chex.assert_tree_all_finite((out, grads))
    m = batch.moments()
    for old, new, measured in zip(running, out[1:], (m.mean, m.var), strict=True):
        np.testing.assert_array_equal(new[~seen], old[~seen])
        moved = 0.75 * reference.wide(old) + 0.25 * measured
        size = np.abs(old) + np.abs(measured) + np.sqrt(m.var)
        assert_close(new[seen], moved[seen], size[seen])


@given(batch=batches(dtypes=[np.float32, jnp.bfloat16], masks_of=[None, "weights"]))
@settings(reproducible, max_examples=6)
def test_jit_changes_nothing(batch):
    (out, grads), (plain, plain_grads) = run(batch), run(batch, jit=False)
    m = batch.moments()
    assert_close(out.y, plain.y, peak(plain.y, batch.reduced))
    assert_close(out.mean, plain.mean, np.sqrt(m.var))
    assert_close(out.var, plain.var, m.var)
    assert_gradients_close(grads, plain_grads, batch)


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, np.float16, np.float32, np.int32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_dtype_of_the_output(name, x_dtype, dtype):
    """As asked for; else x's in functions (of floats), the promotion with float32 in layers."""
    x, ones = np.arange(6).reshape(3, 2).astype(x_dtype), np.ones(2, np.float32)
    y = jax.eval_shape(functools.partial(IMPLEMENTATIONS[name], dtype=dtype), x, ones, ones).y
    own = np.float32 if name in ("linen", "nnx") or x_dtype == np.int32 else x_dtype
    assert y.dtype == (dtype or own)
    chex.assert_shape(y, x.shape)


@alternating("kept", DTYPES)
def test_the_dtype_of_the_state_is_fixed(step, kept):
    """With each input, in one program."""

    @functools.partial(jax.jit, compiler_options=PLAIN)
    def after_each(running, xs):
        return [step(x, running=running, momentum=0.5)[1:] for x in xs]

    with jax.enable_x64(True):
        running = jnp.asarray(np.zeros(2, kept)), jnp.asarray(np.ones(2, kept))
        x = np.arange(6).reshape(3, 2)
        updated = after_each(running, [x.astype(dtype) for dtype in (*DTYPES, np.int32)])
        for mean, var in jax.tree.map(np.asarray, updated):
            assert (mean.dtype, var.dtype) == (kept, kept)
            np.testing.assert_allclose(mean.astype(np.float32), [1, 1.5])
            rtol = max(jnp.finfo(kept).eps, 1e-7)
            np.testing.assert_allclose(var.astype(np.float32), 0.5 + 0.5 * 8 / 3, rtol=rtol)
