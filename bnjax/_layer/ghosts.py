"""Ghost batches: consecutive parts of a batch that are normalized each by itself."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from bnjax._arguments import Axes, check_not_empty, is_whole, read_mask, split_axes
from bnjax._statistic import M
from bnjax._trees import merge_stacked


def in_ghosts(
    train: Callable[[Array, Array | None], tuple[Array, M]],
    x: Array,
    mask: ArrayLike | None,
    size: int,
    feature_axis: Axes,
) -> tuple[Array, M]:
    """y and the merged moments of train(x, mask), run on `size` examples at a time.

    The groups are a new axis in front, which vmap hides from `train`. So `merge_stacked` sees
    what the batch's parts give, with no loop and no slice of an axis that may be sharded.
    """
    features, _ = split_axes(feature_axis, x.shape)
    _check_size(size, x, features)
    weights = read_mask(mask, x.shape, features)
    shared = weights is None or weights.shape[0] == 1

    def split(a: Array) -> Array:
        return a.reshape(a.shape[0] // size, size, *a.shape[1:])

    parts = weights if weights is None or shared else split(weights)
    y, m = jax.vmap(train, in_axes=(0, None if shared else 0))(split(x), parts)
    return y.reshape(x.shape), merge_stacked(m)


def _check_size(size: int, x: Array, features: tuple[int, ...]) -> None:
    if not is_whole(size) or size < 1:
        raise ValueError(
            f"ghost_batch_size is {size}, but it is a number of examples. "
            "Choose a positive one that divides the batch, or None for the whole batch."
        )
    if 0 in features:
        raise ValueError(
            f"ghost_batch_size is {size}, but the first axis of x holds features, not examples. "
            "Move the examples there with jnp.moveaxis."
        )
    rows = x.shape[0]
    check_not_empty(x.shape, x.size)
    if rows % size != 0:
        cure = "Choose a size that divides it, or drop the incomplete batch."
        if not isinstance(rows, int):
            cure = f"Write the number of examples as a multiple of the size, such as {size}*n."
        raise ValueError(
            f"ghost_batch_size is {size}, but x has shape {x.shape}: its first axis does not "
            f"divide evenly. {cure} "
            "If another axis holds the examples, move it to the front with jnp.moveaxis."
        )
    shards = _explicit_shards(x)
    if rows // shards % size != 0:
        raise ValueError(
            f"ghost_batch_size is {size}, but x has {rows} examples on {shards} shards of an "
            "explicit mesh, and no ghost batch can lie on two. Choose a size that divides "
            f"{rows // shards}, or a mesh with automatic axes."
        )


def _explicit_shards(x: Array) -> int:
    """Over how many parts of an explicit mesh the first axis lies: JAX does not reshape across."""
    sharding: Any = jax.typeof(x).sharding
    over = sharding.spec[0] if len(sharding.spec) else None
    names = over if isinstance(over, tuple) else (over,)
    return math.prod(sharding.mesh.shape[name] for name in names if name is not None)
