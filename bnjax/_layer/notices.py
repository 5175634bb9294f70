"""What a layer warns its user of, at the user's line."""

import inspect
import math
import warnings

from jax import lax

from bnjax._arguments import Axes, Shape, split_axes
from bnjax._statistic import AxisName, Groups

LIBRARIES = "bnjax", "flax", "jax"  # which stand between a layer and its user


def warn(message: str) -> None:
    """Warns at the line that called the layer, however deep in wrappers and transformations.

    From Python 3.12 on `warnings.warn` can do this itself, by `skip_file_prefixes`.
    """
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_back and _is_of_libraries(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_of_libraries(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


def warn_of_single_values(
    output: str, shape: Shape, axis: Axes, axis_name: AxisName | None = None, groups: Groups = None
) -> None:
    """Where a batch, or that of a group, has one value per feature, and what the output then is."""
    replicas = 1
    if axis_name is not None:
        replicas = min(map(len, groups)) if groups else lax.psum(1, axis_name)
    _, reduced = split_axes(axis, shape)
    if math.prod(shape[i] for i in reduced) * replicas == 1:
        warn(
            f"One value per feature: x has shape {shape}, so the output is {output}. "
            "Train with more examples, or pass use_running_average=True."
        )
