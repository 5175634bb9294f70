"""Arithmetic that keeps what rounding loses, also after XLA has rearranged it."""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def rounded(v: Array) -> Array:
    """v with one mantissa bit less: the same value in every fusion, and opaque to XLA.

    XLA copies the quotient that made v into each fusion that uses it. In one of them a sum with
    it becomes a fused multiply-add, which never rounds v; in another it is rounded, and the two
    differ in the last bit. What has been through `lax.reduce_precision` cannot be fused so, and
    (a + v) - a does not simplify to v.
    """
    kind = jnp.finfo(v.dtype)
    drop = functools.partial(
        lax.reduce_precision, exponent_bits=kind.nexp, mantissa_bits=kind.nmant - 1
    )
    if jnp.iscomplexobj(v):
        return lax.complex(drop(lax.real(v)), drop(lax.imag(v)))
    return drop(v)


def near(c: Array) -> Array:
    """A constant near c that has the same value wherever it is used: a pivot."""
    return rounded(lax.stop_gradient(c))


def total(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and what rounding lost of it (Dekker, 1971), a constant to autodiff.

    Both together are as exact as b is. Every mean that is a pivot and a quotient is formed here:
    it is one value, in whatever program it stands. The loss is a - s + b, by way of a number
    near s, as XLA would simplify that to zero.
    """
    s = a + rounded(b)
    a, b, high = lax.stop_gradient((a, b, s))
    by = rounded(high)
    return s, ((a - by) - (high - by)) + b


def moved(a: Array, rest: Array, step: Array) -> tuple[Array, Array]:
    """The sum a + rest of `total` after a step: to the last bit the same one after a step of 0."""
    stays = lax.stop_gradient(step) == 0
    s, lost = total(a, jnp.where(stays, step, rest + step))
    return s, jnp.where(stays, rest, lost)


def abs2(z: Array) -> Array:
    """|z|^2, real."""
    return jnp.real(z * jnp.conj(z))


def real_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype of a variance: float32 for complex64, and so on."""
    return jnp.finfo(dtype).dtype
