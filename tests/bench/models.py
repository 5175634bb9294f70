"""Networks in Flax linen whose normalization is an argument: ResNets (He et al., 2015), an MLP.

`norm` makes a layer, as `functools.partial(BatchNorm, use_running_average=False)` does. With a
`policy` each block is rematerialized under it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Callable[..., nn.Module]


class Basic(nn.Module):
    """Two 3x3 convolutions, and around them a shortcut."""

    channels: int
    stride: int
    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _conv(self.channels, 3, self.stride, self.dtype)(x)
        y = nn.relu(self.norm()(y))
        y = _conv(self.channels, 3, 1, self.dtype)(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        return nn.relu(y + _shortcut(self, x, y.shape))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, and around them a shortcut."""

    channels: int
    stride: int
    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _conv(self.channels, 1, 1, self.dtype)(x)
        y = nn.relu(self.norm()(y))
        y = _conv(self.channels, 3, self.stride, self.dtype)(y)
        y = nn.relu(self.norm()(y))
        y = _conv(4 * self.channels, 1, 1, self.dtype)(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        return nn.relu(y + _shortcut(self, x, y.shape))


class ResNet(nn.Module):
    """Stages of residual blocks, each at half the resolution of the one before."""

    block: type[nn.Module]
    stages: Sequence[int]  # blocks in each
    channels: int  # in the first stage
    classes: int
    large_images: bool  # whether the stem takes a quarter of the resolution
    norm: Norm
    dtype: Any
    policy: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = _rematerialized(self.block, self.policy)
        x = _conv(self.channels, *((7, 2) if self.large_images else (3, 1)), self.dtype)(x)
        x = nn.relu(self.norm()(x))
        if self.large_images:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = block(self.channels * 2**i, stride, self.norm, self.dtype)(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class Hidden(nn.Module):
    """A dense layer, its normalization and the activation."""

    features: int
    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.features, use_bias=False, dtype=self.dtype)(x)
        return nn.relu(self.norm()(x))


class MLP(nn.Module):
    """Hidden layers and a linear one."""

    features: Sequence[int]
    classes: int
    norm: Norm
    dtype: Any
    policy: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = _rematerialized(Hidden, self.policy)
        for n in self.features:
            x = hidden(n, self.norm, self.dtype)(x)
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class Scanned(nn.Module):
    """Residual blocks in a loop: what JAX keeps of each is kept, whatever the compiler."""

    depth: int
    channels: int
    classes: int
    norm: Norm
    dtype: Any
    policy: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = _rematerialized(Basic, self.policy)
        blocks = nn.scan(
            lambda block, x: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x = _conv(self.channels, 3, 1, self.dtype)(x)
        x, _ = blocks(block(self.channels, 1, self.norm, self.dtype), x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


def resnet50(norm: Norm, policy: Any, dtype: Any) -> nn.Module:
    """For 224x224 images and 1000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), 64, 1000, True, norm, dtype, policy)


def small_resnet(norm: Norm, policy: Any, dtype: Any) -> nn.Module:
    """ResNet-20, for 32x32 images and 10 classes."""
    return ResNet(Basic, (3, 3, 3), 16, 10, False, norm, dtype, policy)


def scanned(norm: Norm, policy: Any, dtype: Any) -> nn.Module:
    """Sixteen convolutions of 128 channels, in eight blocks."""
    return Scanned(8, 128, 10, norm, dtype, policy)


def mlp(norm: Norm, policy: Any, dtype: Any) -> nn.Module:
    return MLP((1024, 1024, 1024), 10, norm, dtype, policy)


# How each is made, the shape of one example, and the number of classes.
MODELS = {
    "resnet50": (resnet50, (224, 224, 3), 1000),
    "small_resnet": (small_resnet, (32, 32, 3), 10),
    "scanned": (scanned, (32, 32, 3), 10),
    "mlp": (mlp, (784,), 10),
}


def _conv(features: int, size: int, stride: int, dtype: Any) -> nn.Conv:
    return nn.Conv(features, (size, size), (stride, stride), use_bias=False, dtype=dtype)


def _shortcut(block: Basic | Bottleneck, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if x.shape == shape:
        return x
    return block.norm()(_conv(shape[-1], 1, block.stride, block.dtype)(x))


def _rematerialized(module: type[nn.Module], policy: Any) -> type[nn.Module]:
    return module if policy is None else nn.remat(module, policy=policy)
