"""The same small convolutional network with and without BatchNorm, on real handwritten digits.

Trains both on scikit-learn's digits (8 x 8 pixels) at a few learning rates, each batch sharded over
all devices of this machine. Prints a table and draws the curves: with BatchNorm the network needs
fewer steps, recognizes more digits, and learns at a rate where the plain network fails.

    python train_digits.py                # on all devices of this machine
    python train_digits.py --devices 8    # on eight fake devices on the CPU
    python train_digits.py --api pmap     # the same curves by jax.pmap (or by jax.shard_map)

Mean and variance are those of the whole batch, however many devices share it. Under `jax.jit`
with sharded arrays that takes no word in the network or in the training step. `jax.shard_map` and
`jax.pmap` give each device its part of the batch: there BatchNorm gets the name of the mapped
axis, and the training step averages the gradients over it.
"""

import argparse
import math
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from bnjax.linen import BatchNorm


class Network(nn.Module):
    """Three convolutions, the mean over all positions, and a linear classifier."""

    batch_norm: bool
    axis_name: str | None = None  # where each device sees its part of the batch only

    @nn.compact
    def __call__(self, x, train):
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            # BatchNorm has a bias of its own, and would subtract the convolution's.
            x = nn.Conv(features, (3, 3), stride, use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                norm = BatchNorm(momentum=0.9, axis_name=self.axis_name)
                x = norm(x, use_running_average=not train)
            x = nn.relu(x)
        return nn.Dense(10)(x.mean((1, 2)))


NETWORKS = {"with BatchNorm": Network(batch_norm=True), "plain": Network(batch_norm=False)}
STYLES = {"with BatchNorm": ("#0072B2", "-"), "plain": ("#D55E00", "--")}  # colour-blind-safe
APIS = ("jit", "shard_map", "pmap")
AXIS = "data"  # the name of the devices' axis
TARGET = 0.95  # test accuracy
SUFFIXES = (".png", ".pdf", ".svg")


def load_data():
    """`(images, labels)` to train on and to test on; images are `[N, 8, 8, 1]` from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    split = train_test_split(
        images, labels.astype(np.int32), stratify=labels, test_size=0.25, random_state=0
    )
    return split[0::2], split[1::2]


def sgd(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def init_state(model, images, seed):
    """Parameters, running statistics (none in the plain network) and the optimizer's state."""
    variables = model.init(jax.random.key(seed), images[:1], train=False)
    params = variables.pop("params")
    return params, variables, sgd(0.0).init(params)


def make_train_step(model):
    def train_step(state, batch, learning_rate):
        params, stats, sgd_state = state
        images, labels = batch

        def loss_fn(params):
            logits, new_stats = model.apply(
                {"params": params, **stats}, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new_stats

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        if model.axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), model.axis_name)
        updates, sgd_state = sgd(learning_rate).update(grads, sgd_state)
        return (optax.apply_updates(params, updates), stats, sgd_state), loss

    return train_step


def make_train_epoch(model, api, mesh):
    """All steps of an epoch in one compiled call, which reuses the memory of the old state."""
    train_step = make_train_step(model)

    def train_epoch(state, batches, learning_rate):
        return jax.lax.scan(lambda s, batch: train_step(s, batch, learning_rate), state, batches)

    if api == "pmap":
        return by_pmap(train_epoch, mesh)
    if api == "shard_map":
        # Without check_vma, as otherwise JAX adds up the gradients before the step averages them.
        specs = P(), P(None, AXIS), P()
        train_epoch = jax.shard_map(
            train_epoch, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
        )
    return jax.jit(train_epoch, donate_argnums=0)


def by_pmap(train_epoch, mesh):
    """pmap wants an axis for the devices: `[steps, devices, examples of each, ...]`."""
    mapped = jax.pmap(
        train_epoch,
        AXIS,
        in_axes=(None, 1, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=0,
    )

    def train_epoch_by_pmap(state, batches, learning_rate):
        images, labels = batches
        split = len(images), mesh.size, -1
        batches = images.reshape(*split, *images.shape[2:]), labels.reshape(split)
        return mapped(state, batches, learning_rate)

    return train_epoch_by_pmap


def make_accuracy(model):
    def accuracy(state, images, labels):
        params, stats, _ = state
        logits = model.apply({"params": params, **stats}, images, train=False)
        return (logits.argmax(-1) == labels).mean()

    return jax.jit(accuracy)


def train(data, devices, learning_rates, *, epochs, batch_size, seed, api="jit"):
    """Trains each network at each learning rate: `{(network, rate): (losses, accuracies)}`.

    The losses are `[epochs, steps]`, the test accuracies after each epoch `[epochs]`. All runs see
    the same batches; digits that do not fill a batch are left out until the next shuffle.
    """
    (images, labels), test = data
    steps = len(images) // batch_size
    mesh = Mesh(devices, (AXIS,))
    everywhere = NamedSharding(mesh, P())
    by_example = NamedSharding(mesh, P(None, AXIS))  # [steps, batch, ...]
    test = jax.device_put(test, everywhere)
    results = {}
    bar = tqdm(total=len(NETWORKS) * len(learning_rates) * epochs, unit="epoch")
    for network, model in NETWORKS.items():
        model = model.clone(axis_name=None if api == "jit" else AXIS)
        train_epoch, accuracy = make_train_epoch(model, api, mesh), make_accuracy(model)
        for rate in learning_rates:
            bar.set_description(f"{network}, learning rate {rate:g}")
            state = jax.device_put(init_state(model, images, seed), everywhere)
            rng = np.random.default_rng(seed)
            losses, accuracies = [], []
            for _ in range(epochs):
                order = rng.permutation(len(images))[: steps * batch_size]
                order = order.reshape(steps, batch_size)
                batches = jax.device_put((images[order], labels[order]), by_example)
                state, loss = train_epoch(state, batches, rate)
                losses.append(np.asarray(loss))
                accuracies.append(float(accuracy(state, *test)))
                bar.update()
            results[network, rate] = np.array(losses), np.array(accuracies)
    bar.close()
    return results


def print_table(results):
    print(f"{'network':15}{'learning rate':>15}{'test accuracy':>15}{f'steps to {TARGET:.0%}':>14}")
    for (network, rate), (losses, accuracies) in results.items():
        reached = np.flatnonzero(accuracies >= TARGET)
        steps = (reached[0] + 1) * losses.shape[1] if reached.size else "never"
        print(f"{network:15}{rate:15g}{accuracies[-1]:15.1%}{steps:>14}")


def draw(results, path):
    """For each learning rate the loss (of each step, and each epoch's mean) and the accuracy."""
    rates = sorted({rate for _, rate in results})
    figure = Figure(figsize=(max(6.0, 3.2 * len(rates)), 5.6), layout="constrained")
    axes = figure.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False)
    for (network, rate), (losses, accuracies) in results.items():
        above, below = axes[:, rates.index(rate)]
        color, line = STYLES[network]
        style = {"color": color, "linestyle": line, "marker": ".", "markersize": 4}
        steps = losses.shape[1]
        ends = steps * np.arange(1, len(losses) + 1)
        above.plot(1 + np.arange(losses.size), losses.ravel(), color=color, alpha=0.3, lw=0.7)
        above.plot(ends - steps / 2, losses.mean(1), **style, label=network)
        below.plot(ends, 100 * accuracies, **style)
        above.set(title=f"learning rate {rate:g}", yscale="log")
        below.set(xlabel="training steps", ylim=(0, 103))
    axes[0, 0].set_ylabel("training loss (nats)")
    axes[1, 0].set_ylabel("test accuracy (%)")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    figure.suptitle("Handwritten digits: the same network with and without BatchNorm")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def whole_number(low, high, meaning=""):
    def read(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            message = f"{text!r} is not a whole number from {low} to {high}{meaning}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return read


def positive_number(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def main(argv=None):
    data = load_data()
    parser = argparse.ArgumentParser(
        prog="train_digits.py",
        usage="%(prog)s [options]",
        description=__doc__.partition("\n")[0],
    )
    digits = len(data[0][1])
    batch_size = whole_number(1, digits, ", the number of training digits")
    rates, picture = [0.01, 0.1, 1.0], Path("results/train_digits.png")
    add = parser.add_argument
    add("--epochs", type=whole_number(1, 1000), default=30, help="%(default)s unless given")
    add("--batch-size", type=batch_size, default=64, help="%(default)s unless given")
    add("--learning-rates", type=positive_number, nargs="+", default=rates, help="%(default)s")
    add("--api", choices=APIS, default="jit", help="%(default)s unless given")
    add("--devices", type=whole_number(1, 64), help="so many fake devices on the CPU")
    add("--seed", type=whole_number(0, 2**31 - 1), default=0, help="of weights and batches")
    add("--out", type=Path, default=picture, help="the picture: %(default)s unless given")
    args = parser.parse_args(argv)

    if args.devices:  # to be said before JAX looks for devices
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    devices = jax.local_devices()
    if args.batch_size % len(devices):
        expected = f"a multiple of {len(devices)}, the number of devices"
        parser.error(f"argument --batch-size: '{args.batch_size}' is not {expected}")
    if args.out.suffix.lower() not in SUFFIXES:
        parser.error(f"argument --out: '{args.out}' does not end in {' or '.join(SUFFIXES)}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.open("ab").close()  # better to fail now than after the training
    except OSError as error:
        parser.error(f"argument --out: '{args.out}' cannot be written: {error.strerror}")

    print(f"training digits: {digits}, test digits: {len(data[1][1])}, ", end="")
    print(f"devices: {len(devices)} x {devices[0].device_kind}", flush=True)
    results = train(
        data,
        devices,
        sorted(set(args.learning_rates)),
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        api=args.api,
    )
    print_table(results)
    draw(results, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
