"""The programs that the search looks for errors in: what is computed, and how it is laid out.

A form is a training step on one batch, `step(x, where, given, axis_name) -> y, moments`, with what
it should give in longdouble. A layout says on which devices its batch lies. Together with what the
program returns they decide how XLA fuses it, and so whether a mean may be rounded in two ways.
"""

import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx

AXIS = "replicas"
PIVOTS = typing.get_args(typing.get_type_hints(bnjax.linen.BatchNorm)["pivot"])
GROUP_SIZE = 2  # of features that are whitened together
PARTS = 3  # ghost batches, steps of a scan, batches that are merged
LIMITS = {"r_max": 1.5, "d_max": 0.25}  # some features reach them, others do not


class Given(NamedTuple):
    """What a program gets beside the batch: estimates of its statistics, bad ones, others'."""

    mean: Any
    var: Any
    far: Any
    means: Any
    vars: Any


# What is expected


def batch_norm(x, dy, where, given):
    """The output and the gradient of sum(dy * y) with respect to x, in longdouble."""
    return reference.batch_norm(x, where=where), reference.gradient(x, dy, where=where).x


def renormalized(x, dy, where, given):
    m = reference.moments(x, where=where)
    mean, sigma = (
        reference.wide(p) for p in (given.mean, np.sqrt(reference.wide(given.var) + 1e-5))
    )
    r = np.clip(np.sqrt(m.var + 1e-5) / sigma, 1 / LIMITS["r_max"], LIMITS["r_max"])
    d = np.clip((m.mean - mean) / sigma, -LIMITS["d_max"], LIMITS["d_max"])
    y, dx = batch_norm(x, dy, where, given)
    return y * r + d, dx * r


def whitened(x, dy, where, given):
    return reference.whiten(x, dy, GROUP_SIZE, where=where)


def merged(x, dy, where, given):
    """With the moments of two batches, of 5 and 7 values, that x has no part in."""
    (mean_a, mean_b), (var_a, var_b) = map(reference.wide, (given.means, given.vars))
    mean, gap = (5 * mean_a + 7 * mean_b) / 12, mean_b - mean_a
    var = (5 * var_a + 7 * var_b) / 12 + gap**2 * 35 / 144
    y = reference.normalize(x, mean, var)
    return y, reference.wide(dy) / np.sqrt(var + 1e-5)


# Steps


def apply_measured(measure, apply):
    """Measure, then apply."""

    def step(x, where, given, axis_name):
        m = measure(x, where, given, axis_name)
        return apply(x, m, where=where), m

    return step


def plain(x, where, given, axis_name):
    return bnjax.batch_norm(x, where=where, axis_name=axis_name)


def about_a_pivot(x, where, given, axis_name):
    return bnjax.batch_norm(x, where=where, axis_name=axis_name, pivot=given.mean)


def about_a_bad_pivot(x, where, given, axis_name):
    return bnjax.batch_norm(x, where=where, axis_name=axis_name, pivot=given.far)


def on_a_map(step):
    """The same on images of 4 x 4 positions."""

    def mapped(x, where, given, axis_name):
        y, m = step(x.reshape(-1, 4, 4, x.shape[-1]), where, given, axis_name)
        return y.reshape(x.shape), m

    return mapped


def renorm(x, where, given, axis_name):
    running = bnjax.Moments(given.mean, given.var)
    return bnjax.batch_renorm(x, running, where=where, axis_name=axis_name, **LIMITS)


def measure_and_pmerge(x, where, given, axis_name):
    return bnjax.pmerge(bnjax.moments(x, where=where), axis_name)


def covariance(x, where, given, axis_name):
    return bnjax.cov_moments(x, group_size=GROUP_SIZE, where=where, axis_name=axis_name)


def merge(x, where, given, axis_name):
    parts = np.split(np.arange(len(x)), [len(x) // 3])
    return bnjax.merge(*(bnjax.moments(x[p]) for p in parts))


def merge_without_remainders(x, where, given, axis_name):
    counts = (5.0, 7.0)
    a, b = (bnjax.Moments(*p) for p in zip(given.means, given.vars, counts, strict=True))
    return bnjax.merge(a, b)


def merge_stacked(x, where, given, axis_name):
    return bnjax.merge_stacked(jax.vmap(bnjax.moments)(in_parts(x)))


def merge_in_a_scan(x, where, given, axis_name):
    none = bnjax.Moments(*(jnp.full(x.shape[1:], p) for p in (0.0, 1.0, 0.0, 0.0)))
    return jax.lax.scan(lambda m, x: (bnjax.merge(m, bnjax.moments(x)), None), none, in_parts(x))[0]


def scan(x, where, given, axis_name):
    def one(running, x):
        y, m = bnjax.batch_norm(x)
        return bnjax.ema(running, m, momentum=0.9), y

    start = bnjax.Moments(given.mean, given.var, 0.0, jnp.zeros_like(given.mean))
    running, y = jax.lax.scan(one, start, in_parts(x))
    return y.reshape(x.shape), running


def scan_of_layers(x, where, given, axis_name):
    def one(stats, x):
        y, stats = linen(bnjax.linen.BatchNorm)(x, None, given._replace(**stats), None)
        return stats, y

    stats, y = jax.lax.scan(one, {"mean": given.mean, "var": given.var}, in_parts(x))
    return y.reshape(x.shape), stats


def in_parts(x):
    return x.reshape(PARTS, -1, *x.shape[1:])


def linen(kind, ghosts=1, state="mean", **fields):
    """A training call of a linen layer, whose running mean is near the batch's, or far."""

    def step(x, where, given, axis_name):
        size = {"ghost_batch_size": len(x) // ghosts} if ghosts > 1 else {}
        layer = kind(False, axis_name=axis_name, use_scale=False, use_bias=False, **fields, **size)
        stats = {"mean": getattr(given, state), "var": given.var}
        if "group_size" in fields:
            del stats["var"]
            groups = given.var.reshape(-1, fields["group_size"])
            stats["cov"] = jax.vmap(jnp.diag)(groups)
        y, updates = layer.apply({"batch_stats": stats}, x, mask=where, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    return step


def nnx_layer(kind, state="mean", **fields):
    """A training call of an NNX layer, whose running mean is near the batch's, or far."""

    def step(x, where, given, axis_name):
        sizes, rngs = x.shape[-1], nnx.Rngs(0)
        unscaled = {"use_scale": False, "use_bias": False}
        layer = kind(sizes, axis_name=axis_name, rngs=rngs, **unscaled, **fields)
        layer.mean[...], layer.var[...] = jnp.asarray(getattr(given, state)), jnp.asarray(given.var)
        y = layer(x, mask=where)
        return y, {"mean": layer.mean[...], "var": layer.var[...]}

    return step


class Form(NamedTuple):
    """A step, what it should give, and what it needs."""

    step: Callable[..., tuple[Any, Any]]
    expected: Callable[..., tuple[Any, Any]] = batch_norm
    where: str | None = None  # "mask", "mask per feature", "weights"
    constant: bool = False  # whether what is given is known to the compiler
    parts: int = 1  # that are normalized each by itself
    divisor: int = 1  # of the number of features
    rows: int = 1  # that make an example


plainly = functools.partial(apply_measured, apply=bnjax.normalize)
whitening = {"expected": whitened, "divisor": GROUP_SIZE}
layers = {
    f"{wing}, {pivot}{far}": layer(module.BatchNorm, pivot=pivot, state=state)
    for wing, layer, module in (("linen", linen, bnjax.linen), ("nnx", nnx_layer, bnjax.nnx))
    for pivot in PIVOTS
    for far, state in (("", "mean"), (", bad", "far"))
}
FORMS = {  # on one batch, which may lie on several devices
    "plain": Form(plain),
    "masked": Form(plain, where="mask"),
    "masked per feature": Form(plain, where="mask per feature"),
    "weighted": Form(plain, where="weights"),
    "pivot": Form(about_a_pivot),
    "constant pivot": Form(about_a_pivot, constant=True),
    "masked, constant pivot": Form(about_a_pivot, where="mask", constant=True),
    "bad pivot": Form(about_a_bad_pivot),
    "map": Form(on_a_map(plain), rows=16),
    "map, bad pivot": Form(on_a_map(about_a_bad_pivot), rows=16),
    "map, linen": Form(on_a_map(linen(bnjax.linen.BatchNorm)), rows=16),
    "map, linen, bad": Form(on_a_map(linen(bnjax.linen.BatchNorm, state="far")), rows=16),
    "renorm": Form(renorm, renormalized),
    "normalize, CovMoments": Form(plainly(covariance), divisor=GROUP_SIZE),
    "whiten": Form(apply_measured(covariance, bnjax.whiten), **whitening),
    "masked whiten": Form(apply_measured(covariance, bnjax.whiten), where="mask", **whitening),
    **{name: Form(step) for name, step in layers.items()},
    **{f"masked {name}": Form(step, where="mask") for name, step in layers.items()},
    "linen, ghosts": Form(linen(bnjax.linen.BatchNorm, ghosts=PARTS), parts=PARTS),
    "linen, renorm": Form(linen(bnjax.linen.BatchRenorm, **LIMITS), renormalized),
    "nnx, renorm": Form(nnx_layer(bnjax.nnx.BatchRenorm, **LIMITS), renormalized),
    "linen, whiten": Form(
        linen(bnjax.linen.DecorrelatedBatchNorm, group_size=GROUP_SIZE), **whitening
    ),
}
MAPPED_FORMS = {"pmerge": Form(plainly(measure_and_pmerge))}  # need a mapped axis
WHOLE_FORMS = {  # have parts of their own, on one device
    "merge": Form(plainly(merge)),
    "merge, no remainders": Form(plainly(merge_without_remainders), merged),
    "merge_stacked": Form(plainly(merge_stacked)),
    "merge in a scan": Form(plainly(merge_in_a_scan)),
    "scan": Form(scan, parts=PARTS),
    "scan, linen": Form(scan_of_layers, parts=PARTS),
}


# Layouts: `layout(f, replicas)(x, dy, where, given)` puts whole arrays in, and takes them out


def jit(f, replicas):
    return jax.jit(functools.partial(f, axis_name=None))


def mapped(transform):
    def layout(f, replicas):
        def split(a):
            return None if a is None else a.reshape(replicas, -1, *a.shape[1:])

        def run(x, dy, where, given):
            axes = (0, 0, None if where is None else 0, None)
            g = transform(functools.partial(f, axis_name=AXIS), in_axes=axes, axis_name=AXIS)
            out = dict(g(*map(split, (x, dy, where)), given))
            out |= {k: out[k].reshape(x.shape) for k in ("y", "dx") if k in out}
            return out | {k: jax.tree.map(lambda a: a[0], out[k]) for k in out if k == "m"}

        return run

    return layout


def shard_map(check_vma):
    def layout(f, replicas):
        def replica(*args):
            out = f(*args, axis_name=AXIS)
            return out | {k: jax.tree.map(lambda a: a[None], out[k]) for k in out if k == "m"}

        def run(x, dy, where, given):
            g = jax.shard_map(
                replica,
                mesh=Mesh(np.array(jax.devices()[:replicas]), (AXIS,)),
                in_specs=(P(AXIS), P(AXIS), None if where is None else P(AXIS), P()),
                out_specs=P(AXIS),
                check_vma=check_vma,
            )
            out = jax.jit(g)(x, dy, where, given)
            return out | {k: jax.tree.map(lambda a: a[0], out[k]) for k in out if k == "m"}

        return run

    return layout


def mesh(axis_type):
    def layout(f, replicas):
        mesh = jax.make_mesh((replicas,), (AXIS,), axis_types=(axis_type,))
        over, whole = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
        f = jax.jit(functools.partial(f, axis_name=None))

        def run(x, dy, where, given):
            with jax.set_mesh(mesh):
                batch = jax.device_put((x, dy, where), over)
                return f(*batch, jax.device_put(given, whole))

        return run

    return layout


MAPPED = {
    "vmap": mapped(lambda f, **axes: jax.jit(jax.vmap(f, **axes))),
    "pmap": mapped(jax.pmap),
    "shard_map": shard_map(check_vma=True),
    "shard_map, unchecked": shard_map(check_vma=False),
}
MESHES = {
    "automatic mesh": mesh(AxisType.Auto),
    "explicit mesh": mesh(AxisType.Explicit),
}
LAYOUTS = {"jit": jit} | MAPPED | MESHES


def all_programs():
    """The pairs of form and layout, by name."""
    pairs = [(form, layout) for form in FORMS for layout in LAYOUTS]
    pairs = [pair for pair in pairs if FORMS[pair[0]].parts == 1 or pair[1] not in MESHES]
    pairs += [(form, layout) for form in MAPPED_FORMS for layout in MAPPED]
    pairs += [(form, "jit") for form in WHOLE_FORMS]
    return pairs
