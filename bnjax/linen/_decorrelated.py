"""The linen layer for units that move together."""

from bnjax._covariance import CovMoments
from bnjax._layer.recipe import Method, Recipe, decorrelated
from bnjax.linen._base import Base, Mode


class Groups(Mode):
    """The layer's own fields, after `axis`."""

    group_size: int | None = None
    method: Method = "cholesky"
    iterations: int = 5


class DecorrelatedBatchNorm(Base[CovMoments], Groups):
    """Batch normalization that also removes correlations (Huang et al., 2018 and 2019).

    `bnjax.linen.BatchNorm` with `whiten` in the place of `normalize`: in each group of features
    the output's covariance, not only its variance, is that of independent units. In evaluation
    the running mean and covariance take the place of the batch's; emission of moments,
    `update_stats`, `recalibrate` and `merge_stacked` treat them as a mean and a variance.

    Don't use it by default: the guide has what it costs. Groups should be much smaller than
    the batch, whose covariance is singular otherwise.

    Variables: `params/{scale,bias}`, each `[*features]`, and `batch_stats/{mean,cov}`,
    `[*features]` and `[groups, size, size]`; `batch_stats/steps` as in `BatchNorm`.

    Attributes:
      group_size: how many neighbouring features are whitened together; by default all.
      method: "cholesky", exact, where each feature loses what those before it explain; or
        "newton_schulz", near the symmetric transform that moves the input least (ZCA).
      iterations: of Newton-Schulz.
      use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale,
        bias_init, scale_init, axis_name, axis_index_groups, debias, ddof, and keyword-only
        use_fast_variance, force_float32_reductions, ghost_batch_size, eval_momentum,
        skip_nonfinite (for all features at once): as in `BatchNorm`. A mask holds one value for
        each example: a covariance needs all features.
      pivot: keyword-only, and changes nothing: a covariance is measured about the batch's mean.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> layer = bnjax.linen.DecorrelatedBatchNorm(use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (100, 2)) @ jnp.array([[3.0, 2.0], [0.0, 1.0]])
      >>> variables = layer.init(jax.random.key(1), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> print(jnp.corrcoef(x.T)[0, 1].round(2), jnp.abs(jnp.corrcoef(y.T)[0, 1]).round(2))
      0.89 0.0
      >>> print({name: p.shape for name, p in updates["batch_stats"].items()})
      {'mean': (2,), 'cov': (1, 2, 2)}
    """

    @property
    def _recipe(self) -> Recipe[CovMoments]:
        return decorrelated(self.group_size, self.method, self.iterations)
