"""Ghost batches: parts of a batch that are normalized by themselves and remembered together."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import assert_refused
from flax import nnx
from implementations import every_layer, linen_layer, nnx_layer, pull_back
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import kernel

import bnjax
import bnjax.linen
import bnjax.nnx


def batch(rows=24, shape=(3, 5), ratio=2.0, seed=0):
    """x, dy of it, scale and bias of the last axis."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, rows, *shape)).astype(np.float32)
    scale, bias = rng.standard_normal((2, shape[-1])).astype(np.float32)
    return x + np.float32(ratio), dy, 1 + scale, bias


def masks(rows=24, shape=(3, 5)):
    rng = np.random.default_rng(1)
    empty = rng.random((rows, 1, 1)) < 0.6
    empty[4:8] = False  # a whole ghost batch of four, and of two
    return {
        "no mask": None,
        "rows, one part empty": empty,
        "weights": (2 * rng.random((rows, shape[0], 1))).astype(np.float32),
        "the same for all rows": rng.random(shape) < 0.8,
    }


def parts_of(a, size):
    return [a[i : i + size] for i in range(0, len(a), size)]


def expect(x, dy, scale, bias, where, size):
    """y and the gradients of each part put together, in NumPy."""
    w = np.broadcast_to(True if where is None else where, x.shape)
    args = [parts_of(a, size) for a in (x, dy, w)]
    y = [reference.batch_norm(x, scale, bias, where=w) for x, _, w in zip(*args, strict=True)]
    grads = [reference.gradient(x, dy, scale, where=w) for x, dy, w in zip(*args, strict=True)]
    dscale, dbias = (np.sum([getattr(g, name) for g in grads], 0) for name in ("scale", "bias"))
    return np.concatenate(y), (np.concatenate([g.x for g in grads]), dscale, dbias)


def assert_close(actual, expected, atol=1e-5):
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, actual),
        jax.tree.map(lambda a: np.asarray(a, np.float32), expected),
        rtol=1e-5, atol=atol,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "mask"),
    [
        *((linen_layer, mask) for mask in masks()),
        (nnx_layer, "rows, one part empty"),
    ],
)
def test_each_part_is_normalized_by_itself_and_all_are_remembered(step, mask):
    """That both wings take every mask alike is tested of the layers."""
    x, dy, scale, bias = batch()
    where = masks()[mask]
    f = jax.jit(functools.partial(pull_back, step, where=where, ghost_batch_size=4))
    out, grads = f(x, scale, bias, dy)
    y, expected = expect(x, dy, scale, bias, where, 4)
    assert_close(out.y, y)
    assert_close(grads, expected, atol=1e-4)
    m = reference.moments(x, where=where)
    assert_close((out.mean, out.var), (m.mean, m.var))


@functools.cache
def step_of(step, size):
    """Compiled: a step on one device, and its gradients."""
    return jax.jit(functools.partial(pull_back, step, ghost_batch_size=size))


@pytest.mark.parametrize("size", [1, 8])
@every_layer
def test_every_size_that_divides_the_batch(step, size):
    x, dy, scale, bias = batch()
    out, grads = step_of(step, size)(x, scale, bias, dy)
    y, expected = expect(x, dy, scale, bias, None, size)
    assert_close(out.y, y)
    assert_close(grads, expected, atol=1e-4)
    m = reference.moments(x)
    assert_close((out.mean, out.var), (m.mean, m.var))


@every_layer
def test_one_ghost_batch_is_the_plain_layer(step):
    x, dy, scale, bias = batch()
    one, plain = (step_of(step, size)(x, scale, bias, dy) for size in (24, None))
    chex.assert_trees_all_close(one, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pivot", ["batch", "running"])
@every_layer
def test_it_is_accurate_at_large_means(step, pivot):
    x, dy, scale, bias = batch(ratio=1e5)
    running = np.full(5, 1e5, np.float32), np.ones(5, np.float32)
    f = functools.partial(pull_back, step, pivot=pivot, ghost_batch_size=4)
    out, (dx, _, _) = jax.jit(f)(x, scale, bias, dy, running=running)
    y, grads = expect(x, dy, scale, bias, None, 4)
    assert_close(out.y, y)
    assert_close(dx, grads[0], atol=1e-4)
    assert_close(out.var, reference.moments(x).var)


@every_layer
def test_every_part_is_measured_about_its_own_mean(step):
    """Under vmap a guard would run both branches, always."""
    x, _, scale, bias = batch()
    for pivot in ("auto", "running"):
        f = functools.partial(step, scale=scale, bias=bias, ghost_batch_size=4)
        program, expected = (
            str(jax.make_jaxpr(functools.partial(f, pivot=p))(x)) for p in (pivot, "batch")
        )
        assert "reduce_or" not in program  # no guard asks whether any feature is far
        assert program == expected


def largest_difference(a, b):
    return np.max(np.abs(np.asarray(a) - np.asarray(b)))


@every_layer
def test_features_on_other_axes(step):
    x, _, _, _ = batch()
    scale, bias = np.random.default_rng(2).standard_normal((2, 3)).astype(np.float32)
    f = jax.jit(functools.partial(step, feature_axis=1, ghost_batch_size=6))
    out = f(x, scale, bias)
    y = [reference.batch_norm(part, scale, bias, feature_axis=1) for part in parts_of(x, 6)]
    assert_close(out.y, np.concatenate(y))
    m = reference.moments(x, feature_axis=1)
    assert_close((out.mean, out.var), (m.mean, m.var))


def test_for_the_functions_it_is_vmap_and_merge():
    x, _, scale, bias = batch()
    ghosts = x.reshape(6, 4, 3, 5)
    y, parts = jax.vmap(lambda x: bnjax.batch_norm(x, scale, bias))(ghosts)
    whole = bnjax.merge_stacked(parts)
    out = linen_layer(x, scale, bias, ghost_batch_size=4)
    chex.assert_trees_all_close(
        (out.y, out.mean, out.var), (y.reshape(x.shape), whole.mean, whole.var), rtol=1e-6
    )
    one_by_one = [jax.tree.map(lambda a, i=i: a[i], parts) for i in range(6)]
    merged = functools.reduce(bnjax.merge, one_by_one)
    chex.assert_trees_all_close(merged, whole, rtol=1e-6, atol=1e-6)


# Replicas


@pytest.mark.parametrize(("step", "transform"), [(linen_layer, jax.pmap), (nnx_layer, jax.vmap)])
def test_replicas_equal_one_device(step, transform):
    x, _, scale, bias = batch(rows=32)
    where = masks(rows=32)["rows, one part empty"]

    def f(x, where, axis_name=None):
        return step(x, scale, bias, where=where, ghost_batch_size=2, axis_name=axis_name)

    replicas = transform(functools.partial(f, axis_name="i"), axis_name="i")
    replicas = replicas if transform is jax.pmap else jax.jit(replicas)
    out = jax.tree.map(np.asarray, replicas(x.reshape(8, 4, 3, 5), where.reshape(8, 4, 1, 1)))
    parts = out._replace(y=out.y.reshape(x.shape), mean=out.mean[3], var=out.var[3])
    chex.assert_trees_all_close(parts, jax.jit(f)(x, where), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("step", "check_vma"), [(linen_layer, True), (nnx_layer, False)])
def test_shard_map_equals_one_device(step, check_vma):
    x, _, scale, bias = batch(rows=32)
    whole = jax.jit(functools.partial(step, ghost_batch_size=2))(x, scale, bias)
    f = jax.shard_map(
        lambda x: step(x, scale, bias, ghost_batch_size=2, axis_name="i"),
        mesh=Mesh(np.array(jax.devices()), ("i",)),
        in_specs=P("i"),
        out_specs=type(whole)(P("i"), P(), P()),
        check_vma=check_vma,
    )
    chex.assert_trees_all_close(jax.jit(f)(x), whole, rtol=1e-5, atol=1e-5)


def test_without_an_axis_name_replicas_keep_their_own():
    x, _, scale, bias = batch(rows=32)
    f = functools.partial(linen_layer, scale=scale, bias=bias, ghost_batch_size=2)
    out = jax.pmap(f)(x.reshape(8, 4, 3, 5))
    for mean, part in zip(out.mean, parts_of(x, 4), strict=True):
        assert_close(mean, reference.moments(part).mean)


def sharded_step(size, axis_type, rows=32):
    """A jitted linen step whose batch lies on a mesh of eight devices."""
    x, dy, scale, bias = batch(rows=rows)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        over, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
        shardings = over, whole, whole, over
        args = jax.tree.map(jax.device_put, (x, scale, bias, dy), shardings)
        f = jax.jit(functools.partial(pull_back, linen_layer, ghost_batch_size=size))
        return (x, scale, bias, dy), jax.tree.map(np.asarray, f(*args))


@pytest.mark.parametrize(
    ("size", "axis_type"),
    [(2, AxisType.Explicit), (4, AxisType.Explicit), (2, AxisType.Auto), (16, AxisType.Auto)],
    ids=str,
)
def test_a_sharded_batch_equals_one_device(size, axis_type):
    """On an automatic mesh also across its shards, of four examples each."""
    (x, scale, bias, dy), (out, grads) = sharded_step(size, axis_type)
    y, expected = expect(x, dy, scale, bias, None, size)
    m = reference.moments(x)
    assert_close((tuple(out), grads), ((y, m.mean, m.var), expected))


def test_across_the_shards_of_an_explicit_mesh():
    assert_refused(
        lambda: sharded_step(8, AxisType.Explicit),
        "ghost_batch_size is 8, but x has 32 examples on 8 shards of an explicit mesh, and no "
        "ghost batch can lie on two. Choose a size that divides 4, or a mesh with automatic axes.",
    )


def test_replicas_are_remembered_by_groups():
    x, _, scale, bias = batch(rows=32)
    f = functools.partial(
        linen_layer, scale=scale, bias=bias, ghost_batch_size=2, axis_name="i",
        axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]],
    )  # fmt: skip
    out = jax.pmap(lambda x: f(x), axis_name="i")(x.reshape(8, 4, 3, 5))
    assert_close(out.mean[0], reference.moments(x[:16]).mean)
    assert_close(out.var[7], reference.moments(x[16:]).var)


# What the layers do besides


def test_emitted_moments_are_the_merge():
    x, *_ = batch()
    layer = bnjax.linen.BatchNorm(use_running_average=False, ghost_batch_size=4)
    variables = layer.init(jax.random.key(0), x)
    _, emitted = layer.apply(variables, x, mutable=["moments"])
    m, whole = emitted["moments"]["moments"], bnjax.moments(x)
    chex.assert_trees_all_close(m[:3], whole[:3], rtol=1e-5, atol=1e-6)

    layer = bnjax.nnx.BatchNorm(5, ghost_batch_size=4, emit="only", rngs=nnx.Rngs(0))
    layer(x)
    layer(x)
    m = bnjax.Moments(*nnx.pop(layer, bnjax.nnx.BatchMoments)["moments"][:])
    chex.assert_trees_all_close(m[:2], whole[:2], rtol=1e-5, atol=1e-6)
    assert m.count == 2 * whole.count
    chex.assert_trees_all_equal(layer.mean[...], jnp.zeros(5))


def test_initialization_and_evaluation_take_any_batch():
    x, *_ = batch()
    layer = bnjax.linen.BatchNorm(ghost_batch_size=4)
    variables = layer.init(jax.random.key(0), x[:1], use_running_average=False)
    y = layer.apply(variables, x[:3], use_running_average=True)
    np.testing.assert_allclose(y, x[:3] / np.sqrt(np.float32(1 + 1e-5)), rtol=1e-6)
    layer = bnjax.nnx.BatchNorm(5, ghost_batch_size=4, use_running_average=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(x[:3]), y, rtol=1e-6)


def test_a_network_with_ghost_batches_in_scan_and_vmap():
    """Three seeds at once, four steps each; every layer has ghost batches."""
    x = np.random.default_rng(0).standard_normal((3, 4, 12, 5)).astype(np.float32)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(
                    bnjax.linen.BatchNorm(False, momentum=0.5, ghost_batch_size=4)(
                        nn.Dense(5, use_bias=False, kernel_init=kernel)(x)
                    )
                )
            return x

    network = Network()
    variables = jax.jit(network.init)(jax.random.key(0), x[0, 0])

    def learn(x):
        def step(stats, x):
            y, updates = network.apply(
                {"params": variables["params"], "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return updates["batch_stats"], y

        return jax.lax.scan(step, variables["batch_stats"], x)

    stats, y = jax.jit(jax.vmap(learn))(x)
    first = reference.wide(variables["params"]["Dense_0"]["kernel"])
    for seed in range(3):
        mean = np.zeros(5, np.longdouble)
        for i in range(4):
            h = reference.wide(x[seed, i]) @ first
            mean = (mean + h.mean(0)) / 2
        assert_close(stats["BatchNorm_0"]["mean"][seed], mean)
    alone, same = learn(x[1])
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[1], (stats, y)), (alone, same), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_layer
def test_it_keeps_its_input_and_vectors_of_the_parts(step, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 16, 8)), dtype)
    ones = jnp.ones(8)
    f = jax.jit(lambda x: step(x, ones, ones, ghost_batch_size=16, dtype=dtype).y)
    _, backward = jax.vjp(f, x)
    buffers = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.tree.leaves(backward)}
    assert sum(buffers.values()) <= x.nbytes + 4 * 16 * 8 * 4


@every_layer
def test_a_part_of_one_value_per_feature_warns(step):
    x = np.ones((4, 3), np.float32)
    said = (
        r"One value per feature: x has shape \(1, 3\), so the output is the bias. "
        "Train with more examples, or pass use_running_average=True."
    )
    with pytest.warns(UserWarning, match=said):
        step(x, ghost_batch_size=1)


# Bad input


@pytest.mark.parametrize(
    ("size", "axis", "message"),
    [
        (
            5,
            -1,
            "ghost_batch_size is 5, but x has shape (24, 3, 5): its first axis does not divide "
            "evenly. Choose a size that divides it, or drop the incomplete batch. "
            "If another axis holds the examples, move it to the front with jnp.moveaxis.",
        ),
        (
            0,
            -1,
            "ghost_batch_size is 0, but it is a number of examples. "
            "Choose a positive one that divides the batch, or None for the whole batch.",
        ),
        (
            4,
            (0, -1),
            "ghost_batch_size is 4, but the first axis of x holds features, not examples. "
            "Move the examples there with jnp.moveaxis.",
        ),
    ],
    ids=["uneven", "none", "features"],
)
@every_layer
def test_a_size_that_does_not_fit(step, size, axis, message):
    x, *_ = batch()
    assert_refused(lambda: step(x, feature_axis=axis, ghost_batch_size=size), message)


@every_layer
def test_examples_on_the_last_axis(step):
    """As in HWCN: the error says what to do, and that works."""
    x, _, scale, bias = batch(rows=24, shape=(5, 5, 3))
    hwcn = np.moveaxis(x, 0, -1)

    def apply(x, axis):
        return step(x, scale, bias, feature_axis=axis, ghost_batch_size=4)

    assert_refused(
        lambda: apply(hwcn, -2),
        "ghost_batch_size is 4, but x has shape (5, 5, 3, 24): its first axis does not divide "
        "evenly. Choose a size that divides it, or drop the incomplete batch. "
        "If another axis holds the examples, move it to the front with jnp.moveaxis.",
    )
    chex.assert_trees_all_equal(apply(jnp.moveaxis(jnp.asarray(hwcn), -1, 0), -1), apply(x, -1))


# Programs for batches of any size


def any_size(size, f, shape):
    """The program of f for x of a shape in which `size` is free."""
    (rows,) = jax.export.symbolic_shape(size)
    x = jax.ShapeDtypeStruct((rows, *shape), jnp.float32)
    return jax.export.export(jax.jit(f))(x)


@every_layer
def test_a_free_number_of_ghost_batches(step):
    x, dy, scale, bias = batch()

    def f(x):
        return step(x, scale, bias, ghost_batch_size=4)

    program = any_size("4*n", f, x.shape[1:])
    for rows in (8, 24):
        m = reference.moments(x[:rows])
        y, _ = expect(x[:rows], dy[:rows], scale, bias, None, 4)
        assert_close(tuple(program.call(x[:rows])), (y, m.mean, m.var), atol=1e-6)


@every_layer
def test_a_free_batch_that_need_not_divide(step):
    assert_refused(
        lambda: any_size("b", lambda x: step(x, ghost_batch_size=4), (3,)),
        "ghost_batch_size is 4, but x has shape (b, 3): its first axis does not divide evenly. "
        "Write the number of examples as a multiple of the size, such as 4*n. "
        "If another axis holds the examples, move it to the front with jnp.moveaxis.",
    )


@every_layer
@pytest.mark.parametrize("size", [2.0, "2"])
def test_a_size_that_is_no_number_of_examples(step, size):
    assert_refused(
        lambda: step(batch()[0], ghost_batch_size=size),
        f"ghost_batch_size is {size}, but it is a number of examples. "
        "Choose a positive one that divides the batch, or None for the whole batch.",
    )


@every_layer
def test_an_empty_batch(step):
    x = batch()[0][:0]
    assert_refused(
        lambda: step(x, ghost_batch_size=2),
        f"x has shape {x.shape}, so there is no value to measure. Leave empty batches out.",
    )


def test_a_refused_batch_leaves_the_state_as_it_was():
    x, *_ = batch()
    layer = bnjax.nnx.BatchNorm(5, ghost_batch_size=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="ghost_batch_size is 5"):
        layer(x)
    chex.assert_trees_all_equal(layer.mean[...], jnp.zeros(5))


def test_a_misspelled_axis_name():
    x, scale, bias = batch()[0], None, None
    with pytest.raises(NameError, match="axis_name is 'replica', but no such axis is mapped here"):
        linen_layer(x, scale, bias, ghost_batch_size=4, axis_name="replica")
