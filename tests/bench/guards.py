"""How often the guard of a running mean fires: 1000 steps of a small ResNet on digits.

    python tests/bench/guards.py [--steps 1000]

A batch whose mean is far from the running mean is measured twice. The input has a constant and a
dead channel beside the image's.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import trange

import bnjax
from bnjax._sums import FAR

EPSILON = 1e-5


class Block(nn.Module):
    """Two convolutions and a skip."""

    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        y = nn.relu(bnjax.linen.BatchNorm(False, epsilon=EPSILON)(y))
        y = bnjax.linen.BatchNorm(False)(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = bnjax.linen.BatchNorm(False)(nn.Conv(self.features, (1, 1), use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Normalizes its input, then three blocks."""

    @nn.compact
    def __call__(self, x):
        x = bnjax.linen.BatchNorm(False)(x)
        for features in (16, 32, 64):
            x = Block(features)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def fires(batch_stats, moments):
    """Of each layer, whether the batch's mean is far from the running mean: what the guard asks."""

    def of_layer(stats, m):
        m1 = (m.mean - stats["mean"]) + m.remainder
        return jnp.any(m1**2 > FAR * (m.var + EPSILON))

    flat = jax.tree.leaves(moments, is_leaf=lambda node: isinstance(node, bnjax.Moments))
    is_layer = lambda node: isinstance(node, dict) and "mean" in node  # noqa: E731
    layers = jax.tree.leaves(batch_stats, is_leaf=is_layer)
    return jnp.stack([of_layer(stats, m) for stats, m in zip(layers, flat, strict=True)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    channels = [images, np.ones_like(images), np.zeros_like(images)]  # and constant, and dead
    images = np.concatenate(channels, -1)
    network, optimizer = ResNet(), optax.sgd(0.05, momentum=0.9)
    variables = network.init(jax.random.key(0), images[:2])
    params, batch_stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def step(params, batch_stats, state, x, y):
        def loss(params):
            given = {"params": params, "batch_stats": batch_stats}
            logits, updates = network.apply(given, x, mutable=["batch_stats", "moments"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(params)
        changes, state = optimizer.update(grads, state)
        fired = fires(batch_stats, updates["moments"])
        return optax.apply_updates(params, changes), updates["batch_stats"], state, fired

    rng, state, fired = np.random.default_rng(0), optimizer.init(params), []
    for _ in trange(steps, desc="train"):
        rows = rng.integers(len(images), size=64)
        params, batch_stats, state, now = step(
            params, batch_stats, state, images[rows], labels[rows]
        )
        fired.append(now)
    fired = np.stack(fired)
    print(f"JAX {jax.__version__}, {jax.default_backend()}: {fired.shape[1]} layers, {steps} steps")
    for name, count, last in zip(
        names(batch_stats), fired.sum(0), map(last_step, fired.T), strict=True
    ):
        print(f"{name}: fires in {count} steps, last in step {last}")


def last_step(fired):
    """Counted from 1; 0 if it never fired."""
    return int(np.flatnonzero(fired)[-1]) + 1 if fired.any() else 0


def names(batch_stats):
    """Of the layers, in the order of their leaves."""
    paths, _ = jax.tree_util.tree_flatten_with_path(batch_stats)
    layers = ["/".join(key.key for key in keys[:-1]) for keys, _ in paths]
    return list(dict.fromkeys(layers))


if __name__ == "__main__":
    main()
