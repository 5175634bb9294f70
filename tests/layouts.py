"""One training step on the whole batch, laid out over eight devices in every way JAX has.

Each layout takes and returns whole arrays: `layout(x, dy, where, scale, bias)` gives the output,
the gradients of sum(dy * y), and the moments that each replica measured. `apply` may stand in for
`bnjax.batch_norm`, and `step` for the whole step. `assert_is_whole_batch` says that a layout
changes nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax

DEVICES = 8
AXIS = "replicas"
# mean / std and dtype of a batch
SETTINGS = {"float32": (0.0, jnp.float32), "1e4": (1e4, jnp.float32), "bf16": (0.0, jnp.bfloat16)}


def step(x, dy, where, scale, bias, axis_name=None, apply=bnjax.batch_norm):
    """On one replica: (y, dx, dscale, dbias, moments)."""
    apply = functools.partial(apply, where=where, axis_name=axis_name)
    y, pull, m = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, *pull(dy), m


def _shard(a):
    return None if a is None else np.asarray(a).reshape(DEVICES, -1, *a.shape[1:])


def _whole(result):
    """The replicas' results put together; each replica's gradients of parameters are added."""
    y, dx, dscale, dbias, m = jax.tree.map(np.asarray, result)
    y, dx = (a.reshape(-1, *a.shape[2:]) for a in (y, dx))
    return y, dx, dscale.sum(0), dbias.sum(0), jax.tree.map(lambda a: a[0], m)


def _mapped(transform):
    @functools.cache
    def program(step, masked, **applied):
        f = functools.partial(step, axis_name=AXIS, **applied)
        return transform(f, in_axes=(0, 0, 0 if masked else None, None, None), axis_name=AXIS)

    def layout(x, dy, where, scale, bias, step=step, **applied):
        f = program(step, where is not None, **applied)
        return _whole(f(*map(_shard, (x, dy, where)), scale, bias))

    return layout


def _shard_map(check_vma):
    @functools.cache
    def program(step, masked, **applied):
        def replica(x, dy, where, scale, bias):
            y, dx, dscale, dbias, m = step(x, dy, where, scale, bias, AXIS, **applied)
            if not check_vma:  # with the check JAX adds up the gradients of shared parameters
                dscale, dbias = jax.lax.psum((dscale, dbias), AXIS)
            return y, dx, dscale, dbias, m

        mesh = Mesh(np.array(jax.devices()[:DEVICES]), (AXIS,))
        batch = P(AXIS) if masked else None
        f = jax.shard_map(
            replica,
            mesh=mesh,
            in_specs=(P(AXIS), P(AXIS), batch, P(), P()),
            out_specs=(P(AXIS), P(AXIS), P(), P(), P()),
            check_vma=check_vma,
        )
        return jax.jit(f)

    def layout(x, dy, where, scale, bias, step=step, **applied):
        f = program(step, where is not None, **applied)
        return f(x, dy, where, scale, bias)

    return layout


def _jit(axis_type):
    @functools.cache
    def program(step, **applied):
        return jax.jit(functools.partial(step, **applied))

    def layout(x, dy, where, scale, bias, step=step, **applied):
        mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(axis_type,))
        over, whole = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
        shardings = over, over, None if where is None else over, whole, whole
        with jax.set_mesh(mesh):
            args = jax.tree.map(jax.device_put, (x, dy, where, scale, bias), shardings)
            return program(step, **applied)(*args)

    return layout


LAYOUTS = {
    "pmap": _mapped(jax.pmap),
    "vmap": _mapped(lambda f, **mapped: jax.jit(jax.vmap(f, **mapped))),
    "shard_map": _shard_map(check_vma=True),
    "shard_map, unchecked": _shard_map(check_vma=False),
    "jit, automatic": _jit(AxisType.Auto),
    "jit, explicit": _jit(AxisType.Explicit),
}


def cases(rows=64, features=6):
    """`name -> where`: what the replicas see of the batch."""
    rng = np.random.default_rng(1)
    uneven = rng.random((rows, 1)) < 0.6
    one_masked = uneven.copy()
    one_masked[: rows // DEVICES] = False
    return {
        "no mask": None,
        "uneven mask": uneven,
        "one replica masked": one_masked,
        "weights": (2 * rng.random((rows, 1))).astype(np.float32),
        "mask per feature": rng.random((rows, features)) < 0.7,
    }


def batch(ratio=0.0, dtype=jnp.float32, rows=64, features=6):
    """x of this mean / std, dy, scale and bias."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, rows, features))
    scale, bias = rng.standard_normal((2, features)).astype(np.float32)
    return (x + ratio).astype(dtype), dy.astype(dtype), scale, bias


def assert_is_whole_batch(result, x, dy, where, scale, bias):
    """Within 1e-5 of the largest value, and for bfloat16 output within its rounding.

    dx in bfloat16 is rounded three times: autodiff adds the gradient through the statistics and
    that past them in the dtype of x.
    """
    y, dx, dscale, dbias, m = jax.tree.map(reference.wide, result)
    whole = reference.moments(x, where=where)
    grad = reference.gradient(x, dy, reference.wide(scale), where=where)
    half_ulp = 2.0**-8 if result[0].dtype == jnp.bfloat16 else 0.0
    expected = reference.batch_norm(x, scale, bias, where=where)
    pairs = {
        "y": (y, expected, 1e-5 + half_ulp),
        "dx": (dx, grad.x, 1e-5 + 3 * half_ulp),
        "dscale": (dscale, grad.scale, 1e-5),
        "dbias": (dbias, grad.bias, 1e-5),
        "var": (m.var, whole.var, 1e-5),
    }
    for name, (ours, theirs, tolerance) in pairs.items():
        np.testing.assert_array_less(
            np.abs(ours - theirs), tolerance * np.abs(theirs).max() + 1e-30, err_msg=name
        )
    error = np.abs(m.mean + m.remainder - whole.mean) / np.sqrt(whole.var)
    assert error.max() < 1e-5
    np.testing.assert_allclose(np.broadcast_to(m.count, whole.count.shape), whole.count, rtol=1e-6)
