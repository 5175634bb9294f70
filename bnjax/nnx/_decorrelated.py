"""The NNX layer for units that move together."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax import Array

from bnjax._covariance import CovMoments
from bnjax._layer.recipe import Method, Recipe, decorrelated
from bnjax.nnx._base import Base


class DecorrelatedBatchNorm(Base[CovMoments]):
    """Batch normalization that also removes correlations (Huang et al., 2018 and 2019).

    The same arithmetic as `bnjax.linen.DecorrelatedBatchNorm`, bit for bit; see there for when
    to use it. What distinguishes NNX from linen is as in `bnjax.nnx.BatchNorm`.

    Variables: `scale`, `bias` (`nnx.Param`), `[*features]`, and `mean`, `cov` (`nnx.BatchStat`),
    `[*features]` and `[groups, size, size]`; `steps` as in `BatchNorm`. Where `emit` is set,
    `moments` holds `CovMoments`.

    Args:
      num_features: the size of the feature axis, or of each where `axis` is a tuple.
      group_size: how many neighbouring features are whitened together; by default all.
      method: "cholesky" or "newton_schulz", as in `bnjax.whiten`.
      iterations: of Newton-Schulz.
      fields: the keywords of `BatchNorm`, of which `pivot` changes nothing: a covariance is
        measured about the batch's mean. A mask holds one value for each example.

    Raises:
      ValueError: for a group size that does not divide the number of features.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = bnjax.nnx.DecorrelatedBatchNorm(2, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (100, 2)) @ jnp.array([[3.0, 2.0], [0.0, 1.0]])
      >>> y = layer(x)
      >>> print(jnp.corrcoef(x.T)[0, 1].round(2), jnp.abs(jnp.corrcoef(y.T)[0, 1]).round(2))
      0.89 0.0
      >>> print(layer.mean.shape, layer.cov.shape)
      (2,) (1, 2, 2)
    """

    cov: nnx.BatchStat[Array]

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        group_size: int | None = None,
        method: Method = "cholesky",
        iterations: int = 5,
        **fields: Any,
    ) -> None:
        self.group_size = group_size
        self.method: Method = method
        self.iterations = iterations
        super().__init__(num_features, **fields)

    @property
    def _recipe(self) -> Recipe[CovMoments]:
        return decorrelated(self.group_size, self.method, self.iterations)
