"""Derivatives of every order, forward and in reverse, beside those of the textbook's formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import bnjax

# Of float64, whose last digits nobody asks for: sooner compiled.
PLAIN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def textbook(x, scale=1.0, bias=0.0, *, where=None, epsilon=1e-5, **_):
    """Batch normalization in so many words, whose derivatives are JAX's; features come last."""

    def mean_of(a):
        w = jnp.broadcast_to(1 if where is None else where, a.shape).astype(a.dtype)
        return jnp.average(a, tuple(range(a.ndim - 1)), w, keepdims=True)

    mean = mean_of(x)
    var = mean_of(jnp.abs(x - mean) ** 2)
    scale, bias = (jnp.broadcast_to(p, x.shape) for p in (scale, bias))
    y = (x - mean) * (scale / jnp.sqrt(var + epsilon)).astype(x.dtype) + bias.astype(x.dtype)
    return y, bnjax.Moments(mean.ravel(), var.ravel())


def assert_derivatives(f, given, chains):
    """Of f(bnjax.batch_norm, *given): real outputs, weighted at random, in a random direction.

    A chain has one letter for each time that it is differentiated: "f"orward or in "r"everse.
    """
    rng = np.random.default_rng(0)
    along = tuple(rng.standard_normal(np.shape(a)) for a in given)

    def forward(f):
        return lambda *given: jax.jvp(f, given, along)[1]

    def reverse(f):
        everywhere = tuple(range(len(along)))
        return lambda *given: sum(map(jnp.vdot, jax.grad(f, everywhere)(*given), along))

    def weighted(batch_norm):
        def total(*given):
            weights = np.random.default_rng(1)
            outputs = jax.tree.leaves(f(batch_norm, *given))
            return sum(jnp.vdot(weights.standard_normal(np.shape(a)), a) for a in outputs)

        return total

    @functools.partial(jax.jit, compiler_options=PLAIN)
    def derivatives(*given):
        modes = {"f": forward, "r": reverse}
        return [
            [
                functools.reduce(lambda f, m: modes[m](f), chain, weighted(norm))(*given)
                for chain in chains
            ]
            for norm in (bnjax.batch_norm, textbook)
        ]

    with jax.enable_x64(True):
        np.testing.assert_allclose(*derivatives(*given), rtol=1e-9)
