"""Inference with the batch norms folded beside inference with them: the same compiled model,
in turns, in one process. Prints ratios of medians, and what the compiled programs hold.

    python tests/bench/folding.py [--rounds 30]
"""

import argparse
import functools
import platform
import re
import statistics
import time

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import bnjax

BATCH = {"resnet50": 2, "small_resnet": 16, "mlp": 64}
LAYERS = re.compile(r"(Conv|Dense)(_\d+)$")


def trained(model, x):
    """Variables with statistics, scales and biases that are not those of the start."""
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x))
    rng = np.random.default_rng(0)

    def draw(path, p):
        if path[-1] == "kernel":
            return rng.normal(size=p.shape) / np.sqrt(np.prod(p.shape[:-1]))
        return rng.uniform(0.5, 1.5, p.shape)

    return unflatten_dict({path: jnp.float32(draw(path, p)) for path, p in shapes.items()})


def pairs_of(variables):
    """Each numbered layer and the batch norm of its number beside it; convolutions come first."""
    norms = {"/".join(path[:-1]) for path in flatten_dict(variables["batch_stats"])}
    layers = {"/".join(path[:-1]) for path in flatten_dict(variables["params"])} - norms
    layer_of = {LAYERS.sub(r"BatchNorm\2", layer): layer for layer in sorted(layers, reverse=True)}
    return {layer: norm for norm, layer in layer_of.items() if norm in norms}


def measure(programs, rounds):
    """Seconds of each, by name, in turns."""
    seconds = {name: [] for name in programs}
    for i in range(rounds + 3):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(name, norm, rounds):
    """One line of the table."""
    make, shape, _ = models.MODELS[name]
    model = make(functools.partial(norm, use_running_average=True), None, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH[name], *shape)), jnp.float32)
    variables = trained(model, x)
    pairs = pairs_of(variables)
    folded = bnjax.linen.fold(model, variables, pairs, x)
    apply_folded = functools.partial(bnjax.linen.apply_folded, model)
    before = jax.jit(model.apply).lower(variables, x).compile()
    after = jax.jit(apply_folded).lower(folded, x).compile()
    error = jnp.abs(before(variables, x) - after(folded, x)).max() / jnp.abs(after(folded, x)).max()
    seconds = measure(
        {"before": lambda: before(variables, x), "after": lambda: after(folded, x)}, rounds
    )
    ratios = [a / b for a, b in zip(seconds["after"], seconds["before"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    products = [program.as_text().count(" multiply(") for program in (before, after)]
    return (
        f"| {name} | {len(pairs)} | {middle:.2f} ({low:.2f} to {high:.2f}) "
        f"| {products[0]} -> {products[1]} | {float(error):.0e} |"
    )


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    for norm in (bnjax.linen.BatchNorm, nn.BatchNorm):
        print(f"{norm.__module__}.{norm.__name__}, float32, folded / unfolded:\n")
        print(
            "| model | folded | time (quartiles) | multiplications | largest relative difference |"
        )
        print("|---|---|---|---|---|")
        for name in models.MODELS:
            print(row(name, norm, rounds), flush=True)
        print()
    print(
        f"Python {platform.python_version()}, JAX {jax.__version__}, Flax {flax.__version__}, "
        f"{jax.devices()[0].device_kind}"
    )


if __name__ == "__main__":
    main()
