"""What whitening costs beside batch normalization: prints the table that the guide shows.

A training step of the layer alone, forward and backward, on float32 input of 4096 rows. The
layers take turns and each figure is the median of the paired ratios, so that other work on the
machine falls on both alike. LAPACK, which factorizes on CPUs, gets one thread: where other
programs run, its threads wait for each other, and took up to 1000 times as long.
"""

import os
import platform
import sys
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before JAX loads it

import flax
import jax
import jax.numpy as jnp
import numpy as np
from work import Work, compiled, cores, normal, seconds_per_call

from bnjax.linen import BatchNorm, DecorrelatedBatchNorm

ROWS = 4096
FEATURES = 64, 256, 1024
LAYERS = {
    "Cholesky, groups of 16": {"group_size": 16},
    "Cholesky, all together": {},
    "Newton-Schulz, 5 iterations, groups of 16": {"group_size": 16, "method": "newton_schulz"},
    "Newton-Schulz, 5 iterations, all together": {"method": "newton_schulz"},
}


def training_step(layer, x):
    """Output, gradients and new statistics of one step, compiled."""
    variables = layer.init(jax.random.key(0), x)
    dy = jnp.asarray(normal(x.shape, 1))

    def step(variables, x, dy):
        def apply(params, x):
            return layer.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                x,
                mutable=["batch_stats"],
            )

        y, pull, updates = jax.vjp(apply, variables["params"], x, has_aux=True)
        return y, pull(dy), updates

    program, figures = compiled(step, variables, x, dy)
    return Work(lambda: program(variables, x, dy), jax.block_until_ready, figures)


def ratios(features, seconds):
    """The median over the rounds of each layer's time, as a multiple of batch norm's."""
    x = jnp.asarray(normal((ROWS, features), 0))
    works = {
        name: training_step(DecorrelatedBatchNorm(False, **fields), x)
        for name, fields in LAYERS.items()
    }
    plain = training_step(BatchNorm(False), x)
    times = {name: [] for name in works}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["Cholesky, all together"]) < 9:
        for name, work in works.items():
            before, ours, after = (seconds_per_call(w, 2, False) for w in (plain, work, plain))
            times[name].append(2 * ours / (before + after))
    return {name: float(np.median(values)) for name, values in times.items()}


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    columns = [ratios(features, seconds) for features in FEATURES]
    print(f"| | {' | '.join(f'{features} features' for features in FEATURES)} |")
    print("|---" * (1 + len(FEATURES)) + "|")
    for name in LAYERS:
        print(f"| {name} | {' | '.join(f'{column[name]:.0f} x' for column in columns)} |")
    print(
        f"\nPython {platform.python_version()}, JAX {jax.__version__}, Flax {flax.__version__}, "
        f"{cores()} cores, {jax.devices()[0].platform.upper()}"
    )


if __name__ == "__main__":
    main()
