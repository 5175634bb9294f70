"""What the card does without any layer: how fast it copies, and what waiting branches cost it.

Prints a line of JSON. A `lax.cond` that decides on the card may wait for the host, so it is
timed between passes over memory, where there is something to wait for.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

LAYERS = 53  # as many as ResNet-50 has
ROUNDS, CALLS = 7, 5


def main() -> None:
    cpu = jax.default_backend() == "cpu"
    copied = jnp.ones(2 ** (24 if cpu else 28))
    (seconds,) = median_seconds([lambda x: x + 1], copied)
    inputs = [jnp.ones((rows, 64)) for rows in (2**8, 2**12 if cpu else 2**18)]
    facts = {
        "device": "cpu" if cpu else jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_bytes_per_second": 2 * copied.nbytes / seconds,
        "conditionals": [{"bytes": x.nbytes, "seconds": conditional_seconds(x)} for x in inputs],
    }
    print(json.dumps(facts))


def conditional_seconds(x: Array) -> float:
    """What one branch adds that is there and not taken."""
    # Arguments: about a constant XLA would compute both branches, and select.
    pivots = jnp.zeros((LAYERS, x.shape[1]))
    straight, branching = (functools.partial(chain, branch=branch) for branch in (False, True))
    without, with_branches = median_seconds([straight, branching], x, pivots)
    return (with_branches - without) / LAYERS


def chain(x: Array, pivots: Array, branch: bool) -> Array:
    for pivot in pivots:
        x = layer(x, pivot, branch)
    return x


def layer(x: Array, pivot: Array, branch: bool) -> Array:
    """Measures x and applies what it measured: three passes over memory."""
    x = lax.optimization_barrier(x)  # what comes before is done, as if it were a convolution

    def measure(c: Array) -> tuple[Array, Array, Array]:
        return c, jnp.sum(x - c, 0), jnp.sum((x - c) ** 2, 0)

    c, s1, s2 = measure(pivot)
    if branch:
        far = jnp.any(s1**2 > 1e6 * (len(x) * s2))  # which no data are
        c, s1, s2 = lax.cond(far, lambda: measure(c + s1), lambda: (c, s1, s2))
    return (x - c) * lax.rsqrt(s2 / len(x) + 1)


def median_seconds(functions: Sequence[Callable[..., Array]], *args: Array) -> list[float]:
    """Of one call of each, where calls are queued; they take turns."""
    programs = [jax.jit(f).lower(*args).compile() for f in functions]
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(ROUNDS):
        for program, of_program in zip(programs, seconds, strict=True):
            program(*args).block_until_ready()
            start = time.perf_counter()
            for _ in range(CALLS):
                y = program(*args)
            y.block_until_ready()
            of_program.append((time.perf_counter() - start) / CALLS)
    return [statistics.median(of_program) for of_program in seconds]


if __name__ == "__main__":
    main()
