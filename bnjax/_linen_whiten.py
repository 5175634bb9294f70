"""The Flax linen layer for units that move together."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Axes, Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike

from bnjax._arguments import Shape
from bnjax._average import Momentum
from bnjax._covariance import check_group_size, cov_moments
from bnjax._linen import call_linen
from bnjax._statistic import AxisName
from bnjax._whiten import whiten


class DecorrelatedBatchNorm(nn.Module):
    """Batch normalization that also removes correlations (Huang et al., 2018 and 2019).

    `bnjax.linen.BatchNorm` with `whiten` in the place of `normalize`: in each group of features
    the output's covariance, not only its variance, is that of independent units. In evaluation
    the running mean and covariance take the place of the batch's; emission of moments,
    `update_stats`, `recalibrate` and `merge_stacked` treat them as a mean and a variance.

    Don't use it by default: see the README for what it costs. Groups should be much smaller than
    the batch, whose covariance is singular otherwise.

    Variables: `params/{scale,bias}`, each `[*features]`, and `batch_stats/{mean,cov}`,
    `[*features]` and `[groups, size, size]`; `batch_stats/steps` as in `BatchNorm`.

    Attributes:
      group_size: how many neighbouring features are whitened together; by default all.
      method: "cholesky", exact, where each feature loses what those before it explain; or
        "newton_schulz", near the symmetric transform that moves the input least (ZCA).
      iterations: of Newton-Schulz.
      use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale,
        bias_init, scale_init, axis_name, axis_index_groups, debias, ddof: as in `BatchNorm`.

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

    use_running_average: bool | None = None
    axis: Axes = -1
    group_size: int | None = None
    method: Literal["cholesky", "newton_schulz"] = "cholesky"
    iterations: int = 5
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    debias: bool = False
    ddof: int = 0
    pivot: ClassVar[str] = "batch"  # about a running mean that is far off, cov is not positive

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> Array:
        """Whitens `x`; in training also updates `batch_stats`, as `BatchNorm` does.

        Args:
          x: the input, of any shape.
          use_running_average: overrides the field where that is None.
          mask: as in `BatchNorm`, but one for each example: a covariance needs all features.

        Raises:
          ValueError: for input, mask, parameters or settings that do not fit.
          NameError: for an `axis_name` that is not mapped, in training.
          flax.errors.ModifyScopeVariableError: in training without
            `mutable=["batch_stats"]` (or `["moments"]`) in `apply`.
        """
        return call_linen(
            self,
            x,
            use_running_average,
            mask,
            ("cov", self._unit_covariance),
            measure=functools.partial(cov_moments, group_size=self.group_size),
            apply=functools.partial(whiten, method=self.method, iterations=self.iterations),
        )

    def _unit_covariance(self, sizes: Shape, dtype: Any) -> Array:
        size = check_group_size(self.group_size, math.prod(sizes))
        return jnp.tile(jnp.eye(size, dtype=dtype), (math.prod(sizes) // size, 1, 1))
