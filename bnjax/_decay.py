"""What weight decay is for, found from the variables."""

from typing import Any

import jax
import numpy as np
from jax.tree_util import tree_flatten_with_path

from bnjax._trees import Tree, path_of, split_layers


def decay_mask(params: Tree, batch_stats: Tree) -> Tree:
    """Which parameters weight decay is for: all but the scales and biases of batch norms.

    They are found from the variables: beside running statistics, and of the shape of one of
    these. Names and ranks play no part, so the biases of other layers do decay.

    Args:
      params: linen's `variables["params"]`, or NNX's `nnx.state(model, nnx.Param)`.
      batch_stats: linen's `variables["batch_stats"]`, or `nnx.state(model, nnx.BatchStat)`.

    Returns:
      A tree like `params` (without NNX's variables around its leaves) that has True where weights
      decay: the `mask` of `optax.adamw` and `optax.add_decayed_weights`, also in
      `nnx.Optimizer`, and the labels of `optax.multi_transform`.

    Raises:
      ValueError: for whole variables instead of the two collections.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
      ...     "BatchNorm_0": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
      >>> batch_stats = {"BatchNorm_0": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
      >>> mask = bnjax.decay_mask(params, batch_stats)
      >>> print(mask["Dense_0"], mask["BatchNorm_0"])
      {'bias': True, 'kernel': True} {'bias': False, 'scale': False}
    """
    leaves, treedef = tree_flatten_with_path(params, is_leaf=_is_box)
    paths = [path_of(keys) for keys, _ in leaves]
    layers, _ = split_layers(batch_stats)
    for name, top in (("params", paths), ("batch_stats", layers)):
        if any(path[:1] == (name,) for path in top):
            raise ValueError(
                f"{name} has an entry {name!r}, as the whole variables have. "
                'Give variables["params"] and variables["batch_stats"].'
            )
    shapes = {path: {np.shape(p) for p in stats.values()} for path, stats in layers.items()}
    decays = [
        np.shape(*jax.tree.leaves(p)) not in shapes.get(path[:-1], ())
        for path, (_, p) in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, decays)


def _is_box(node: Any) -> bool:
    """Whether this is NNX's variable or linen's box: optax sees some trees with, some without."""
    return hasattr(node, "get_metadata") or hasattr(node, "unbox")
