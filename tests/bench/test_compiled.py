"""What the compilers for a TPU v5e and an H100 make of the layer, held against flax's.

`make compiled ARGS=--check` runs these, with the one version of JAX that they are for; for the
H100, which has a network of minutes, `ARGS="--check h100"`. No device is needed.
"""

import functools
import math
import os

import cases
import compiled_programs
import compiled_text
import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import steps
import targets
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

TARGET = os.environ["TARGET"]
on = {
    target: pytest.mark.skipif(target != TARGET, reason=f"compiles for {TARGET}")
    for target in targets.PACKAGES
}
LARGE_SHAPES = cases.COMPILED_SHAPES[:2]
every_shape = pytest.mark.parametrize("shape", cases.COMPILED_SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def standard_promotion():
    """Without which flax's layer takes no bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def compile_here(program):
    sharding = SingleDeviceSharding(targets.devices(TARGET)[0])
    return compiled_programs.compile_for(sharding, program, targets.OPTIONS.get(TARGET))


@functools.cache
def compile_layer(library, dtype, shape):
    """One layer, forward and backward."""
    case = {"kind": "layer", "dtype": dtype, "shape": shape}
    return compile_here(compiled_programs.program(library, case))


def layer_figures(library, dtype, shape):
    return compiled_text.figures(compile_layer(library, dtype, shape), math.prod(shape))


@every_dtype
@every_shape
def test_a_layer_makes_no_pass_more_than_flax(shape, dtype):
    ours, theirs = (layer_figures(name, dtype, shape)["passes"] for name in ("bnjax", "flax"))
    spare = TARGET == "h100" and len(shape) == 2  # which begins with the batch mean
    assert ours <= theirs + spare


@every_dtype
@every_shape
def test_a_quiet_branch_moves_nothing(shape, dtype):
    """A layer that holds its pivot for far has a branch that measures again, and one that waits."""
    program = compiled_text.read(compile_layer("bnjax-running", dtype, shape).as_text())
    conditionals = [i for i in program["ENTRY"] if i.opcode == "conditional"]
    assert len(conditionals) == 1
    moved = sorted(
        sum(compiled_text.passes(program, kernel, math.prod(shape)) for kernel in branch)
        for branch in compiled_text.branches(program, conditionals[0])
    )
    assert moved[0] == 0 < moved[1]


@every_dtype
@every_shape
@on["tpu"]
def test_a_layer_takes_a_tpu_as_long_as_flax(shape, dtype):
    ours, theirs = (layer_figures(name, dtype, shape)["cycles"] for name in ("bnjax", "flax"))
    assert ours <= (1.02 if shape in LARGE_SHAPES else 1.10) * theirs


@every_dtype
@every_shape
@on["h100"]
def test_a_layer_adds_few_tiny_kernels_on_an_h100(shape, dtype):
    ours, theirs = (layer_figures(name, dtype, shape)["tiny"] for name in ("bnjax", "flax"))
    assert ours <= theirs + 4


@on["tpu"]
def test_sums_ride_with_convolutions_on_a_tpu(monkeypatch):
    """They cost nothing there. A pivot that needs the convolution's own output forbids it."""
    monkeypatch.setitem(models.MODELS, "block", (one_block, (28, 28, 3), 10))
    ours, theirs = (step_figures(name, "block", 2**18) for name in ("bnjax", "flax"))
    assert ours["epilogues"] == theirs["epilogues"] > 0
    assert ours["sums_alone"] == theirs["sums_alone"]
    assert ours["cycles"] <= 1.02 * theirs["cycles"]


@on["h100"]
def test_resnet50_moves_less_than_with_flax_on_an_h100():
    ours, theirs = (step_figures(name, "resnet50", 2**20) for name in ("bnjax", "flax"))
    assert ours["quiet_bytes"] <= 0.985 * theirs["quiet_bytes"]
    assert ours["kernels"] <= 1.03 * theirs["kernels"]


def one_block(norm, policy, dtype):
    """Three convolutions with batch normalization each, two of them in a residual block."""
    return models.ResNet(models.Basic, (1,), 64, 10, False, norm, dtype, policy)


def step_figures(library, model, elements):
    case = {"kind": "step", "model": model, "dtype": "bfloat16", "batch": 128}
    program = compiled_programs.program(library, case | {"elements": elements})
    return compiled_text.figures(compile_here(program), elements)


CHIPS = 256
LAYERS = 3


class Chain(nn.Module):
    """Layers of batch normalization and relu, behind convolutions if asked to."""

    norm: steps.Norm
    convolve: bool

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            if self.convolve:
                x = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
            x = nn.relu(self.norm()(x))
        return x


def collectives(library, axis_type, axes):
    """What the gradient of a chain exchanges between 256 chips, by the type exchanged.

    One axis shards the batch; a second one shards the features.
    """
    norm, _ = steps.norm_and_policy(library, "float32")
    network = Chain(norm, convolve=len(axes) == 1)
    x = jax.ShapeDtypeStruct((2 * CHIPS, 8, 8, 256), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    chips = np.array(targets.devices("tpu", "v5e:16x16")).reshape(
        {1: (256,), 2: (16, 16)}[len(axes)]
    )
    mesh = Mesh(chips, axes, axis_types=(axis_type,) * len(axes))
    batch, *features = axes

    def gradient(variables, x):
        def loss(params, x):
            all_variables = {"params": params, "batch_stats": variables["batch_stats"]}
            y, updates = network.apply(all_variables, x, mutable=["batch_stats"])
            return jnp.sum(y**2), updates

        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    def place(a):
        spec = {1: P(*features), 4: P()}[a.ndim]
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    over = NamedSharding(mesh, P(batch, None, None, *features))
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over)
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient).lower(jax.tree.map(place, variables), x).compile()
    return compiled_text.collectives(compiled_text.read(compiled.as_text()))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("axes", [("batch",), ("batch", "features")], ids=str)
@on["tpu"]
def test_256_chips_exchange_what_they_do_with_flax(axes, axis_type):
    """All-reduces and nothing else; where features are sharded a bit more for each layer."""
    ours, theirs = (collectives(name, axis_type, axes) for name in ("bnjax", "flax"))
    bits = ours.pop("all-reduce of u32", 0)
    assert ours == theirs
    assert set(theirs) == {"all-reduce of f32"}
    assert bits == (LAYERS if len(axes) == 2 else 0)
