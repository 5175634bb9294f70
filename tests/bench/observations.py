"""Running statistics of a billion observations, brax's and ours: prints the table of the guide.

    pip install brax && python tests/bench/observations.py

float32, batches of 1024, whose means wander as those of a learner's do. The same thousand batches
come again and again, so that the truth is known: it is theirs, in NumPy's longdouble. Ours are
merged batch by batch, as brax does it, and a thousand batches at a time.
"""

import platform
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from brax.training.acme import running_statistics, specs
from tqdm import tqdm

import bnjax

BATCH, BATCHES, CYCLES = 1024, 1000, 977
RATIOS = 0, 1, 100, 10_000  # mean / std, one a feature
SHOWN = 1, 30, 977  # cycles


def observations():
    """`[batches, observations, features]`."""
    rng = np.random.default_rng(0)
    wander = np.cumsum(rng.normal(size=(BATCHES, 1, len(RATIOS))) / 30, 0)
    x = rng.normal(size=(BATCHES, BATCH, len(RATIOS))) + wander
    x = (x - x.mean((0, 1))) / x.std((0, 1))
    return (x + RATIOS).astype(np.float32)


def observe(m, x):
    """The moments of all so far."""
    return bnjax.merge(m, bnjax.moments(x))


def over_all(step):
    """One cycle, batch by batch, compiled."""

    @jax.jit
    def cycle(state, batches):
        return jax.lax.scan(lambda state, x: (step(state, x), None), state, batches)[0]

    return cycle


def errors(mean, var, truth):
    """Of the mean in standard deviations, and of the variance relative to it."""
    true_mean, true_var = truth
    of_mean = np.abs(mean - true_mean) / np.sqrt(true_var)
    return of_mean, np.abs(var / true_var - 1)


def of_ours(m):
    return np.asarray(m.mean, np.longdouble) + np.asarray(m.remainder), np.asarray(
        m.var, np.longdouble
    )


def of_brax(state):
    return np.asarray(state.mean, np.longdouble), np.asarray(state.std, np.longdouble) ** 2


def main():
    x = observations()
    wide = x.reshape(-1, len(RATIOS)).astype(np.longdouble)
    truth = wide.mean(0), wide.var(0)
    start = bnjax.Moments.initial(len(RATIOS))
    theirs = running_statistics.init_state(specs.Array((len(RATIOS),), jnp.float32))
    kinds = {  # the state, one cycle, and how to read the state
        "brax": (theirs, over_all(running_statistics.update), of_brax),
        "bnjax": (start, over_all(observe), of_ours),
        "a thousand at a time": (start, jax.jit(observe), of_ours),
    }
    states = {name: state for name, (state, _, _) in kinds.items()}
    rows = []
    for i in tqdm(range(1, CYCLES + 1), unit="cycle"):
        states = {name: cycle(states[name], x) for name, (_, cycle, _) in kinds.items()}
        if i in SHOWN:
            found = [errors(*read(states[name]), truth) for name, (_, _, read) in kinds.items()]
            for k, ratio in enumerate(RATIOS):
                cells = (f"{error[j][k]:.0e}" for j in range(2) for error in found)
                rows.append((f"{i * BATCHES * BATCH:.0e}", f"{ratio:,}", *cells))
    heads = [
        "observations",
        "mean/std",
        *(f"{of}: {name}" for of in ("mean", "var") for name in kinds),
    ]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(
        f"\nPython {platform.python_version()}, JAX {jax.__version__}, brax {version('brax')}, "
        f"{jax.devices()[0].platform.upper()}"
    )


if __name__ == "__main__":
    main()
