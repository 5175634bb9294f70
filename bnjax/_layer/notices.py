"""What a layer tells its user, at the user's line: warnings."""

import inspect
import math
import warnings

from jax import lax

from bnjax._arguments import Axes, Shape, split_axes
from bnjax._statistic import AxisName

LIBRARIES = "bnjax", "contextlib", "flax", "jax"  # whose lines are not the user's


def warn(message: str) -> None:
    """A warning at the line that called the layer, however many wrappers lie in between.

    From Python 3.12 on `skip_file_prefixes` does this.
    """
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_back and frame.f_globals["__name__"].split(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_of_single_values(shape: Shape, axis: Axes, axis_name: AxisName | None) -> None:
    """Where a batch has one value per feature."""
    replicas = 1 if axis_name is None else lax.psum(1, axis_name)
    _, reduced = split_axes(axis, shape)
    if math.prod(shape[i] for i in reduced) * replicas == 1:
        warn(
            f"x has shape {shape}, one value per feature, so the output is the bias. "
            "Train with more examples, or pass use_running_average=True."
        )
