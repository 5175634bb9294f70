"""Fold the arrays of one layer: the linear layer alone does what it and its batch norm did."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import assert_refused
from samples import covering

import bnjax

EPSILON = 1e-3


def trained(features, seed=0):
    """Running statistics, scale and bias of a batch norm somewhere in a trained network."""
    rng = np.random.default_rng(seed)
    mean, scale, bias = rng.standard_normal((3, *features))
    return bnjax.Moments(mean, rng.uniform(0.2, 3, features)), scale, bias


def float32(tree):
    return jax.tree.map(np.float32, tree)


def assert_relative(ours, true, tolerance=1e-5):
    assert ours.shape == true.shape
    ours = np.asarray(ours, np.float64)
    assert np.abs(ours - true).max() <= tolerance * np.abs(true).max()


def assert_folds(layer, x_shape, *, norm_axes=(-1,), feature_axis=-1, sizes=None):
    """The folded linen layer alone gives the normalized output of the layer, in float64."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal(x_shape).astype(np.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    params = {name: rng.standard_normal(p.shape).astype(np.float32) for name, p in shapes.items()}
    y = jax.eval_shape(layer.apply, {"params": shapes}, x)
    m, scale, shift = trained(tuple(y.shape[i] for i in norm_axes))

    @jax.jit
    def both(params, x, m, scale, shift):
        """The layer's output, and that of the folded layer alone."""
        kernel, bias = bnjax.fold(
            params["kernel"],
            params.get("bias"),
            m,
            scale,
            shift,
            feature_axis=feature_axis,
            epsilon=EPSILON,
        )
        assert kernel.dtype == bias.dtype == jnp.float32
        folded = layer.clone(use_bias=True)
        y = layer.apply({"params": params}, x)
        return y, folded.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    y, alone = both(params, x, *float32((m, scale, shift)))
    true = reference.normalize(
        y, m.mean, m.var, scale, shift, feature_axis=norm_axes, epsilon=EPSILON
    ).astype(np.float64)
    assert_relative(alone, true)


@pytest.mark.parametrize(
    "fields",
    covering(
        padding=["SAME", "VALID", "CIRCULAR", "REFLECT", 1, ((0, 2), (1, 0))],
        strides=[1, 2],
        feature_group_count=[1, 2, 4],
        kernel_dilation=[1, 2],
        use_bias=[True, False],
    ),
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_folding_into_a_convolution(fields):
    assert_folds(nn.Conv(8, (3, 3), **fields), (2, 7, 6, 4))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("ndim", [1, 3])
def test_folding_into_convolutions_of_other_ranks(ndim, strides, use_bias):
    padding = "CAUSAL" if ndim == 1 else "SAME"
    layer = nn.Conv(5, (3,) * ndim, strides, padding, use_bias=use_bias)
    assert_folds(layer, (2, *[4] * ndim, 3))


@pytest.mark.parametrize(
    "fields",
    covering(
        padding=["SAME", "VALID", "CIRCULAR", ((0, 2), (1, 0))],
        strides=[(1, 1), (2, 2)],
        transpose_kernel=[True, False],
        kernel_dilation=[(1, 1), (2, 2)],
        use_bias=[True, False],
    ),
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_folding_into_a_transposed_convolution(fields):
    layer = nn.ConvTranspose(5, (3, 2), **fields)
    assert_folds(layer, (2, 4, 5, 3), feature_axis=-2 if fields["transpose_kernel"] else -1)


@pytest.mark.parametrize("use_bias", [True, False])
def test_folding_into_a_dense_layer(use_bias):
    assert_folds(nn.Dense(5, use_bias=use_bias), (6, 3))
    assert_folds(nn.DenseGeneral(5, axis=(1, 2), use_bias=use_bias), (6, 3, 4))
    several = nn.DenseGeneral((2, 5), use_bias=use_bias)
    assert_folds(several, (6, 3), norm_axes=(-2, -1), feature_axis=(-2, -1))
    batched = nn.DenseGeneral((2, 5), batch_dims=(0,), use_bias=use_bias)
    assert_folds(batched, (3, 6, 4), norm_axes=(0, -2, -1), feature_axis=(0, -2, -1))


def torch_linear(x, kernel, bias):
    """As PyTorch's documentation says it: kernel `[out, in]`."""
    return x @ kernel.T + bias


def torch_conv(x, kernel, bias, stride=1, groups=1):
    """Channels first; kernel `[out, in / groups, height, width]`."""
    (out, per_group, *size), channels = kernel.shape, np.arange(x.shape[1])
    windows = np.lib.stride_tricks.sliding_window_view(x, size, (2, 3))[:, :, ::stride, ::stride]
    y = np.zeros((len(x), out, *windows.shape[2:4]))
    for o in range(out):
        own = channels // per_group == o // (out // groups)
        y[:, o] = np.einsum("nchwij,cij->nhw", windows[:, own], kernel[o])
    return y + bias[:, None, None]


def torch_conv_transpose(x, kernel, bias, stride=1, groups=1):
    """Channels first; kernel `[in, out / groups, height, width]`: each value of x lays one down."""
    n, channels, height, width = x.shape
    _, per_group, *size = kernel.shape
    up = [(length - 1) * stride + k for length, k in zip((height, width), size, strict=True)]
    y = np.zeros((n, groups, per_group, *up))
    for c, i, j in np.ndindex(channels, height, width):
        place = np.s_[:, c * groups // channels, :, i * stride :, j * stride :]
        y[place][..., : size[0], : size[1]] += np.multiply.outer(x[:, c, i, j], kernel[c])
    return y.reshape(n, groups * per_group, *up) + bias[:, None, None]


@pytest.mark.parametrize(
    ("layer", "kernel_shape", "groups", "feature_axis"),
    [
        (torch_linear, (4, 4), 1, 0),
        (torch_conv, (4, 4, 3, 2), 1, 0),
        (torch_conv, (4, 2, 3, 2), 2, 0),
        (torch_conv_transpose, (4, 4, 3, 2), 1, 1),
        (torch_conv_transpose, (4, 3, 3, 2), 2, (0, 2)),
        (torch_conv_transpose, (4, 1, 3, 2), 4, (0, 2)),
    ],
    ids=["Linear", "Conv", "Conv-2", "ConvTranspose", "ConvTranspose-2", "ConvTranspose-4"],
)
def test_folding_into_pytorchs_layers(layer, kernel_shape, groups, feature_axis):
    """The axes that the docstring says; sizes that agree would hide another."""
    rng = np.random.default_rng(0)
    settings = {} if layer is torch_linear else {"stride": 2, "groups": groups}
    x = rng.standard_normal((5, 4) if layer is torch_linear else (2, 4, 5, 6))
    kernel = rng.standard_normal(kernel_shape)
    out = kernel_shape[1] * groups if layer is torch_conv_transpose else kernel_shape[0]
    own = rng.standard_normal(out)
    m, scale, bias = trained((out,))
    y = layer(x, kernel, own, **settings)
    true = reference.normalize(
        y, m.mean, m.var, scale, bias, feature_axis=1, epsilon=EPSILON
    ).astype(np.float64)

    kernels, features = kernel.shape, (out,)
    if feature_axis == (0, 2):
        kernels = (groups, kernel_shape[0] // groups, *kernel_shape[1:])
        features = (groups, out // groups)
    arrays = [p.reshape(features) for p in (m.mean, m.var, scale, bias, own)]
    mean, var, scale, bias, own = float32(arrays)
    folded, shift = bnjax.fold(
        float32(kernel.reshape(kernels)),
        own,
        bnjax.Moments(mean, var),
        scale,
        bias,
        feature_axis=feature_axis,
        epsilon=EPSILON,
    )
    folded, shift = np.float64(folded).reshape(kernel_shape), np.float64(shift).reshape(out)
    assert_relative(layer(x, folded, shift, **settings), true)


def test_folding_keeps_the_dtypes_of_the_layer():
    m, scale, bias = float32(trained((4,)))
    half = jnp.ones((3, 4), jnp.bfloat16)
    assert [p.dtype for p in bnjax.fold(half, None, m)] == [jnp.bfloat16] * 2
    kernel, own = bnjax.fold(half, jnp.ones(4), m, scale, bias)
    assert (kernel.dtype, own.dtype) == (jnp.bfloat16, jnp.float32)
    assert_relative(kernel.astype(jnp.float32), np.tile(scale / np.sqrt(m.var), (3, 1)), 5e-3)


def test_folding_a_complex_normalization():
    rng = np.random.default_rng(0)
    x, w, mean, scale = (
        (rng.standard_normal((2, *s)) * [[[1]], [[1j]]]).sum(0).astype(np.complex64)
        for s in [(6, 3), (3, 4), (1, 4), (1, 4)]
    )
    m, scale = bnjax.Moments(mean[0], jnp.arange(1.0, 5)), scale[0]
    for kernel in (w, w.real):
        true = (x @ kernel - mean) / np.sqrt(np.arange(1.0, 5) + 1e-5) * scale
        folded, bias = bnjax.fold(kernel, None, m, scale)
        np.testing.assert_allclose(x @ np.asarray(folded) + np.asarray(bias), true, rtol=1e-4)


def test_folding_refuses_what_does_not_fit():
    kernel, m = jnp.ones((3, 4)), bnjax.Moments(jnp.ones(4), jnp.ones(4))
    end = "Give one value for each feature, or another feature_axis."
    said = "but kernel has shape (3, 4) and features of shape"
    for name, args in {
        "kernel_bias": (kernel, jnp.ones(3), m),
        "mean": (kernel, None, m._replace(mean=jnp.ones(3))),
        "var": (kernel, None, m._replace(var=jnp.ones(3))),
        "scale": (kernel, None, m, jnp.ones(3)),
        "bias": (kernel, None, m, None, jnp.ones(3)),
    }.items():
        message = f"{name} has shape (3,), {said} (4,) on axis -1. {end}"
        assert_refused(lambda args=args: bnjax.fold(*args), message)
    assert_refused(
        lambda: bnjax.fold(kernel, None, m, feature_axis=0),
        f"mean has shape (4,), {said} (3,) on axis 0. {end}",
    )
    assert_refused(
        lambda: bnjax.fold(kernel, None, m, feature_axis=2),
        "feature_axis (a layer's axis) is 2, but kernel has shape (3, 4). Choose from -2 to 1.",
    )
    assert_refused(
        lambda: bnjax.fold(kernel, None, m, epsilon=0),
        "epsilon is 0, but it keeps the variance away from zero. "
        "Choose a positive number, such as 1e-5.",
    )
