"""Compare running statistics with a batch's: why is evaluation worse than training?"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bnjax._arguments import check_epsilon, promote
from bnjax._average import Stats
from bnjax._rounding import real_dtype
from bnjax._statistic import Statistic, cast, check_alike
from bnjax._trees import (
    Tree,
    name_of,
    split_layers,
    zip_layers,
)


class Drift(NamedTuple):
    """How far a layer's running statistics are from a batch's, for each feature.

    Attributes:
      divergence: `[*features]`, in nats: 0 where they agree; 0.5 is a mean that is off by one
        standard deviation.
      zscore: `[*features]`, the batch's mean in running standard deviations.
      dead: `[*features]`, whether all values of the batch were the same.
      stderr: `[*features]`, the standard error of the batch's mean in the same unit: |zscore| of
        about that size, up to four times among many features, is what so few values show by
        chance. Positions of one image are not independent, and show more.
    """

    divergence: Array
    zscore: Array
    dead: Array
    stderr: Array


def drift(batch_stats: Tree, moments: Tree, *, epsilon: ArrayLike = 1e-5) -> dict[str, Drift]:
    """How far each layer's running statistics are from a batch's moments.

    Taken as normal distributions, with r = (var + epsilon) / (running.var + epsilon) and
    z = (mean - running.mean) / sqrt(running.var + epsilon):

      divergence = (r - 1 - log(r) + |z|^2) / 2
      stderr = sqrt(var / count / (running.var + epsilon))

    The first is the Kullback-Leibler divergence of the batch from what evaluation assumes (Kullback
    and Leibler, 1951). Moments that were emitted in training mode do not depend on the running
    statistics, so a layer is not blamed for what another one does. A feature of count 0 has
    drifted by 0 and is not dead.

    Args:
      batch_stats, moments: as in `update_stats`.
      epsilon: the layers' own; positive.

    Returns:
      A `Drift` for each layer that has moments, by the names on its path. `drift_table` prints it.

    Raises:
      ValueError: for moments of a layer that has no statistics, and for an epsilon that is not
        positive.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> batch_stats = {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
      >>> m = {"norm": {"moments": bnjax.moments(jnp.array([[1.0, 7.0], [3.0, 7.0]]))}}
      >>> d = bnjax.drift(batch_stats, m)["norm"]
      >>> print(d.zscore.round(2), d.divergence.round(2), d.dead, d.stderr.round(2))
      [2. 7.] [ 2.   29.76] [False  True] [0.71 0.  ]
    """
    check_epsilon(epsilon)

    def compare(stats: Stats, m: Statistic) -> Drift:
        running = m.make(stats["mean"], stats[m.second_name()])
        check_alike(("batch_stats", "moments"), running, m)
        dtype = promote(jnp.result_type(running.mean), jnp.result_type(m.mean))
        running, m = cast(running, dtype), cast(m, dtype)
        var = running.var + jnp.asarray(epsilon, real_dtype(dtype))
        ratio = (m.var + jnp.asarray(epsilon, real_dtype(dtype))) / var
        z = (m.mean - running.mean + m.remainder) / jnp.sqrt(var)
        divergence = 0.5 * (ratio - 1 - jnp.log(ratio) + jnp.abs(z) ** 2)
        resolution = jnp.finfo(m.var.dtype).eps * jnp.abs(m.mean)
        dead = jnp.sqrt(m.var) <= resolution
        seen = m.count > 0
        stderr = jnp.sqrt(m.var / jnp.where(seen, m.count, 1).astype(m.var.dtype) / var)
        divergence, z, stderr = (jnp.where(seen, p, 0) for p in (divergence, z, stderr))
        return Drift(divergence, z, seen & dead, stderr)

    layers, _ = split_layers(batch_stats)
    return {name_of(path): d for path, d in zip_layers(compare, layers, moments).items()}


def drift_table(drifts: dict[str, Drift]) -> str:
    """The result of `drift` as a table for people, with the layer to blame on top.

    That is one with NaN, then the largest divergence. The standard error is that of the feature
    with the largest |z|.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> batch_stats = {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
      >>> m = {"norm": {"moments": bnjax.moments(jnp.array([[1.0, 7.0], [3.0, 7.0]]))}}
      >>> print(bnjax.drift_table(bnjax.drift(batch_stats, m)))
      layer  features  dead  divergence (nats): mean    max  largest |z|  standard error
      norm          2     1                    15.88  29.76            7               0
    """
    heads = "features", "dead", "divergence (nats): mean", "max", "largest |z|", "standard error"
    rows: list[tuple[str, ...]] = [("layer", *heads)]
    for name, d in sorted(drifts.items(), key=_blame):
        z = np.abs(d.zscore).ravel()
        farthest = np.argmax(z)  # NaN, where there is one
        stderr = np.ravel(d.stderr)[farthest]
        figures = np.mean(d.divergence), np.max(d.divergence), z[farthest], stderr
        cells = (f"{figure:.4g}" for figure in figures)
        rows.append((name, str(np.size(d.dead)), str(np.sum(d.dead)), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join(lines)


def _blame(item: tuple[str, Drift]) -> tuple[bool, float]:
    """Sorts layers: NaN first, which is no number to sort by, then the largest divergence."""
    worst = float(np.max(item[1].divergence))
    return not np.isnan(worst), -worst
