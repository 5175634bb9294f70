"""The picture at the top of the README: accuracy, masks on two devices, and what is kept.

python tests/bench/glance.py notebooks/guide/glance.png
"""

import sys

import differences  # first: it starts JAX with two devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bnjax

COLORS = {"flax": "tab:orange", "bnjax": "tab:blue"}
LAYERS = {"flax": nn.BatchNorm, "bnjax": bnjax.linen.BatchNorm}


def variance_error(layer_class, valid):
    """Of a mask that leaves 64 rows on one replica and `valid` on the other, relative."""
    x = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    x[1] += 3
    mask = np.arange(64)[None, :, None] < np.array([64, valid])[:, None, None]
    layer = layer_class(momentum=0.0, axis_name="batch")
    train = jax.pmap(lambda x, mask: differences.train(layer, x, mask)[1], axis_name="batch")
    var = np.asarray(train(x, np.broadcast_to(mask, x.shape))["var"][0])
    exact = np.concatenate([x[0], x[1, :valid]]).astype(np.float64).var(0)
    return float(np.max(np.abs(var / exact - 1)))


def draw_accuracy(axis):
    ratios = 10.0 ** np.arange(7)
    for name, layer in LAYERS.items():
        errors = [float(differences.output_error(layer(), ratio)) for ratio in ratios]
        axis.loglog(ratios, errors, "o-", color=COLORS[name], label=name)
    axis.set_title("Accurate at every scale")
    axis.set_xlabel("mean / standard deviation of the data")
    axis.set_ylabel("largest error of the output, float32")
    axis.legend(frameon=False)


def draw_masks(axis):
    valid = 2 ** np.arange(7)
    for name, layer in LAYERS.items():
        axis.loglog(valid, [variance_error(layer, n) for n in valid], "o-", color=COLORS[name])
    axis.set_xticks(valid, valid)
    axis.minorticks_off()
    axis.set_title("Right with masks on two devices")
    axis.set_xlabel("valid rows on the second device (64 on the first)")
    axis.set_ylabel("relative error of the variance")


def draw_memory(axis):
    dtypes = jnp.float32, jnp.bfloat16
    for i, (name, layer) in enumerate(LAYERS.items()):
        kept = [differences.residual_bytes(layer(dtype=dtype), dtype) for dtype in dtypes]
        bars = [float(text.split()[0]) for text in kept]
        where = np.arange(2) + 0.4 * i - 0.2
        axis.bar(where, bars, 0.36, color=COLORS[name])
        for place, bar in zip(where, bars, strict=True):
            axis.text(place, bar + 0.05, f"{bar:.0f} x", ha="center")
    axis.set_xticks(range(2), [dtype.__name__ for dtype in dtypes])
    axis.set_title("Keeps its input, and no more")
    axis.margins(y=0.1)
    axis.set_xlabel("forward and backward compiled apart")
    axis.set_ylabel("kept for the backward pass / input")


def main():
    plt.rcParams.update({"font.size": 10, "axes.spines.right": False, "axes.spines.top": False})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    for draw, axis in zip((draw_accuracy, draw_masks, draw_memory), axes, strict=True):
        draw(axis)
        axis.grid(axis="y", alpha=0.3)
    figure.get_layout_engine().set(wspace=0.05)
    figure.savefig(sys.argv[1], dpi=120)


if __name__ == "__main__":
    main()
