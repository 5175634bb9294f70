"""What is kept between forward and backward, and what the backward pass computes again."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hlo import loops_over, split_branches
from implementations import IMPLEMENTATIONS, every_implementation
from jax import lax
from samples import every_pair, normal

import bnjax
import bnjax.linen

FEATURES = 8
SUM = re.compile(r"= f32\S* reduce\(")
VECTORS = 16 * FEATURES * 4  # bytes of sixteen float32 vectors of the features: "O(features)"
DTYPES = [jnp.float32, jnp.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def array(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(normal(shape, seed=seed, dtype=dtype))


def kept(f, *inputs):
    """Bytes of the distinct buffers that the backward pass of f holds on to."""
    _, backward = jax.vjp(f, *inputs)
    buffers = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.tree.leaves(backward)}
    return sum(buffers.values())


def layer(step, where=None):
    ones = jnp.ones(FEATURES)
    return lambda x: step(x, ones, ones, where=where).y


@every_pair(step=IMPLEMENTATIONS.values(), jit=[False, True], dtype=DTYPES)
def test_a_layer_keeps_its_input_and_vectors(step, jit, dtype):
    x = array((64, 16, FEATURES), dtype)
    f = jax.jit(layer(step)) if jit else layer(step)
    assert x.nbytes <= kept(f, x) <= x.nbytes + VECTORS


@every_pair(
    step=IMPLEMENTATIONS.values(),
    shape=[(64, 1, 1), (64, 16, 1), (64, 16, FEATURES)],
    dtype=DTYPES,
)
def test_a_layer_keeps_a_mask_as_narrow_as_it_came(step, shape, dtype):
    x, where = array((64, 16, FEATURES), dtype), jnp.asarray(normal(shape, seed=1) > 0)

    def f(x, where):
        return layer(step, where)(x)

    assert kept(jax.jit(f), x, where) <= x.nbytes + where.nbytes + VECTORS


@every_dtype
@every_implementation
def test_a_relu_after_it_keeps_no_more_under_the_policy(step, dtype):
    x = array((64, 16, FEATURES), dtype)

    @functools.partial(jax.checkpoint, policy=bnjax.convs_and_dots_saveable)
    def f(x):
        return jax.nn.relu(layer(step)(x))

    assert kept(jax.jit(f), x) <= x.nbytes + VECTORS


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def block(step, x, kernels, scale, bias):
    h = conv(x, kernels[0])
    h = jax.nn.relu(step(h, scale, bias, dtype=h.dtype).y)
    return conv(h, kernels[1])


def block_and_inputs(step, policy, dtype=jnp.float32):
    """The block, under `jax.checkpoint` if there is a policy, with its input and parameters."""
    f = functools.partial(block, step)
    x = array((8, 16, 16, FEATURES), dtype)
    kernels = array((2, 3, 3, FEATURES, FEATURES), dtype, seed=1)
    inputs = x, (kernels[0], kernels[1]), jnp.ones(FEATURES), jnp.ones(FEATURES)
    return jax.checkpoint(f, policy=policy) if policy else f, inputs


@every_dtype
@every_implementation
def test_a_block_keeps_its_input_and_the_outputs_of_convolutions(step, dtype):
    f, inputs = block_and_inputs(step, bnjax.convs_and_dots_saveable, dtype)
    x, kernels, _, _ = inputs
    # The input and, for measuring and for applying, the first convolution's output: between two
    # programs that is two arrays, and one in a single program (tests/bench/NOTES.md).
    full_size = 3 * x.nbytes
    parameters = sum(a.nbytes for a in kernels)
    assert kept(jax.jit(f), *inputs) <= full_size + parameters + VECTORS


POLICIES = {
    "plain": None,
    "ours": bnjax.convs_and_dots_saveable,
    "the tag alone": jax.checkpoint_policies.save_only_these_names(bnjax.MOMENTS_NAME),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


def gradient(step, policy, depth=1):
    """The gradient of a chain of blocks, and its inputs."""
    f, inputs = block_and_inputs(step, POLICIES[policy])

    def loss(x, *parameters):
        for _ in range(depth):
            x = f(x, *parameters)
        return jnp.sum(jnp.sin(x))

    return jax.grad(loss, tuple(range(len(inputs)))), inputs


def count(jaxpr, primitive):
    """How often a primitive is applied to an array with a batch, in a program and its parts."""
    total = 0
    for equation in jaxpr.eqns:
        is_full = any(v.aval.ndim == 4 for v in equation.invars)
        total += is_full and equation.primitive.name == primitive
        for part in jax.tree.leaves(list(equation.params.values())):
            part = getattr(part, "jaxpr", part)
            total += count(part, primitive) if hasattr(part, "eqns") else 0
    return total


@every_implementation
def test_the_backward_pass_repeats_no_reduction_over_the_batch(step):
    """Nor, under our policy, a convolution. Without the tag it would repeat the reductions."""

    def counts(policy):
        f, inputs = gradient(step, policy)
        jaxpr = jax.make_jaxpr(f)(*inputs).jaxpr
        return count(jaxpr, "reduce_sum"), count(jaxpr, "conv_general_dilated")

    reductions, convolutions = counts("plain")
    assert counts("ours") == (reductions, convolutions)
    assert counts("the tag alone") == (reductions, convolutions + 1)
    assert counts("nothing")[0] > reductions


@every_pair(step=IMPLEMENTATIONS.values(), pivot=["batch", "running"], policy=["plain", "ours"])
def test_the_compiled_program_makes_few_reductions(step, pivot, policy):
    """Forward the pivot (unless the running mean is it), the mean and the variance; back two."""
    forward = {"batch": 3, "running": 2}[pivot]
    f, inputs = gradient(functools.partial(step, pivot=pivot), policy)
    program = jax.jit(f).lower(*inputs).compile().as_text()
    taken, branches = split_branches(program)
    assert len(SUM.findall(taken)) == forward + 2
    # Where the guard fires, the mean and both sums once more.
    assert len(SUM.findall(branches)) == (3 if pivot == "running" else 0)


@every_implementation
def test_a_quiet_branch_holds_nothing_of_the_inputs_size(step):
    """It passes on what it was given; all that is as large as x is what comes in for the other."""
    f, inputs = gradient(functools.partial(step, pivot="running"), "plain")
    program = jax.jit(f).lower(*inputs).compile().as_text()
    results = re.findall(r"= \(([^()]*)\) conditional\(", program)
    assert len(results) == 1
    sizes = [
        math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", results[0])
    ]
    assert max(sizes) == FEATURES


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="goes without: policies pay for it")
@every_implementation
def test_loops_over_elements_repeat_no_arithmetic_on_features(step):
    """y and dx are a few sums and products of x, dy and vectors; else 13 and 32 operations."""
    x, dy, scale, bias = array((96, 48)), array((96, 48), seed=1), jnp.ones(48), jnp.zeros(48)

    @jax.jit
    def forward_and_backward(x, dy, scale, bias):
        def split(x, scale, bias):
            y, *running = step(x, scale, bias)
            return y, running

        y, pull, running = jax.vjp(split, x, scale, bias, has_aux=True)
        y, dy = lax.optimization_barrier((y, dy))
        return y, pull(dy), running

    program = forward_and_backward.lower(x, dy, scale, bias).compile().as_text()
    (arrays, operations), (arrays_back, operations_back) = loops_over(x.shape, program)
    assert arrays <= 5
    assert operations <= 7
    assert arrays_back <= 6
    assert operations_back <= 7


class Network(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(self.norm()(nn.Conv(24, (3, 3), use_bias=False)(x)))
        return x


def kernels(norm):
    """Of a training step, compiled: its time to compile is in proportion."""
    network, x = Network(norm), jax.ShapeDtypeStruct((8, 20, 20, 24), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)

    def step(params, stats, x):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            y, updated = network.apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(y**2), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, updated, jax.tree.map(lambda p, d: p - 0.1 * d, params, grads)

    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(variables["params"], variables["batch_stats"], x)
        .compile()
    )
    return compiled.as_text().count(" fusion(")


@functools.cache
def kernels_of_flaxs():
    return kernels(functools.partial(nn.BatchNorm, use_running_average=False))


@pytest.mark.parametrize(
    ("pivot", "more", "from_0_12"), [("batch", 9, 13), ("auto", 12, 16), ("running", 24, 31)]
)
def test_three_layers_compile_to_few_kernels_more_than_flaxs(pivot, more, from_0_12):
    """A sample is a kernel more for each layer, a branch five or six."""
    more = from_0_12 if jax.__version_info__ >= (0, 12) else more
    ours = functools.partial(bnjax.linen.BatchNorm, use_running_average=False, pivot=pivot)
    assert kernels(ours) - kernels_of_flaxs() <= more


@every_implementation
def test_compiled_blocks_hold_two_arrays_each(step):
    """The convolutions' outputs; beside them one or two arrays that are being worked on.

    Before JAX 0.12 XLA's CPU backend merges what is recomputed with what is kept: there no
    policy frees anything, and ours must not cost.
    """
    depth = 4

    def temporaries(policy):
        f, inputs = gradient(step, policy, depth)
        memory = jax.jit(f).lower(*inputs).compile().memory_analysis()
        return memory.temp_size_in_bytes / inputs[0].nbytes

    plain = temporaries("plain")
    frees = temporaries("nothing") < 0.9 * plain
    vectors = 2 * depth * VECTORS / (8 * 16 * 16 * FEATURES * 4)
    assert temporaries("ours") <= (2 * depth + 2 if frees else plain) + vectors
    assert frees or jax.__version_info__ < (0, 12)


def test_the_tag_has_its_public_name():
    jaxpr = jax.make_jaxpr(bnjax.moments)(jnp.ones((4, 2)))
    assert bnjax.MOMENTS_NAME == "bnjax_moments"
    assert f"name={bnjax.MOMENTS_NAME}" in str(jaxpr)
