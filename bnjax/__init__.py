"""Batch normalization for JAX and Flax: accurate, mask-aware, on any number of devices.

    m = bnjax.moments(x)                                # measure
    y = bnjax.normalize(x, m, scale, bias)              # apply
    running = bnjax.ema(running, m, momentum=0.99)      # remember

`bnjax.linen` and `bnjax.nnx` hold the Flax layers; they load flax on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bnjax._average import ema as ema
from bnjax._covariance import CovMoments as CovMoments
from bnjax._covariance import cov_moments as cov_moments
from bnjax._decay import decay_mask as decay_mask
from bnjax._drift import drift as drift
from bnjax._drift import drift_table as drift_table
from bnjax._fold import fold as fold
from bnjax._moments import Moments as Moments
from bnjax._moments import moments as moments
from bnjax._normalize import affine as affine
from bnjax._normalize import batch_norm as batch_norm
from bnjax._normalize import normalize as normalize
from bnjax._recalibrate import recalibrate as recalibrate
from bnjax._renormalize import batch_renorm as batch_renorm
from bnjax._statistic import merge as merge
from bnjax._statistic import pmerge as pmerge
from bnjax._torch import from_torch as from_torch
from bnjax._torch import from_torch_model as from_torch_model
from bnjax._torch import to_torch as to_torch
from bnjax._trees import merge_stacked as merge_stacked
from bnjax._trees import update_stats as update_stats
from bnjax._whiten import whiten as whiten
from bnjax._xla import MOMENTS_NAME as MOMENTS_NAME
from bnjax._xla import convs_and_dots_saveable as convs_and_dots_saveable

if TYPE_CHECKING:
    from bnjax import linen as linen
    from bnjax import nnx as nnx

__version__ = "0.1.0"

__all__ = [
    "MOMENTS_NAME",
    "CovMoments",
    "Moments",
    "affine",
    "batch_norm",
    "batch_renorm",
    "convs_and_dots_saveable",
    "cov_moments",
    "decay_mask",
    "drift",
    "drift_table",
    "ema",
    "fold",
    "from_torch",
    "from_torch_model",
    "linen",
    "merge",
    "merge_stacked",
    "moments",
    "nnx",
    "normalize",
    "pmerge",
    "recalibrate",
    "to_torch",
    "update_stats",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name in ("linen", "nnx"):
        return importlib.import_module(f"bnjax.{name}")
    raise AttributeError(f"module 'bnjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
