"""The Flax NNX layer: flax's constructor, variables and behaviour over bnjax's functions."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax import Array, lax
from jax.typing import ArrayLike

from bnjax._arguments import as_array, promote
from bnjax._average import Momentum
from bnjax._fold_nnx import fold as fold
from bnjax._layer import Limit, call, counts_steps, remember
from bnjax._moments import Moments
from bnjax._rounding import real_dtype
from bnjax._statistic import AxisName, merge


class BatchMoments(nnx.Variable[Moments]):
    """What layers emit: `nnx.pop(model, bnjax.nnx.BatchMoments)` takes it out of them."""


class BatchNorm(nnx.Module):
    """Batch normalization (Ioffe and Szegedy, 2015), a drop-in for `flax.nnx.BatchNorm`.

    The same arithmetic as `bnjax.linen.BatchNorm`, bit for bit. Constructor, variables and
    train/eval switching are flax's, so its states load and the reverse. Unlike flax's layer it
    rounds neither the input nor the running statistics to `dtype` before the arithmetic.

    As in flax, NNX differs from linen in four ways: `use_running_average` in the call overrides
    the constructor's; the running statistics are float32 from the start, as no input is seen
    (here the promotion of `param_dtype` and float32); and with `dtype=None` the statistics
    take part in the promotion, so that 16-bit input and parameters give float32 output. And
    what a call writes to the running statistics is a constant to autodiff.

    Variables: `scale`, `bias` (`nnx.Param`) and `mean`, `var` (`nnx.BatchStat`), `[*features]`.
    Where the average depends on the number of updates (`debias`, a schedule, `momentum=None`)
    `steps` counts them, an int32 scalar (`nnx.BatchStat`).

    Where `emit` is set, a training call leaves the batch's `Moments` in `moments`
    (`bnjax.nnx.BatchMoments`), from where `nnx.pop` takes them; a second call merges into the
    first. For a whole model: `model.set_attributes(emit="only")`.

    Args:
      num_features: the size of the feature axis, or of each where `axis` is a tuple.
      use_running_average: True in evaluation, False in training; `train()` and `eval()` set it.
      axis: the feature axis, or a tuple of them.
      momentum: the share of the running statistics that is kept (PyTorch's is 1 minus it); or
        a schedule, a function of the steps; or None for the plain average over all steps.
      epsilon: added to the variance; positive.
      dtype: of the output; by default the promotion of input and variables. The arithmetic is
        in at least float32 in any case.
      param_dtype: of scale and bias.
      use_bias, use_scale: whether there is a bias, a scale.
      bias_init, scale_init: their initializers.
      axis_name: the mapped axis or axes to share statistics over.
      axis_index_groups: groups of indices of that axis that share, as in `jax.lax.psum`.
      use_fast_variance: accepted, and changes nothing: the variance is always accurate.
      promote_dtype: decides the dtype of the output, as in flax; never that of the arithmetic.
      rngs: the source of keys for the initializers.
      bias_metadata, scale_metadata: metadata for the parameters' variables.
      pivot: "batch", or "running" to measure about the running mean: one pass over `x` and one
        collective less, accurate once the running mean is within a few standard deviations.
      debias: whether the average forgets the zeros and ones that it started with, as in `ema`.
      ddof: 1 to remember the unbiased variance, as PyTorch does.
      emit: True to emit the moments besides remembering them, "only" to emit them instead.
      ghost_batch_size: how many consecutive examples of the first axis are normalized together
        in training, as in `bnjax.linen.BatchNorm`. By default the whole batch.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = bnjax.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
      >>> print(y.round(3))
      [[-1. -1.]
       [ 1.  1.]]
      >>> print(layer.mean[...])
      [0.2 2. ]
      >>> layer.eval()
      >>> print(layer(jnp.array([[0.2, 2.0]])))
      [[0. 0.]]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        scale_init: Initializer = nnx.initializers.ones_init(),
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        pivot: Literal["batch", "running"] = "batch",
        debias: bool = False,
        ddof: int = 0,
        emit: bool | Literal["only"] = False,
        ghost_batch_size: int | None = None,
    ) -> None:
        sizes = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)
        kept = promote(param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros(sizes, kept))
        self.var = nnx.BatchStat(jnp.ones(sizes, real_dtype(kept)))
        self.scale = self.bias = nnx.data(None)
        if use_scale:
            self.scale = nnx.Param(scale_init(rngs.params(), sizes, param_dtype), **scale_metadata)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), sizes, param_dtype), **bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.pivot = pivot
        self.debias = debias
        self.ddof = ddof
        self.emit = emit
        self.ghost_batch_size = ghost_batch_size
        if counts_steps(self):
            self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> Array:
        """Normalizes `x`; in training also updates the running statistics.

        Args:
          x: the input, of any shape.
          use_running_average: overrides the constructor's.
          mask: booleans or integers, or sample weights (floats >= 0), broadcasting against `x`:
            what the statistics are measured on. The output is normalized everywhere.

        Raises:
          ValueError: for input, mask, parameters or settings that do not fit.
          NameError: for an `axis_name` that is not mapped, in training.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is None, in the constructor and in the call. "
                "Call model.train() or model.eval(), or pass True or False."
            )
        x = as_array(x)
        mean, var = self.mean[...], self.var[...]
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        with jax.numpy_dtype_promotion("standard"):
            inputs = x, mean, var, scale, bias
            if self.promote_dtype is not dtypes.promote_dtype:
                inputs = jax.eval_shape(lambda a: self.promote_dtype(a, dtype=self.dtype), inputs)
            given = [p.dtype for p in inputs if p is not None]
            dtype = jnp.dtype(self.dtype or jnp.result_type(*given))
        stats = {"mean": mean, "var": var}
        if counts_steps(self):
            stats["steps"] = self.steps[...]
        y, m = call(
            self,
            x,
            stats,
            scale,
            bias,
            mask,
            dtype,
            use_running_average=use_running_average,
        )
        if m is not None and self.emit != "only":
            for name, value in remember(self, stats, m).items():
                getattr(self, name)[...] = lax.stop_gradient(value)
        if m is not None and self.emit:
            before = getattr(self, "moments", None)
            self.moments = BatchMoments(m if before is None else merge(type(m)(*before[:]), m))
        return y

    def set_view(
        self,
        use_running_average: bool | None = None,
        emit: bool | Literal["only"] | None = None,
    ) -> None:
        """For `nnx.view`: sets what is given."""
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if emit is not None:
            self.emit = emit


class BatchRenorm(BatchNorm):
    """Batch renormalization (Ioffe, 2017), for batches that are small or not i.i.d.

    The arithmetic and the advice are those of `bnjax.linen.BatchRenorm`. Beside `BatchNorm`'s
    variables there is `steps` where a limit is a schedule.

    Args:
      num_features: as in `BatchNorm`.
      r_max: at least 1: r is clipped to [1 / r_max, r_max]; or a schedule, a function of the
        steps.
      d_max: at least 0: d is clipped to [-d_max, d_max]; or a schedule.
      fields: the keywords of `BatchNorm`.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = bnjax.nnx.BatchRenorm(1, r_max=2.0, d_max=1.0, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [3.0]]))
      >>> print(y[:, 0].round(2))  # -1 and 1, and d: the difference of the means, 2, clipped to 1
      [0. 2.]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        **fields: Any,
    ) -> None:
        self.r_max = r_max
        self.d_max = d_max
        super().__init__(num_features, **fields)
