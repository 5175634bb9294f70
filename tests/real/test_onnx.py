"""Exported by jax2onnx and run by onnxruntime: both can read what evaluation is made of."""

import flax.linen as nn
import jax
import numpy as np
import onnxruntime
import pytest
from flax import nnx
from jax2onnx import to_onnx

import bnjax

X = np.random.default_rng(0).random((7, 8, 8, 3), np.float32)  # as images are


class Linen(nn.Module):
    conv: bool

    @nn.compact
    def __call__(self, x, train=False):
        if self.conv:
            x = nn.Conv(5, (3, 3))(x)
        return bnjax.linen.BatchNorm(not train, momentum=0.5)(x)


class NNX(nnx.Module):
    def __init__(self, conv):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs) if conv else lambda x: x
        self.norm = bnjax.nnx.BatchNorm(5 if conv else 3, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


def of_linen(conv):
    """A model in evaluation, after a step of training."""
    model = Linen(conv)
    variables = model.init(jax.random.key(0), X)
    _, updates = model.apply(variables, X, train=True, mutable=["batch_stats"])
    return lambda x: model.apply(variables | updates, x)


def of_nnx(conv):
    model = NNX(conv)
    model(X)
    model.eval()
    return model


def difference(model, batch):
    """The largest one between what onnxruntime and what JAX gives, for all sizes that fit."""
    exported = to_onnx(model, inputs=[(batch, *X.shape[1:])])
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    (given,) = session.get_inputs()
    sizes = [batch] if isinstance(batch, int) else [1, 4, 7]
    outputs = [(session.run(None, {given.name: X[:n]})[0], model(X[:n])) for n in sizes]
    return max(np.abs(theirs - np.asarray(ours)).max() for theirs, ours in outputs)


@pytest.mark.parametrize("make", [of_linen, of_nnx])
@pytest.mark.parametrize("conv", [False, True], ids=["alone", "after a convolution"])
def test_exported_models_give_the_same(make, conv, row):
    model = make(conv)
    largest = max(difference(model, batch) for batch in (4, "B"))
    assert largest < 1e-6
    name = {of_linen: "linen", of_nnx: "NNX"}[make]
    row(
        f"ONNX export, {name}, {'after a convolution' if conv else 'the layer alone'}",
        "jax2onnx",
        largest,
        "nothing",
    )
