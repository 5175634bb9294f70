"""What a worker measures: something to call, how to wait for it, and the figures of its program."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Case = dict[str, Any]


class Work(NamedTuple):
    """Work to time.

    Attributes:
      call: starts it once, and returns its outputs.
      wait: waits for outputs.
      figures: what is known without running it: seconds to compile, bytes.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    figures: dict[str, float]


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function compiled by JAX, and what its compilation took and says."""
    import jax  # not above: PyTorch's process does without

    jax.clear_caches()
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    figures = {"compile_seconds": time.perf_counter() - start}
    figures["temp_bytes"] = program.memory_analysis().temp_size_in_bytes
    figures["bytes_accessed"] = program.cost_analysis()["bytes accessed"]
    return program, figures


def seconds_per_call(work: Work, repeats: int, queue: bool) -> float:
    """The time of one call: on a CPU the median of a few, with `queue` their mean.

    With `queue` (an accelerator, which runs them in order) only the last call is waited for, so
    that the device never waits for the host. On a CPU JAX would run them at the same time, and
    whatever else the machine does stops some of them for long.
    """
    work.wait(work.call())  # untimed: wakes threads and fills caches
    if queue:
        start = time.perf_counter()
        for _ in range(repeats):
            outputs = work.call()
        work.wait(outputs)
        return (time.perf_counter() - start) / repeats
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work.wait(work.call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Well-scaled data: mean 0.5, standard deviation 2; a million values, over and over."""
    noise = np.random.default_rng(seed).standard_normal(1_000_003, np.float32)
    return np.resize(noise * np.float32(2) + np.float32(0.5), shape)


def cores() -> int:
    """The cores that this process may run on, all of which JAX uses."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
