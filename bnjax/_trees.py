"""Over trees: the statistics of all layers of a network, paired with their moments by path."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from bnjax._average import Momentum, Stats, remember
from bnjax._covariance import CovMoments
from bnjax._moments import Moments
from bnjax._statistic import Statistic, merge_parts

Tree = Any
Path = tuple[str, ...]
STATISTICS: dict[str, type[Statistic]] = {"var": Moments, "cov": CovMoments}  # by their leaf
Layers = dict[Path, Stats]


def update_stats(
    batch_stats: Tree, moments: Tree, *, momentum: Momentum, debias: bool = False, ddof: int = 0
) -> Tree:
    """`ema` for all layers of a network: what their training calls do unless they only emit.

    For gradient accumulation emit the moments of every microbatch, merge them (`merge_stacked`
    if a scan has stacked them), and update once.

    Args:
      batch_stats: `{mean, var}` of each layer, and `steps` where updates are counted: linen's
        collection, or `nnx.state(model, nnx.BatchStat)`.
      moments: a `Moments` of each layer that was called: linen's collection `moments`, or
        `nnx.pop(model, bnjax.nnx.BatchMoments)`. Other layers stay as they are.
      momentum, debias, ddof: as in `ema`, the same for all layers.

    Returns:
      The new `batch_stats`, with the structure, shapes and dtypes of the old.

    Raises:
      ValueError: for moments of a layer that has no statistics, and as in `ema`.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> batch_stats = {"norm": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}
      >>> m = {"norm": {"moments": bnjax.moments(jnp.array([[2.0], [6.0]]))}}
      >>> print(bnjax.update_stats(batch_stats, m, momentum=0.75)["norm"]["var"])
      [1.75]
    """

    update = functools.partial(remember, momentum=momentum, debias=debias, ddof=ddof)
    return map_layers(update, batch_stats, moments)


def merge_stacked(tree: Tree) -> Tree:
    """Merges what is stacked along the first axis: microbatches, replicas, ghost batches.

      n = sum(n_i),  mean = sum(n_i mean_i) / n,  var = sum(n_i (var_i + |mean_i - mean|^2)) / n

    The variance between the parts belongs to the whole's, so this is no average: replicas that
    kept running statistics of their own become one batch norm over the data of all.

    Args:
      tree: a `Moments` or a tree of them, or a tree of `{mean, var}` (running statistics, whose
        parts weigh alike), with one more axis in front, as `lax.scan`, `jax.vmap` and
        `jax.pmap` stack.

    Raises:
      ValueError: for moments of one batch, and for layers without mean and var (or cov).

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> x = jnp.arange(12.0).reshape(3, 4, 1)
      >>> m = bnjax.merge_stacked(jax.vmap(bnjax.moments)(x))
      >>> print(m.mean, m.var.round(2), m.count)
      [5.5] [11.92] 12.0
      >>> replicas = {"norm": {"mean": jnp.array([[0.0], [10.0]]), "var": jnp.ones((2, 1))}}
      >>> print(bnjax.merge_stacked(replicas)["norm"]["var"])
      [26.]
    """

    if any(map(is_statistic, jax.tree.leaves(tree, is_leaf=is_statistic))):
        return jax.tree.map(_merge_parts, tree, is_leaf=is_statistic)
    layers, restore = split_layers(tree)
    return restore({path: _merge_stats(stats) for path, stats in layers.items()})


def _merge_parts(m: Statistic) -> Statistic:
    if np.ndim(m.count) == 0:
        raise ValueError(
            f"The count is one number, so this {type(m).__name__} is of one batch and nothing is "
            "stacked. Stack many as lax.scan and jax.vmap do; a list of them merges by "
            "functools.reduce(bnjax.merge, moments)."
        )
    parts = m.mean.shape[0]
    m = jax.tree.map(lambda p: jnp.broadcast_to(p, (parts, *np.shape(p)[1:])), m)
    return per_layer(merge_parts, stacked_layers(m) - 1, axis=1)(m)


def _merge_stats(stats: Stats) -> Stats:
    kind = statistic_of(stats)
    mean, steps = stats["mean"], stats.get("steps")
    second = stats[kind.second_name()]
    m = _merge_parts(kind.make(mean, second, jnp.ones(mean.shape[0])))
    merged = {"mean": m.mean.astype(mean.dtype), kind.second_name(): m.second.astype(second.dtype)}
    return merged | ({} if steps is None else {"steps": jnp.max(steps, 0)})


def map_layers(f: Callable[[Stats, Statistic], Any], batch_stats: Tree, moments: Tree) -> Tree:
    """f for each layer that has moments; the others stay."""
    layers, restore = split_layers(batch_stats)
    return restore(layers | zip_layers(f, layers, moments))


def zip_layers(
    f: Callable[[Stats, Statistic], Any], layers: Layers, moments: Tree
) -> dict[Path, Any]:
    """f of the statistics and the moments of each layer that has both."""
    results = {}
    for path, m in moments_by_path(moments).items():
        if path not in layers:
            raise ValueError(
                f"moments holds the layer {name_of(path)}, but batch_stats has statistics only "
                f"of {', '.join(map(name_of, layers)) or 'none'}. Take both from one network."
            )
        stats = layers[path]
        if not {"mean", m.second_name()} <= set(stats):
            raise ValueError(
                f"moments has a {type(m).__name__} for the layer {name_of(path)}, but batch_stats "
                f"has {', '.join(stats)} of it. Take both from one network."
            )
        stacked = np.ndim(stats["steps"]) if "steps" in stats else stacked_layers(m)
        results[path] = per_layer(f, stacked)(stats, m)
    return results


def per_layer(f: Callable[..., Any], stacked: int, axis: int = 0) -> Callable[..., Any]:
    """f for each of the layers that `nn.scan` or a vmap has stacked along so many axes."""
    for _ in range(stacked):
        f = jax.vmap(f, in_axes=axis)
    return f


def stacked_layers(m: Statistic) -> int:
    """Along how many axes: a count is `[*features]` or, of each layer, a scalar."""
    return np.ndim(m.count) if np.ndim(m.count) < np.ndim(m.mean) else 0


def split_layers(batch_stats: Tree) -> tuple[Layers, Callable[[Layers], Tree]]:
    """The statistics of each layer by its path, and how to build such a tree again."""
    for m in filter(is_statistic, jax.tree.leaves(batch_stats, is_leaf=is_statistic)):
        raise ValueError(
            f"batch_stats holds a {type(m).__name__}, but running statistics are "
            f"{{'mean': ..., {m.second_name()!r}: ...}} of each layer, as linen's batch_stats and "
            "nnx.state(model, nnx.BatchStat) hold them. For one Moments use bnjax.ema."
        )
    leaves, treedef = tree_flatten_with_path(batch_stats)
    paths = [path_of(keys) for keys, _ in leaves]
    layers: Layers = {}
    for (*layer, name), (_, leaf) in zip(paths, leaves, strict=True):
        layers.setdefault(tuple(layer), {})[name] = leaf

    def restore(layers: Layers) -> Tree:
        return jax.tree.unflatten(treedef, [layers[tuple(layer)][name] for *layer, name in paths])

    return layers, restore


def moments_by_path(moments: Tree) -> dict[Path, Statistic]:
    """The moments of each layer, by the path of the layer."""
    leaves, _ = tree_flatten_with_path(moments, is_leaf=is_statistic)
    paths = [path_of(keys) for keys, _ in leaves]
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        if not is_statistic(leaf):
            raise ValueError(
                f"moments holds an array at {name_of(path)}, but what layers emit are Moments. "
                "Give linen's collection alone, updates['moments'], or what "
                "nnx.pop(model, bnjax.nnx.BatchMoments) returns."
            )
    layers = (path[:-1] if path[-1:] == ("moments",) else path for path in paths)
    return dict(zip(layers, (m for _, m in leaves), strict=True))


def path_of(keys: tuple[Any, ...]) -> Path:
    """The names on the way to a leaf, without the attribute in which a variable keeps it."""
    return tuple(str(getattr(k, "key", k)) for k in keys if not isinstance(k, GetAttrKey))


def name_of(path: Path) -> str:
    """What tables and errors call a layer."""
    return "/".join(path) or "(the network itself)"


def is_statistic(node: Any) -> bool:
    """Whether a node of a tree is one layer's moments."""
    return isinstance(node, tuple(STATISTICS.values()))


def statistic_of(stats: Stats) -> type[Statistic]:
    """What kind of statistic a layer remembers."""
    for name, kind in STATISTICS.items():
        if {"mean", name} <= set(stats):
            return kind
    raise ValueError(
        f"A layer has {', '.join(stats) or 'nothing'}, but running statistics are mean and one of "
        f"{', '.join(STATISTICS)}. Give batch_stats alone."
    )
