"""The linen layers that normalize each feature: flax's layer over bnjax's functions."""

from bnjax._layer.recipe import BATCH_NORM, Limit, Recipe, batch_renorm
from bnjax._moments import Moments
from bnjax._sums import Pivot
from bnjax.linen._base import Base


class BatchNorm(Base[Moments]):
    """Batch normalization (Ioffe and Szegedy, 2015), a drop-in for `flax.linen.BatchNorm`.

    In training with the batch's mean and (biased) variance over all axes but `axis`, towards
    which the running statistics move; in evaluation with the running statistics:

      y = (x - mean) / sqrt(var + epsilon) * scale + bias
      running = momentum * running + (1 - momentum) * batch

    Fields, variables and calls are flax's, so its checkpoints load and the reverse. What
    differs: it is accurate at every mean/std, masks may hide NaN, float masks are sample
    weights, statistics across replicas are weighted by their counts, and between separately
    compiled forward and backward passes only `x` is kept.

    Variables: `params/{scale,bias}` and `batch_stats/{mean,var}`, each `[*features]`. The
    statistics start in the promotion of the input's dtype and float32, and keep their dtype.
    Where the average depends on the number of updates (`debias`, a schedule, `momentum=None`)
    `batch_stats/steps` counts them, an int32 scalar or whatever number a file gives. Evaluation
    needs none; training without it counts from 0, with a warning where that forgets statistics.

    A training call with `mutable=["moments", "batch_stats"]` hands the batch's `Moments` out, too,
    in the collection that is named like this; a second call merges into the first, and so does
    one that is given the collection. Who wants the moments alone leaves what else comes out, or
    names `["moments"]` alone, which spares the update; but a model that takes an immutable
    `batch_stats` for evaluation emits nothing then.

    Attributes:
      use_running_average: True in evaluation, False in training; here or in the call.
      axis: the feature axis, or a tuple of them.
      momentum: the share of the running statistics that is kept (PyTorch's is 1 minus it); or
        a schedule, a function of the steps; or None for the plain average over all steps.
      epsilon: added to the variance; positive.
      dtype: of the output; by default the promotion of input, scale and bias. The arithmetic is
        in at least float32 in any case.
      param_dtype: of scale and bias.
      use_bias, use_scale: whether there is a bias, a scale.
      bias_init, scale_init: their initializers.
      axis_name: the mapped axis or axes to share statistics over (`jax.pmap`, `jax.shard_map`,
        `jax.vmap`). Plain `jax.jit` over sharded arrays needs none.
      axis_index_groups: groups of indices of that axis that share, as in `jax.lax.psum`.
      use_fast_variance, force_float32_reductions: accepted, and change nothing: the variance
        is always accurate, and at least float32.
      pivot: where deviations are measured from, which changes passes, collectives and the last
        bits, not the accuracy. "running": the running mean, with a guard: a batch whose mean
        is farther than 1.4 standard deviations from it is measured again about its own.
        "batch": the batch's own mean, with no branch in the program. "auto": "running", but
        without an `axis_name` "batch" on a GPU, and on a CPU, for unmasked feature maps, the
        mean over a sixteenth of the positions. Replicas that share by an `axis_name` must
        hold one running mean: after training apart, `bnjax.merge_stacked` first, or "batch".
      debias: whether the average forgets the zeros and ones that it started with, as in `ema`.
      ddof: 1 to remember the unbiased variance, as PyTorch does.
      ghost_batch_size: how many consecutive examples of the first axis are normalized together
        in training, by statistics of their own, never with another replica's (Hoffer et al.,
        2017). The running statistics take the merge of all. By default the whole batch.
      eval_momentum: the share of the running statistics in evaluation; the rest is this batch's
        (Schneider et al., 2020: N / (N + n), for n examples that weigh against N of training).
        0 is the batch's statistics alone (Nado et al., 2020). Below 1 an `axis_name` must be
        mapped. The batch's variance is the biased one, whatever `ddof` is. No state is written.
      skip_nonfinite: whether features whose batch mean or variance is not finite count as not
        seen, so that they leave the running statistics as they are. The output stays what it is.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> layer = bnjax.linen.BatchNorm(momentum=0.9)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(y.round(3))
      [[-1. -1.]
       [ 1.  1.]]
      >>> print(updates["batch_stats"]["mean"])
      [0.2 2. ]
    """

    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    pivot: Pivot = "auto"
    ghost_batch_size: int | None = None

    @property
    def _recipe(self) -> Recipe[Moments]:
        return BATCH_NORM


class BatchRenorm(BatchNorm):
    """Batch renormalization (Ioffe, 2017), for batches that are small or not i.i.d.

    `BatchNorm` but for the output in training, which is corrected towards what the running
    statistics would give, within the limits `r_max` and `d_max`; see `bnjax.batch_renorm`. The
    variables are the same, and where a limit is a schedule `batch_stats/steps` counts.

    The running statistics must be near before limits may be wide. Ioffe trains with r_max = 1
    and d_max = 0 at first, then opens them; reinforcement learners (CrossQ: Bhatt et al., 2024)
    jump to 3 and 5, with `optax.join_schedules`.

    Attributes:
      r_max: at least 1: r is clipped to [1 / r_max, r_max]; or a schedule, a function of the
        steps.
      d_max: at least 0: d is clipped to [-d_max, d_max]; or a schedule.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp, optax
      >>> layer = bnjax.linen.BatchRenorm(
      ...     r_max=optax.linear_schedule(1.0, 3.0, transition_steps=3000, transition_begin=1000),
      ...     d_max=optax.linear_schedule(0.0, 5.0, transition_steps=3000, transition_begin=1000))
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(y[:, 0].round(2), updates["batch_stats"]["steps"])
      [-1.  1.] 1
    """

    r_max: Limit = 3.0
    d_max: Limit = 5.0

    @property
    def _recipe(self) -> Recipe[Moments]:
        return batch_renorm(self.r_max, self.d_max)
