"""`steps`: the number of updates so far, of layers where something depends on it."""

from collections.abc import Callable

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bnjax._arguments import is_static
from bnjax._average import Stats, as_steps
from bnjax._layer.call import Layer
from bnjax._layer.notices import warn
from bnjax._layer.recipe import Recipe
from bnjax._statistic import M


def counts_steps(layer: Layer, recipe: Recipe[M]) -> bool:
    """Whether something in the layer depends on the number of updates before."""
    by_average = layer.debias or layer.momentum is None or callable(layer.momentum)
    return by_average or recipe.counts_steps


def read_steps(
    layer: Layer, steps: ArrayLike | None, stats: Stats, start: Callable[[], Stats]
) -> Array:
    """The steps beside these statistics, as an array.

    Warns where they are missing or 0 and the average would take trained statistics for those
    of the `start`, as far as values can be seen.
    """
    if (layer.debias or layer.momentum is None) and _is_zero(steps):
        seen = [name for name, p in stats.items() if is_static(p)]
        hidden = steps is None and len(seen) < len(stats)
        known = "are" if not hidden else "may be"
        if hidden or any(not np.array_equal(stats[name], start()[name]) for name in seen):
            warn(
                f"Steps are 0 or missing, but the running statistics {known} trained. "
                "Counted from 0, momentum=None and debias=True replace them in the first step. "
                "Give the number of updates that they come from as steps."
            )
    return as_steps(0 if steps is None else steps)


def _is_zero(steps: ArrayLike | None) -> bool:
    return steps is None or (is_static(steps) and not np.any(steps))
