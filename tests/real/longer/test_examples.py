"""The examples that flax trains with: ResNet-18 for ImageNet in linen, a CNN for MNIST in NNX."""

import functools
import importlib
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import jax
import numpy as np
import optax
import pytest
from agreement import difference
from flax import linen, nnx

import bnjax

# They only read images and write logs, and need not be there.
READERS = [
    "tensorflow",
    "tensorflow_datasets",
    "clu",
    "ml_collections",
    "input_pipeline",
    "flax.metrics",
]


@pytest.fixture
def example(flax_source):
    """Imports a training script."""
    importlib.import_module("flax.training.checkpoints")  # looks for the true TensorFlow

    def load(name):
        path = [str(flax_source / "examples" / name), *sys.path]
        mocks = {reader: MagicMock() for reader in READERS}
        with patch.dict(sys.modules, mocks), patch.object(sys, "path", path):
            return importlib.import_module("train")

    return load


def imagenet(example):
    """The losses, what was trained and remembered, and the loss in evaluation."""
    model = example.create_model(model_cls=example.models.ResNet18, half_precision=False)
    config = SimpleNamespace(half_precision=False, momentum=0.9)
    state = example.create_train_state(jax.random.key(0), config, model, 64, learning_rate)
    mapped = {"axis_name": "batch", "in_axes": (None, 0)}
    train = functools.partial(example.train_step, learning_rate_fn=learning_rate)
    train = jax.pmap(train, out_axes=(None, 0), **mapped)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((8, 4, 64, 64, 3), np.float32)
    batch = {"image": images, "label": rng.integers(0, 1000, (8, 4))}
    losses = []
    for _ in range(5):
        state, metrics = train(state, batch)
        losses.append(metrics["loss"])
    evaluated = jax.pmap(example.eval_step, **mapped)(state, batch)
    return losses, state.params, state.batch_stats, evaluated["loss"]


def learning_rate(step):
    return 0.01


def mnist(example):
    """The same."""
    model, rngs = example.CNN(rngs=nnx.Rngs(0)), nnx.Rngs(1)
    optimizer = nnx.Optimizer(model, optax.sgd(0.01, 0.9), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    rng = np.random.default_rng(0)
    images, labels = rng.random((64, 28, 28, 1), np.float32), rng.integers(0, 10, 64)
    batch = {"image": images, "label": labels}
    model.train()
    losses = []
    for _ in range(5):
        example.train_step(model, optimizer, metrics, batch, rngs)
        losses.append(metrics.compute()["loss"])
    metrics.reset()
    model.eval()
    example.eval_step(model, metrics, batch)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return losses, nnx.to_pure_dict(state), metrics.compute()["loss"]


PROGRAMS = {
    "imagenet": (imagenet, linen, bnjax.linen, "linen, ResNet-18 on eight devices"),
    "mnist": (mnist, nnx, bnjax.nnx, "NNX, a convolutional network"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_of_flax(name, example, monkeypatch, row):
    run, flaxs, wing, what = PROGRAMS[name]
    theirs = run(example(name))
    monkeypatch.setattr(flaxs, "BatchNorm", wing.BatchNorm)
    ours = run(example(name))
    largest = difference(ours, theirs)
    assert 0 < largest < 1e-5
    program = f"flax's example {name}: {what}, five steps, then evaluation"
    row(program, "flax", largest, "the import")
