"""Arithmetic that keeps what rounding loses, also after XLA has rearranged it."""

import functools

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


def abs2(z: Array) -> Array:
    """|z|^2, real."""
    return jnp.real(z * jnp.conj(z))


def real_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype of a variance: float32 for complex64, and so on."""
    return jnp.finfo(dtype).dtype
