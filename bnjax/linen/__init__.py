"""The Flax linen layers: flax's fields, variables and behaviour over bnjax's functions."""

from bnjax.linen._batch_norm import BatchNorm, BatchRenorm
from bnjax.linen._decorrelated import DecorrelatedBatchNorm
from bnjax.linen._fold import apply_folded, fold

__all__ = ["BatchNorm", "BatchRenorm", "DecorrelatedBatchNorm", "apply_folded", "fold"]

for _public in BatchNorm, BatchRenorm, DecorrelatedBatchNorm, apply_folded, fold:
    _public.__module__ = __name__  # where pickles and linen look for it


def __dir__() -> list[str]:
    return __all__
