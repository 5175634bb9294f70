"""Derivatives of every order, forward and in reverse, beside those of the textbook's formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import bnjax

# Of float64, whose last digits nobody asks for: sooner compiled.
PLAIN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def textbook(x, scale=1.0, bias=0.0, *, where=1.0, epsilon=1e-5, **_):
    """Batch normalization in so many words, whose derivatives are JAX's; features come last."""
    axes, w = tuple(range(x.ndim - 1)), jnp.broadcast_to(jnp.asarray(where, float), x.shape)
    mean = jnp.average(x, axes, w, keepdims=True)
    var = jnp.average(jnp.abs(x - mean) ** 2, axes, w, keepdims=True)
    scale, bias = (jnp.broadcast_to(p, x.shape) for p in (scale, bias))
    y = (x - mean) / jnp.sqrt(var + epsilon) * scale + bias
    return y, bnjax.Moments(mean.squeeze(axes), var.squeeze(axes))


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
