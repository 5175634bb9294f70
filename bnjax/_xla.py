"""What is there for a compiler's sake: without it time, memory or digits are lost.

| trick | backend | why | test |
|---|---|---|---|
| `once` | CPU, from JAX 0.10 | loops over elements repeat arithmetic on features | test_memory |
| `value_once` | CPU, from JAX 0.10 | the same, and its cotangent needs no kernel | test_memory |
| `rsqrt` | all | a quotient in its derivative is one kernel more | test_memory |
| `apart` | CPU, from JAX 0.10 | a difference that two sums share is written out | test_memory |
| `recomputed`, `derivative` | TPU, GPU | a checkpoint has barriers on cotangents | test_compiled |
| their barrier | CPU, from JAX 0.10 | x - c of the forward pass would be kept | test_memory |
| `saved` and the policy | all | else rematerialization repeats sums, collectives | test_memory |
| `blocked_product` | CPU | products of small matrices are added row by row | test_whiten |
| the programs of `_sums.py` | each | as few reads of x as can be | test_sums, test_compiled |

The test is the one that fails without the trick.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Moving = dict[int, Any]
MOMENTS_NAME = "bnjax_moments"  # what policies of `jax.checkpoint` know the statistics by
EXACT = lax.Precision.HIGHEST  # accelerators round the factors of a product to 16 bits otherwise


forced: str | None = None  # "cpu", "gpu" or "tpu": whose programs run, whatever backend it is


def per_backend(
    *args: Any, cpu: Callable[..., Any], gpu: Callable[..., Any], tpu: Callable[..., Any]
) -> Any:
    """One of these of the arguments, chosen when the program is lowered. Others count as a TPU."""
    if forced is not None:  # by tests, which have but a CPU
        return {"cpu": cpu, "gpu": gpu, "tpu": tpu}[forced](*args)
    return lax.platform_dependent(*args, cpu=cpu, cuda=gpu, rocm=gpu, default=tpu)


def once(given: Array, *vs: Array) -> tuple[Array, ...]:
    """vs, computed once for each feature and not again for each element; so are their tangents.

    XLA's CPU backend copies cheap arithmetic on features into its loops over all elements, where
    it can cost more than reading x (tests/bench/NOTES.md). A division is too dear for that. By
    a one that XLA cannot see (two where `given` is NaN) it is exact.
    """
    if jax.__version_info__ < (0, 10):  # the saving policy would pay for it with memory
        return vs
    # Not `jnp.where`: jax2onnx replaces that, and JAX remembers what it traced for an export.
    one, two = (lax.full_like(given, n, np.int32) for n in (1, 2))
    ones = lax.select(lax.stop_gradient(given) >= jnp.finfo(given.dtype).min, one, two)
    ones = ones.astype(jnp.finfo(vs[0].dtype).dtype)
    # A complex division is not exact.
    return tuple(v if jnp.iscomplexobj(v) else v / ones for v in vs)


@jax.custom_jvp
def value_once(given: Array, v: Array) -> Array:
    """The same for v alone: its cotangent is a sum over all elements, which lies in memory.

    What has not the shape of `given`, because of a scale for each example, is left.
    """
    return once(given, v)[0] if v.shape == given.shape else v


@value_once.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return value_once(*primals), tangents[1]


def apart(c: Array) -> tuple[Array, Array]:
    """c twice, which XLA does not see to be the same, and computed once for each feature.

    For its CPU backend alone: elsewhere the ones would be kernels of their own.
    """
    if jnp.iscomplexobj(c) or jax.__version_info__ < (0, 10):
        return c, c
    ones = lax.optimization_barrier(jnp.ones((2, *c.shape), c.dtype))
    return c / ones[0], c / ones[1]


@jax.custom_jvp
def rsqrt(v: Array) -> Array:
    """1 / sqrt(v), with the derivative as a product, -r^3 / 2: JAX's has a quotient."""
    return lax.rsqrt(v)


@rsqrt.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    r = rsqrt(*primals)
    return r, -0.5 * tangents[0] * r * r * r


def recomputed(f: Callable[..., Any]) -> Callable[..., Any]:
    """f(x, c, ...), whose derivative starts again from its arguments: they alone are kept.

    As `jax.checkpoint`, but for the barrier that that has around cotangents: it would keep the
    backward sums from being fused with what makes dy.
    """
    g = jax.custom_jvp(f)

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        # In one, so that a policy around it keeps the arguments once.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def both(primals: tuple[Any, ...], moving: Moving) -> Any:
            return g(*primals), _tangent(f, primals, moving)

        return both(primals, moving_of(tangents))

    g.defjvp(rule, symbolic_zeros=True)
    return g


def derivative(f: Callable[..., Any], primals: tuple[Any, ...], moving: Moving) -> Any:
    """The derivative of f(x, c, ...), of which nothing but the primals is kept."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def linear(primals: tuple[Any, ...], moving: Moving) -> Any:
        return _tangent(f, primals, moving)

    return linear(primals, moving)


def moving_of(tangents: tuple[Any, ...]) -> Moving:
    """The tangents that are not zero, by the number of their argument."""
    return {i: t for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero | None)}


def _tangent(f: Callable[..., Any], primals: tuple[Any, ...], moving: Moving) -> Any:
    args = dict(enumerate((*_fenced(*primals[:2]), *primals[2:])))

    def of_moving(moved: Moving) -> Any:
        return f(*(args | moved).values())

    return jax.jvp(of_moving, [{i: args[i] for i in moving}], [moving])[1]


def _fenced(x: Array, c: Array) -> tuple[Array, Array]:
    """x and c, which XLA's CPU backend does not know to be the forward pass's.

    It would bring x - c from there and hold it. Elsewhere a barrier would cost a pass.
    """
    if varies(x) != varies(c):  # behind one barrier both would vary over the same mapped axes
        return x, c

    def as_it_is(x: Array, c: Array) -> tuple[Array, Array]:
        return x, c

    def barrier(x: Array, c: Array) -> tuple[Array, Array]:
        return lax.optimization_barrier((x, c))

    return per_backend(x, c, cpu=barrier, gpu=as_it_is, tpu=as_it_is)


def varies(x: Array) -> Any:
    """Over which mapped axes, where `shard_map` checks that."""
    kind = jax.typeof(x)
    return getattr(kind, "vma", None) or getattr(kind, "manual_axis_type", None)  # from JAX 0.10


def saved(tree: Any) -> Any:
    """The same, by the name that policies know: what a reduction or a collective gave."""
    return jax.tree.map(lambda a: checkpoint_name(a, MOMENTS_NAME), tree)


def convs_and_dots_saveable(prim: Any, *args: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`, `nn.remat` and `nnx.remat`, best around a residual block.

    Saves what convolutions and matrix products give and the moments of batch normalization
    (tagged `bnjax.MOMENTS_NAME`), and recomputes the rest: the backward pass repeats no
    convolution, no reduction over the batch and no collective. Policies of one's own can
    name the tag too, as in `jax.checkpoint_policies.save_only_these_names`.

    What it frees in a compiled step is the compiler's to say: on a GPU what activations give,
    on a CPU that from JAX 0.12 on, and on a TPU nothing, where no activation is kept anyway.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> def block(x, kernel):
      ...     return x + jax.nn.relu(bnjax.batch_norm(x @ kernel)[0])
      >>> saving = jax.checkpoint(block, policy=bnjax.convs_and_dots_saveable)
      >>> x, kernel = jnp.arange(6.0).reshape(3, 2), jnp.eye(2)
      >>> print(bool(jnp.all(saving(x, kernel) == block(x, kernel))))
      True
    """
    if prim is lax.conv_general_dilated_p or prim is lax.dot_general_p:
        return True
    return bool(_names_moments(prim, *args, **params))


_names_moments = jax.checkpoint_policies.save_only_these_names(MOMENTS_NAME)


def sharded_axes(x: Array) -> list[int]:
    """Those that lie on an explicit mesh: JAX neither slices nor splits them."""
    return [i for i, name in enumerate(jax.typeof(x).sharding.spec) if name is not None]


def blocked_product(a: Array, b: Array) -> Array:
    """sum of a b^T over all rows of `[groups, *rows, size]`, added up block by block.

    XLA's CPU backend multiplies small matrices row by row: over 65536 rows a covariance of two
    features with condition number 1e3 is off by 7e-3, in blocks by 4e-5. First a power of two
    of blocks, which a sharded batch divides into evenly; then parts of them, padded with zeros.
    A free number of rows, as `jax.export` knows them, is cut into parts of one length.
    """
    groups, *rows, size = a.shape
    if sharded_axes(a):  # no reshaping
        axes = tuple(range(1, a.ndim - 1))
        whole = NamedSharding(jax.typeof(a).sharding.mesh, P(None, None, None))
        numbers = ((axes, axes), ((0,), (0,)))
        return lax.dot_general(a, b, numbers, precision=EXACT, out_sharding=whole)
    n, blocks, length = math.prod(rows), 1, max(32, 8 * size)
    if isinstance(n, int):
        while n % (2 * blocks) == 0 and n // (2 * blocks) >= length:
            blocks *= 2
        length = -(-(n // blocks) // max(n // blocks // length, 1))
    parts = -(-(n // blocks) // length)
    spare = parts * length - n // blocks
    a, b = (p.reshape(groups, blocks, n // blocks, size) for p in (a, b))
    if not isinstance(spare, int) or spare:
        a, b = (jnp.pad(p, ((0, 0), (0, 0), (0, spare), (0, 0))) for p in (a, b))
    a, b = (p.reshape(groups, blocks * parts, length, size) for p in (a, b))
    return jnp.sum(jnp.einsum("gbni,gbnj->gbij", a, b, precision=EXACT), 1)
