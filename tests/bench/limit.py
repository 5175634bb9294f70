"""The limit: the least passes over memory that the work needs, as plain reads and copies.

Training needs x twice, once to measure and once to apply, and writes y. The backward pass
needs x and dy twice, once for its two sums and once for dx, which it writes. Inference is
x * a + b. A layer cannot be faster than this unless its data fits into a cache.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from work import Case, Work, compiled, normal

BLOCKS, COLUMNS = 128, 64
PASSES = {"forward": 3, "forward_backward": 8}  # how often each byte of the input is moved


def limit_work(case: Case) -> Work:
    """The passes of one mode over buffers of the case's size."""
    return _affine_work(case) if case["mode"] == "inference" else _passes_work(case)


def _affine_work(case: Case) -> Work:
    def affine(x: Array, mul: Array, add: Array) -> Array:
        y = (x * mul + add).astype(x.dtype)
        return jax.nn.relu(y) if case["relu"] else y

    x = jnp.asarray(normal(tuple(case["shape"]), 0), case["dtype"])
    args = x, *(jnp.asarray(normal(x.shape[-1:], seed)) for seed in (1, 2))
    program, figures = compiled(affine, *args)
    return Work(lambda: program(*args), jax.block_until_ready, figures)


def _passes_work(case: Case) -> Work:
    size = math.prod(case["shape"]) * jnp.dtype(case["dtype"]).itemsize
    x, dy, first = _buffer(size, 0), _buffer(size, 1), jnp.zeros((BLOCKS, 1, COLUMNS))
    # Each pass is a program of its own, or XLA would find a way to do two in one.
    read, figures_read = compiled(_read, x, first)
    write, figures_write = compiled(_write, x, first)
    read_both, figures_read_both = compiled(_read_both, x, dy, first)
    write_dx, figures_write_dx = compiled(_write_dx, x, dy, first)

    def forward() -> tuple[Array, Array]:
        return write(x, read(x, first))

    def forward_backward() -> tuple[Array, Array]:
        y, last = forward()
        return y, write_dx(x, dy, read_both(x, dy, last))

    call, programs = forward, [figures_read, figures_write]
    if case["mode"] == "forward_backward":
        call, programs = forward_backward, [*programs, figures_read_both, figures_write_dx]
    names = "compile_seconds", "bytes_accessed"
    figures = {name: sum(program[name] for program in programs) for name in names}
    _check_passes(figures["bytes_accessed"] / x.nbytes, PASSES[case["mode"]])
    return Work(call, jax.block_until_ready, figures)


# `last` is small, and comes from the pass before: a pass begins when that one has ended.


def _read(x: Array, last: Array) -> Array:
    """Sums as machines like it: blocks in parallel, columns in wide registers."""
    return jnp.sum(x, axis=1, keepdims=True) + last


def _write(x: Array, last: Array) -> tuple[Array, Array]:
    return x + last, last + 1


def _read_both(x: Array, dy: Array, last: Array) -> Array:
    return _read(dy, _read(x, last))


def _write_dx(x: Array, dy: Array, last: Array) -> Array:
    return x + dy + last


def _buffer(size: int, seed: int) -> Array:
    """So many bytes, as float32 whatever the dtype."""
    rows = math.ceil(size / (4 * BLOCKS * COLUMNS))
    return jnp.asarray(normal((BLOCKS, rows, COLUMNS), seed))


def _check_passes(done: float, needed: int) -> None:
    """Refuses programs in which XLA has added a pass over memory, or saved one."""
    if not needed <= done < needed + 0.5:
        raise RuntimeError(f"The limit is {needed} passes over memory, but here are {done:.2f}.")
