"""Where bnjax differs from flax, in figures: prints the table that the README shows."""

import os
import platform

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bnjax

LAYERS = nn.BatchNorm, bnjax.linen.BatchNorm


def train(layer, x, mask=None):
    """Output and batch_stats of one training step from fresh variables."""
    features = x.shape[-1]
    variables = {
        "params": {"scale": jnp.ones(features), "bias": jnp.zeros(features)},
        "batch_stats": {"mean": jnp.zeros(features), "var": jnp.ones(features)},
    }
    y, updates = layer.apply(
        variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
    )
    return y, updates["batch_stats"]


def output_error(layer, ratio):
    """max |y - reference| for float32 normal data of this mean / std."""
    x = np.random.default_rng(0).normal(size=(4099, 64)).astype(np.float32) + np.float32(ratio)
    exact = x.astype(np.longdouble)
    reference = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    y, _ = jax.jit(lambda x: train(layer, x))(x)
    return f"{float(np.abs(np.asarray(y, np.longdouble) - reference).max()):.0e}"


def residual_bytes(layer, dtype):
    """What lies between forward and backward pass, as a multiple of the input's bytes."""
    x = jnp.ones((4096, 256), dtype)
    scale, bias = jnp.ones(256), jnp.zeros(256)
    stats = {"mean": jnp.zeros(256), "var": jnp.ones(256)}

    def forward(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, _ = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return y.astype(dtype)

    backward = jax.jit(lambda *args: jax.vjp(forward, *args)[1])(x, scale, bias)
    buffers = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.tree.leaves(backward)}
    return f"{sum(buffers.values()) / x.nbytes:.1f} x"


def uneven_replicas(layer_class):
    """Mean and variance over two replicas that have 7 and 1 valid rows."""
    x = np.random.default_rng(0).normal(size=(2, 8, 1)) * 3 + np.array([0.0, 10.0])[:, None, None]
    x = x.astype(np.float32)
    mask = np.zeros((2, 8, 1), bool)
    mask[0, :7], mask[1, :1] = True, True
    layer = layer_class(momentum=0.0, axis_name="batch")
    _, stats = jax.pmap(lambda x, mask: train(layer, x, mask), axis_name="batch")(x, mask)
    return f"{stats['mean'][0, 0]:.2f}, {stats['var'][0, 0]:.2f}", x[mask]


def main():
    rows = []
    for ratio in ("0", "1e2", "1e4", "1e6"):
        errors = [output_error(layer(), float(ratio)) for layer in LAYERS]
        rows.append((f"largest error of the output, float32, mean/std {ratio}", *errors))
    for dtype in (jnp.float32, jnp.bfloat16):
        kept = [residual_bytes(layer(dtype=dtype), dtype) for layer in LAYERS]
        what = f"kept for a backward pass compiled apart, {dtype.__name__}, input's bytes"
        rows.append((what, *kept))
    (theirs, valid), (ours, _) = (uneven_replicas(layer) for layer in LAYERS)
    truth = f"{valid.mean():.2f}, {valid.var():.2f}"
    rows.append(
        (f"mean, variance over replicas of 7 and 1 valid rows (true {truth})", theirs, ours)
    )
    nothing = jnp.zeros((8, 1), bool)
    stats = [train(layer(), jnp.ones((8, 1)), nothing)[1]["mean"][0] for layer in LAYERS]
    rows.append(("running mean 0 after a batch that is wholly masked", *map(str, stats)))
    padded = jnp.array([[1.0], [2.0], [4.0], [jnp.nan]])
    valid = jnp.array([[True], [True], [True], [False]])
    grads = [
        jax.grad(lambda x, layer=layer: train(layer(), x, valid)[0][0, 0])(padded)[0, 0]
        for layer in LAYERS
    ]
    rows.append(("gradient of a valid row beside a masked NaN", *(f"{g:.2f}" for g in grads)))
    print("| | flax | bnjax |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(
        f"\nPython {platform.python_version()}, JAX {jax.__version__}, Flax {flax.__version__}, "
        f"{jax.devices()[0].platform.upper()}"
    )


if __name__ == "__main__":
    main()
