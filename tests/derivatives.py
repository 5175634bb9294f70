"""Derivatives to any order, against central differences of those one order below."""

import jax
import numpy as np

STEP = 1e-4 / 2
TOLERANCE = 1e-5
# Sooner compiled; what float64 loses in other machine code is far below the tolerance.
PLAIN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def assert_derivatives(f, args, order, mode):
    """What `jax.test_util.check_grads` asserts, of float64 arrays, in one program for all orders.

    F_0 = f, and of random v and c

      F_k = (F_k-1, F_k-1' v)  forward,  F_k = (F_k-1, c F_k-1')  in reverse
    """
    above = {"fwd": _push_forward, "rev": _pull_back}[mode]
    for k in range(order):
        f = above(f, k)
    f = jax.jit(f, compiler_options=PLAIN)

    def values(args):
        return jax.tree.map(np.asarray, f(*args))

    here = values(args)
    for k in reversed(range(order)):
        v = _random_like(args, k)
        sides = [jax.tree.map(lambda a, b, h=h: a + h * b, args, v) for h in (-STEP, STEP)]
        before, after = (_innermost(values(side), order - k) for side in sides)
        expected = jax.tree.map(lambda a, b: (b - a) / (2 * STEP), before, after)
        here, derivative = here
        if mode == "rev":
            derivative = _dot(derivative, v)
            expected = _dot(_random_like(here, k), expected)
        for pair in zip(jax.tree.leaves(derivative), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(*pair, rtol=TOLERANCE, atol=TOLERANCE)


def _push_forward(f, k):
    return lambda *args: jax.jvp(f, args, _random_like(args, k))


def _pull_back(f, k):
    def both(*args):
        out, pull = jax.vjp(f, *args)
        return out, pull(_random_like(out, k))

    return both


def _random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.standard_normal(np.shape(a)), tree)


def _innermost(pair, times):
    for _ in range(times):
        pair, _ = pair
    return pair


def _dot(a, b):
    return sum(np.vdot(*pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
