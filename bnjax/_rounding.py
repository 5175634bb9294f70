"""Arithmetic that keeps what rounding loses, also after XLA has rearranged it."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and what rounding lost of it (Knuth, 1969), a constant to autodiff.

    The barriers keep XLA from simplifying the loss to zero.
    """
    s = lax.optimization_barrier(a + b)
    a, b, high = lax.stop_gradient((a, b, s))
    moved = lax.optimization_barrier(high - a)
    return s, (a - (high - moved)) + (b - moved)


def near(c: Array, drop: int = 1) -> Array:
    """A constant near c that has the same value wherever it is used.

    XLA copies the division that made c into each fusion, where x - c may become one fused
    multiply-add that never rounds c. With `drop` mantissa bits less there is nothing to fuse.
    """
    c = lax.stop_gradient(c)
    kind = jnp.finfo(c.dtype)
    rounded = functools.partial(
        lax.reduce_precision, exponent_bits=kind.nexp, mantissa_bits=kind.nmant - drop
    )
    if jnp.iscomplexobj(c):
        return lax.complex(rounded(lax.real(c)), rounded(lax.imag(c)))
    return rounded(c)


def once(v: Array) -> Array:
    """v, computed once for each feature and not again for each element.

    XLA copies cheap arithmetic on features into its loops over all elements, where it can cost
    more than reading x (tests/bench/NOTES.md). A division is too dear for that. By a one that
    XLA cannot see it is exact, and remains a division, as does its derivative's.
    """
    if jnp.iscomplexobj(v):  # whose division is not exact
        return v
    if jax.__version_info__ < (0, 10):  # the saving policy would pay for it with memory
        return v
    return v / lax.optimization_barrier(jnp.ones_like(v))


def abs2(z: Array) -> Array:
    """|z|^2, real."""
    return jnp.real(z * jnp.conj(z))


def real_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype of a variance: float32 for complex64, and so on."""
    return jnp.finfo(dtype).dtype
