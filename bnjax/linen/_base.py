"""What all linen layers share: fields, variables, and what becomes of a batch's moments."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Generic

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Axes, Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike

from bnjax._arguments import as_array, promote, split_axes
from bnjax._average import Momentum, Stats, remember
from bnjax._layer.call import call
from bnjax._layer.recipe import Recipe
from bnjax._layer.steps import counts_steps, read_steps
from bnjax._statistic import AxisName, M, merge
from bnjax._sums import Pivot


class Mode(nn.Module):
    """The first two fields. A layer's own positional fields may come between them and the rest."""

    use_running_average: bool | None = None
    axis: Axes = -1


class Base(Mode, Generic[M]):
    """A layer: a recipe, and these fields. See `bnjax.linen.BatchNorm` for what they mean.

    Fields that are keyword-only here may be positional in a kind of layer, which then repeats
    them: dataclasses keep the order of this class. New fields are keyword-only everywhere.
    """

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
    use_fast_variance: bool = dataclasses.field(default=True, kw_only=True)
    force_float32_reductions: bool = dataclasses.field(default=True, kw_only=True)
    pivot: Pivot = dataclasses.field(default="auto", kw_only=True)
    debias: bool = False
    ddof: int = 0
    ghost_batch_size: int | None = dataclasses.field(default=None, kw_only=True)
    eval_momentum: float = dataclasses.field(default=1.0, kw_only=True)
    skip_nonfinite: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def _recipe(self) -> Recipe[M]:
        """What this kind of layer does not share with the others."""
        raise NotImplementedError

    @nn.nowrap
    def _remember(self, stats: Stats, m: M) -> Stats:
        """The running statistics after a training call."""
        return remember(stats, m, momentum=self.momentum, debias=self.debias, ddof=self.ddof)

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> Array:
        """Normalizes `x`; in training also updates `batch_stats`, which must be mutable.

        While initializing the statistics stay as they are, and `axis_name` need not be mapped.

        Args:
          x: the input, of any shape.
          use_running_average: overrides the field where that is None.
          mask: booleans or integers, or sample weights (floats >= 0), broadcasting against `x`:
            what the statistics are measured on. The output is normalized everywhere.

        Raises:
          ValueError: for input, mask, parameters or settings that do not fit.
          NameError: for an `axis_name` that is not mapped, in training or with an `eval_momentum`
            below 1.
          flax.errors.ModifyScopeVariableError: in training without
            `mutable=["batch_stats"]` (or `["moments"]`) in `apply`.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x, recipe = as_array(x), self._recipe
        sizes = tuple(x.shape[i] for i in split_axes(self.axis, x.shape)[0])
        emits = _emits_moments(self)
        remembers = not emits or self.is_mutable_collection("batch_stats")
        trains = not use_running_average and (remembers or recipe.counts_steps)
        start = functools.partial(recipe.initial, sizes, promote(x.dtype))
        variables, stats = self._statistics(start, self.is_initializing() or trains)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, sizes, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, sizes, self.param_dtype)
        with jax.numpy_dtype_promotion("standard"):
            dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        y, m = call(
            self,
            recipe,
            x,
            stats,
            scale,
            bias,
            mask,
            dtype,
            use_running_average=use_running_average,
            initializing=self.is_initializing(),
        )
        if m is None:
            return y
        if remembers:
            for name, value in self._remember(stats, m).items():
                variables[name].value = value
        if emits:
            before: M | None = self.get_variable("moments", "moments")
            self.put_variable("moments", "moments", m if before is None else merge(before, m))
        return y

    @nn.nowrap
    def _statistics(
        self, start: Callable[[], Stats], with_steps: bool
    ) -> tuple[dict[str, nn.Variable[Array]], Stats]:
        """The variables that a call depends on, and what they hold."""
        begun = self.has_variable("batch_stats", "mean")
        variables = {
            name: self.variable("batch_stats", name, lambda name=name: start()[name])
            for name in self._recipe.names
        }
        stats = {name: variable.value for name, variable in variables.items()}
        if with_steps and counts_steps(self, self._recipe):
            missing = begun and not self.has_variable("batch_stats", "steps")
            given = None
            if not missing or self.is_mutable_collection("batch_stats"):
                steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
                variables["steps"] = steps
                given = None if missing else steps.value
            stats["steps"] = read_steps(self, given, stats, start)
        return variables, stats


def _emits_moments(layer: nn.Module) -> bool:
    """Whether `apply` names the collection; `mutable=True` must give what flax gives."""
    if layer.scope is None or isinstance(layer.scope.mutable, bool | DenyList):
        return False
    return layer.is_mutable_collection("moments")
