"""One batch, however it is laid out: values, gradients and statistics are those of the whole."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import layouts
import numpy as np
import pytest
import reference
from collectives import Chain, compile_sharded, count_collectives, mesh_of
from implementations import Step, linen_layer, nnx_layer, pull_back
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import SETTINGS, assert_is_whole_batch
from samples import every_pair

import bnjax

pytestmark = pytest.mark.optimized

KINDS = {  # cases of one kind are values of one program
    "no mask": 0,
    "uneven mask": 1,
    "one replica masked": 1,
    "weights": 2,
    "mask per feature": 3,
}


def laid_out():
    """Each layout without a mask, and each kind of masks in one of two that are alike.

    Of shard_map's and of jit's two the stricter one gets more: it refuses what the other takes.
    """
    for i, layout in enumerate(layouts.LAYOUTS):
        kinds = (0, 1, 3) if layout in ("pmap", "shard_map", "jit, explicit") else (0, 2)
        narrow = kinds[i // 2 % len(kinds)]
        for case, kind in KINDS.items():
            if kind in kinds:
                settings = ["bf16"] if kind == narrow else [s for s in SETTINGS if s != "bf16"]
                yield from ((layout, case, setting) for setting in settings)


@pytest.mark.parametrize(("layout", "case", "setting"), [*laid_out()])
def test_every_layout_gives_the_whole_batch(layout, case, setting):
    """One kind of masks is in bfloat16, in turn."""
    x, dy, scale, bias = layouts.batch(*SETTINGS[setting])
    where = layouts.cases()[case]
    result = layouts.LAYOUTS[layout](x, dy, where, scale, bias)
    assert_is_whole_batch(result, x, dy, where, scale, bias)


@pytest.mark.parametrize(
    ("pivot", "forward", "axis_name"), [("batch", 2, None), ("running", 1, layouts.AXIS)]
)
def test_all_reduces_of_a_layer(pivot, forward, axis_name):
    mesh = mesh_of(jax.devices())
    counts = [
        count_collectives(compile_sharded(Chain(layers, pivot, axis_name), mesh, forward_only=True))
        for layers in (1, 2)
    ]
    # A guard that fires takes two more, in a branch. The last layer's value is used nowhere but
    # in the loss, which costs one more all-reduce in plain jit: the difference is one layer's.
    assert counts[1]["all-reduce"] - counts[0]["all-reduce"] == forward
    assert set(counts[1]) == {"all-reduce"}


@every_pair(pivot=["batch", "running"], saving=[False, True], axis_name=[None, layouts.AXIS])
def test_all_reduces_of_a_step_grow_linearly(pivot, saving, axis_name):
    per_layer = {"batch": 3, "running": 2}[pivot]
    many = {"batch": 8, "running": 4}[pivot] if saving else 2
    mesh = mesh_of(jax.devices())
    one, two, *deep = (
        count_collectives(compile_sharded(Chain(layers, pivot, axis_name, saving), mesh))
        for layers in sorted({1, 2, many})
    )
    # Two forward (or one) and one backward, in which plain jit adds up the parameters' gradients
    # too. A rematerialized block repeats none of them in the backward pass.
    assert two["all-reduce"] - one["all-reduce"] == per_layer
    for last in deep:  # In a deep network XLA joins a few of them.
        assert last["all-reduce"] - one["all-reduce"] <= (many - 1) * per_layer
        assert set(last) == {"all-reduce"}
    assert set(one) == set(two) == {"all-reduce"}


@pytest.mark.parametrize(("by", "case"), [("jit", "weights"), ("shard_map", "mask per feature")])
def test_a_mask_costs_no_all_reduce(by, case):
    """The counts travel with the first sums."""
    x, dy, *_ = layouts.batch()
    axis_name = layouts.AXIS if by == "shard_map" else None

    def step(x, dy, where):
        def apply(x):
            return bnjax.batch_norm(x, where=where, axis_name=axis_name)

        y, pull_back, m = jax.vjp(apply, x, has_aux=True)
        return y, *pull_back(dy), m

    batch, mesh = P(layouts.AXIS), mesh_of(jax.devices())
    if axis_name is not None:
        out_specs = batch, batch, P()
        step = jax.shard_map(step, mesh=mesh, in_specs=(batch,) * 3, out_specs=out_specs)
    args = jax.device_put((x, dy, layouts.cases()[case]), NamedSharding(mesh, batch))
    assert count_collectives(jax.jit(step).lower(*args).compile()) == {"all-reduce": 3}


SCALE = """
import sys
sys.path.insert(0, {tests!r})
import jax
from collectives import Chain, count_collectives, compile_sharded, mesh_of, reduced_numbers
for devices in (8, 256):
    mesh = mesh_of(jax.devices()[:devices])
    for axis_name in (None, {axis_name!r}):
        compiled = compile_sharded(Chain(2, "batch", axis_name), mesh)
        print(reduced_numbers(compiled), count_collectives(compiled))
"""


def test_a_device_sends_as_much_among_256_as_among_8():
    code = SCALE.format(tests=str(Path(__file__).parent), axis_name=layouts.AXIS)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=256"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for eight, all_devices in (lines[::2], lines[1::2]):  # without a name, and with
        assert eight == all_devices
        assert int(eight.split()[0]) >= 2 * 2 * 4  # mean, variance of 4 features, 2 layers


def by_shard_map(f, axis_name, check_vma=False):
    """`f` of each replica, as `jax.pmap(f, axis_name)` has it."""

    def replica(*parts):
        return jax.tree.map(lambda a: a[None], f(*(part[0] for part in parts)))

    specs = {"in_specs": P(axis_name), "out_specs": P(axis_name), "check_vma": check_vma}
    return jax.jit(jax.shard_map(replica, mesh=mesh_of(jax.devices()), **specs))


def moments_of(transform, groups=None, axis_name=layouts.AXIS):
    x, *_ = layouts.batch(ratio=1e4)
    parts = x.reshape(layouts.DEVICES, -1, x.shape[-1])
    measure = functools.partial(bnjax.moments, axis_name=axis_name, axis_index_groups=groups)
    return parts, transform(measure, axis_name=layouts.AXIS)(parts)


@pytest.mark.parametrize(
    ("groups", "transform"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], by_shard_map),
        ([[0, 7], [1, 6], [2, 5], [3, 4]], jax.pmap),
    ],
)
def test_groups_have_statistics_and_gradients_of_their_own(groups, transform):
    parts, m = moments_of(transform, groups)
    dys = layouts.batch()[1].reshape(parts.shape)

    def pull_back(x, dy):
        settings = {"axis_name": layouts.AXIS, "axis_index_groups": groups}
        return jax.vjp(lambda x: bnjax.batch_norm(x, **settings)[0], x)[1](dy)[0]

    dx = np.asarray(transform(pull_back, axis_name=layouts.AXIS)(parts, dys))
    for group in groups:
        rows, dy = (np.concatenate([a[i] for i in group]) for a in (parts, dys))
        whole = reference.moments(rows)
        right = reference.gradient(rows, dy).x.astype(float)
        np.testing.assert_allclose(np.concatenate([dx[i] for i in group]), right, atol=1e-5)
        for i in group:
            error = reference.wide(m.mean[i]) + reference.wide(m.remainder[i]) - whole.mean
            assert np.abs(error).max() < 1e-6
            np.testing.assert_allclose(m.var[i], whole.var.astype(float), rtol=2e-6)
            assert float(m.count[i]) == whole.count[0]


def test_groups_under_a_checked_shard_map_say_what_to_do_instead():
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(NotImplementedError) as error:
        moments_of(functools.partial(by_shard_map, check_vma=True), groups)
    assert str(error.value) == (
        f"axis_index_groups is {groups}, and JAX has no groups under this transformation. "
        "Use jax.pmap or jax.shard_map(check_vma=False), or a mesh with one more axis."
    )


def test_a_second_mesh_axis_makes_groups():
    x, *_ = layouts.batch(ratio=1e4)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("group", "member"))
    measure = functools.partial(bnjax.moments, axis_name="member")
    f = jax.shard_map(
        lambda x: jax.tree.map(lambda a: a[None], measure(x)),
        mesh=mesh,
        in_specs=P(("group", "member")),
        out_specs=P("group"),
    )
    m = jax.jit(f)(x)
    for i, half in enumerate(np.split(np.asarray(x), 2)):
        np.testing.assert_allclose(m.var[i], reference.moments(half).var.astype(float), rtol=2e-6)


def test_several_axes_are_one():
    x, *_ = layouts.batch(ratio=1e4)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    measure = functools.partial(bnjax.moments, axis_name=("a", "b"))
    m = jax.shard_map(measure, mesh=mesh, in_specs=P(("a", "b")), out_specs=P())(x)
    np.testing.assert_allclose(m.var, reference.moments(x).var.astype(float), rtol=2e-6)
    assert m.count == len(x)


def test_a_misspelled_axis_is_an_error():
    with pytest.raises(
        NameError, match=r"^axis_name is 'replica', but no such axis is mapped here"
    ):
        moments_of(jax.pmap, axis_name="replica")


@every_pair(
    by=["batch", "batch and height", "features"],
    masked=[False, True],
    axis_type=[AxisType.Auto, AxisType.Explicit],
)
def test_images_sharded_by(by, masked, axis_type):
    of_x, of_features = {
        "batch": (P("a"), P()),
        "batch and height": (P("a", "b"), P()),
        "features": (P("a", None, None, "b"), P("b")),
    }[by]
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 8, 4, 6, 16)).astype(np.float32)
    x = x + 100
    scale, bias = rng.standard_normal((2, 16)).astype(np.float32)
    where = rng.random((8, 4, 1, 1)) < 0.7 if masked else None
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    specs = of_x, of_x, P(*of_x[:2]) if masked else None, of_features, of_features
    with jax.set_mesh(mesh):
        shardings = [None if s is None else NamedSharding(mesh, s) for s in specs]
        args = jax.tree.map(jax.device_put, [x, dy, where, scale, bias], shardings)
        compiled = jax.jit(layouts.step).lower(*args).compile()
        result = compiled(*args)
    whole = [a.reshape(-1, 16) for a in (x, dy)]
    where = np.broadcast_to(where, (8, 4, 6, 1)).reshape(-1, 1) if masked else None
    flat = *(np.asarray(a).reshape(-1, 16) for a in result[:2]), *result[2:]
    assert_is_whole_batch(flat, *whole, where, scale, bias)
    assert set(count_collectives(compiled)) == {"all-reduce"}


@pytest.mark.parametrize(
    ("layer", "check_vma", "masked"), [(linen_layer, True, True), (nnx_layer, False, False)]
)
def test_layers_under_shard_map(layer, check_vma, masked):
    x, dy, scale, bias = layouts.batch(ratio=1e4)
    where = layouts.cases()["one replica masked"] if masked else None

    def step(x, dy, where, scale, bias):
        run = functools.partial(layer, axis_name=layouts.AXIS, where=where)
        out, (dx, dscale, dbias) = pull_back(run, x, scale, bias, dy)
        if not check_vma:
            dscale, dbias = jax.lax.psum((dscale, dbias), layouts.AXIS)
        return out, dx, dscale, dbias

    batch, whole = P(layouts.AXIS), P()
    f = jax.shard_map(
        step,
        mesh=mesh_of(jax.devices()),
        in_specs=(batch, batch, batch if masked else None, whole, whole),
        out_specs=(Step(batch, whole, whole), batch, whole, whole),
        check_vma=check_vma,
    )
    out, *grads = jax.jit(f)(x, dy, where, scale, bias)
    whole_batch = reference.moments(x, where=where)
    assert np.abs(reference.wide(out.mean) - whole_batch.mean).max() < 1e-7 * 1e4
    # A running mean has no remainder, so it is compared by itself.
    m = bnjax.Moments(whole_batch.mean, out.var, whole_batch.count)
    assert_is_whole_batch((out.y, *grads, m), x, dy, where, scale, bias)


@pytest.mark.parametrize(
    ("layer", "spec", "axis_type"),
    [
        (linen_layer, P(None, "a"), AxisType.Explicit),
        (nnx_layer, P("a"), AxisType.Explicit),
        (nnx_layer, P(None, "a"), AxisType.Auto),
    ],
)
def test_layers_on_a_mesh(layer, spec, axis_type):
    """Parameters and statistics are replicated, also where the input's features are not."""
    x, dy, scale, bias = layouts.batch(features=8)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put((x, dy), NamedSharding(mesh, spec))
        out, grads = jax.jit(functools.partial(pull_back, layer))(
            sharded[0], scale, bias, sharded[1]
        )
    m = bnjax.Moments(out.mean, out.var, reference.moments(x).count)
    assert_is_whole_batch((out.y, *grads, m), x, dy, None, scale, bias)
