"""How far the results of a program are from what they were."""

import jax
import numpy as np


def difference(ours, theirs):
    """The largest one between leaves of two trees, as a share of the leaf's largest number if
    that is above 1."""
    pairs = zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)
    return max(np.abs(np.subtract(a, b)).max() / max(np.abs(b).max(), 1.0) for a, b in pairs)
