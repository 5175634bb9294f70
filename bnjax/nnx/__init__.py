"""The Flax NNX layers: flax's constructors, variables and behaviour over bnjax's functions."""

from bnjax.nnx._base import BatchMoments
from bnjax.nnx._batch_norm import BatchNorm, BatchRenorm
from bnjax.nnx._decorrelated import DecorrelatedBatchNorm
from bnjax.nnx._fold import fold

__all__ = ["BatchMoments", "BatchNorm", "BatchRenorm", "DecorrelatedBatchNorm", "fold"]

for _public in BatchMoments, BatchNorm, BatchRenorm, DecorrelatedBatchNorm, fold:
    _public.__module__ = __name__  # where pickles look for it


def __dir__() -> list[str]:
    return __all__
