"""The NNX layers that normalize each feature: flax's layer over bnjax's functions."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax import Array

from bnjax._layer.recipe import BATCH_NORM, Limit, Recipe, batch_renorm
from bnjax._moments import Moments
from bnjax.nnx._base import Base


class BatchNorm(Base[Moments]):
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
    `steps` counts them, an int32 scalar (`nnx.BatchStat`), as in linen.

    Where `emit` is set, a training call leaves the batch's `Moments` in `moments`
    (`bnjax.nnx.BatchMoments`), from where `nnx.pop` takes them; a second call merges into the
    first. For a whole model: `model.set_attributes(emit="only")`.

    Args:
      num_features: the size of the feature axis, or of each where `axis` is a tuple, in the
        order that they have in x.
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
      pivot: where deviations are measured from, which changes passes, collectives and the last
        bits, not the accuracy. "running": the running mean, with a guard: a batch whose mean
        is farther than 1.4 standard deviations from it is measured again about its own.
        "batch": the batch's own mean, with no branch in the program. "auto": "running", but
        without an `axis_name` "batch" on a GPU, and on a CPU, for unmasked feature maps, the
        mean over a sixteenth of the positions. Replicas that share by an `axis_name` must
        hold one running mean: after training apart, `bnjax.merge_stacked` first, or "batch".
      debias: whether the average forgets the zeros and ones that it started with, as in `ema`.
      ddof: 1 to remember the unbiased variance, as PyTorch does.
      emit: True to emit the moments besides remembering them, "only" to emit them instead.
      ghost_batch_size: how many consecutive examples of the first axis are normalized together
        in training, as in `bnjax.linen.BatchNorm`. By default the whole batch.
      eval_momentum: the share of the running statistics in evaluation; the rest is this batch's
        (Schneider et al., 2020: N / (N + n), for n examples that weigh against N of training).
        0 is the batch's statistics alone (Nado et al., 2020). Below 1 an `axis_name` must be
        mapped. The batch's variance is the biased one, whatever `ddof` is. No state is written.
      skip_nonfinite: whether features whose batch mean or variance is not finite count as not
        seen, so that they leave the running statistics as they are. The output stays what it is.

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

    var: nnx.BatchStat[Array]

    @property
    def _recipe(self) -> Recipe[Moments]:
        return BATCH_NORM


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

    @property
    def _recipe(self) -> Recipe[Moments]:
        return batch_renorm(self.r_max, self.d_max)
