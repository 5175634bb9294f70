"""Replace running statistics by the exact moments of a data set."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bnjax._arguments import read_ddof
from bnjax._average import Stats, ema
from bnjax._statistic import Statistic, merge
from bnjax._trees import (
    Tree,
    is_statistic,
    map_layers,
    moments_by_path,
    name_of,
    per_layer,
    stacked_layers,
)


def recalibrate(
    measure: Callable[[Any], Tree],
    batch_stats: Tree,
    batches: Iterable[Any],
    *,
    ddof: int = 0,
    progress: bool = False,
) -> Tree:
    """Replaces the running statistics by the exact moments of a data set (precise batch norm).

    All batches merge, weighted by their counts: with a short last one, masks or sample weights
    the result is that of the data set as one batch. For evaluation after weights have been
    averaged (EMA, SWA), and before deployment (Wu and Johnson, 2021).

    Args:
      measure: gives the moments of the network's layers on one of the batches, in training mode.
        It is the caller's, and so are keys, further inputs and sharding. Pass it jitted;
        `recalibrate` itself looks at what comes out, so it runs outside jit.
      batch_stats: the statistics to replace, as in `update_stats`. Layers that have no moments
        and features without any value stay as they are, and so does every `steps`.
      batches: passed to `measure` one after the other; none is kept.
      ddof: 1 for the unbiased variance.
      progress: whether to show a bar (needs tqdm).

    Returns:
      The new `batch_stats`. A batch whose moments are not finite is left out, with a warning
      that says which.

    Raises:
      ValueError: where there is no batch, none with finite moments, or no moments at all, and
        where batches have moments of different layers.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> x = jnp.arange(10.0)[:, None]
      >>> stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> stats = bnjax.recalibrate(jax.jit(bnjax.moments), stats, [x[:4], x[4:8], x[8:]])
      >>> print(stats["mean"], stats["var"])
      [4.5] [8.25]
    """
    ddof = read_ddof(ddof)
    total, finite = None, []
    for i, batch in enumerate(_with_bar(batches) if progress else batches):
        moments = measure(batch)
        if i:
            _check_layers(i, moments, total)
        total, is_finite = _add(total, moments)
        finite.append(is_finite)  # looked at in the end: until then nothing waits for the device
    if finite and not moments_by_path(total):
        raise ValueError(
            "measure gave no moments. Call the network in training mode, linen's with "
            'mutable=["moments", "batch_stats"], NNX\'s with emit=True, and return what it emits.'
        )
    bad = [i for i, is_finite in enumerate(finite) if not is_finite]
    if len(bad) == len(finite):
        raise ValueError(
            f"batches has {len(finite)} batches, and none with finite moments. The statistics "
            "are as they were. Give batches that the network can be trained on."
        )
    if bad:
        warnings.warn(
            f"The moments of batches {bad} (counted from 0) are not finite. These batches are "
            "left out, all others count.",
            stacklevel=2,
        )

    def replace(stats: Stats, m: Statistic) -> Stats:
        mean, second = stats["mean"], stats[m.second_name()]
        fresh = m.make(jnp.zeros_like(mean), jnp.zeros_like(second))
        exact = ema(fresh, m, momentum=0, ddof=ddof)
        mean = jnp.where(m.count > 0, exact.mean, mean)
        second = jnp.where(m.count > ddof, exact.second, second)
        return stats | {"mean": mean, m.second_name(): second}

    return map_layers(replace, batch_stats, total)


def _check_layers(i: int, moments: Tree, total: Tree) -> None:
    now, before = (set(map(name_of, moments_by_path(m))) for m in (moments, total))
    if now != before:
        raise ValueError(
            f"measure gave moments of {_listed(now)} for batch {i} (counted from 0), but of "
            f"{_listed(before)} for those before it. Give those of the same layers for each batch."
        )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "no layer"


@jax.jit
def _add(total: Tree | None, moments: Tree) -> tuple[Tree, Array]:
    """The merge, and whether the new moments are finite; otherwise the total stays."""
    finite = jnp.all(jnp.array([_is_finite(m) for m in moments_by_path(moments).values()]))
    if total is None:
        total = jax.tree.map(jnp.zeros_like, moments)
    merged = jax.tree.map(_merge, total, moments, is_leaf=is_statistic)
    return jax.tree.map(lambda old, new: jnp.where(finite, new, old), total, merged), finite


def _is_finite(m: Statistic) -> Array:
    """Whether all is, but for what counts nothing."""

    def is_finite(m: Statistic) -> Array:
        parts = (jnp.where(m.count == 0, 0, p) for p in (m.mean, m.second, m.remainder, m.count))
        return jnp.all(jnp.array([jnp.isfinite(p).all() for p in parts]))

    return jnp.all(per_layer(is_finite, stacked_layers(m))(m))


def _merge(a: Statistic, b: Statistic) -> Statistic:
    return per_layer(merge, stacked_layers(b))(a, b)


def _with_bar(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress is True, and the bar needs tqdm. Install it, or leave progress out."
        ) from error
    return tqdm(batches, desc="recalibrate", unit="batch")
