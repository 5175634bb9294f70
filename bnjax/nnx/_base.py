"""What all NNX layers share: fields, variables, and what becomes of a batch's moments."""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import as_array, promote
from bnjax._average import Momentum, Stats, remember
from bnjax._layer.call import call
from bnjax._layer.recipe import Recipe
from bnjax._layer.steps import counts_steps, read_steps
from bnjax._statistic import AxisName, M, Statistic, merge
from bnjax._sums import Pivot

NUMBERS = int, float, np.number  # which files may leave in a variable


class BatchMoments(nnx.Variable[Statistic]):
    """What layers emit: `nnx.pop(model, bnjax.nnx.BatchMoments)` takes it out of them.

    For `nnx.bridge` it is what linen's collection `moments` holds.
    """


nnx.register_variable_name("moments", BatchMoments, overwrite=True)


class Base(nnx.Module, Generic[M]):
    """A layer: a recipe, and these fields. See `bnjax.nnx.BatchNorm` for what they mean."""

    mean: nnx.BatchStat[Array]
    steps: nnx.BatchStat[Array]
    scale: nnx.Param[Array] | None
    bias: nnx.Param[Array] | None
    moments: BatchMoments

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
        pivot: Pivot = "auto",
        debias: bool = False,
        ddof: int = 0,
        emit: bool | Literal["only"] = False,
        ghost_batch_size: int | None = None,
        eval_momentum: float = 1.0,
        skip_nonfinite: bool = False,
    ) -> None:
        sizes = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)
        for name, value in self._recipe.initial(sizes, promote(param_dtype)).items():
            setattr(self, name, nnx.BatchStat(value))
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
        self.eval_momentum = eval_momentum
        self.skip_nonfinite = skip_nonfinite
        if counts_steps(self, self._recipe):
            self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    @property
    def _recipe(self) -> Recipe[M]:
        """What this kind of layer does not share with the others."""
        raise NotImplementedError

    def _remember(self, stats: Stats, m: M) -> Stats:
        """The running statistics after a training call."""
        return remember(stats, m, momentum=self.momentum, debias=self.debias, ddof=self.ddof)

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
          NameError: for an `axis_name` that is not mapped, in training or with an `eval_momentum`
            below 1.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is None, in the constructor and in the call. "
                "Call model.train() or model.eval(), or pass True or False."
            )
        x, recipe = as_array(x), self._recipe
        remembers = self.emit != "only"
        trains = not use_running_average and (remembers or recipe.counts_steps)
        variables, stats = self._statistics(with_steps=trains)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        y, m = call(
            self,
            recipe,
            x,
            stats,
            scale,
            bias,
            mask,
            self._output_dtype(x, recipe.running(stats), scale, bias),
            use_running_average=use_running_average,
        )
        if m is None:
            return y
        if remembers:
            for name, value in self._remember(stats, m).items():
                _write(variables[name], lax.stop_gradient(value))
        if self.emit:
            if "moments" in vars(self):
                before = jax.tree.leaves(self.moments)
                m = merge(jax.tree.unflatten(jax.tree.structure(m), before), m)
            self.moments = BatchMoments(m)
        return y

    def _statistics(self, with_steps: bool) -> tuple[dict[str, nnx.BatchStat[Array]], Stats]:
        """The variables that a call depends on, and what they hold."""
        recipe = self._recipe
        variables: dict[str, nnx.BatchStat[Array]] = {p: vars(self)[p] for p in recipe.names}
        stats = {name: as_array(variable[...]) for name, variable in variables.items()}
        if with_steps and counts_steps(self, recipe):
            mean = stats["mean"]
            start = functools.partial(recipe.initial, mean.shape, mean.dtype)
            missing = "steps" not in vars(self)  # where debias or the momentum was set afterwards
            if missing:
                self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))
            (given,) = jax.tree.leaves(self.steps)
            steps = given if isinstance(given, NUMBERS) else self.steps[...]
            stats["steps"] = read_steps(self, None if missing else steps, stats, start)
            variables["steps"] = self.steps
        return variables, stats

    def _output_dtype(
        self, x: Array, running: M, scale: Array | None, bias: Array | None
    ) -> DTypeLike:
        """As in flax, where the statistics have a say, too."""
        inputs = x, running.mean, running.second, scale, bias
        with jax.numpy_dtype_promotion("standard"):
            if self.promote_dtype is not dtypes.promote_dtype:
                inputs = jax.eval_shape(lambda a: self.promote_dtype(a, dtype=self.dtype), inputs)
            given = [p.dtype for p in inputs if p is not None]
            return jnp.dtype(self.dtype or jnp.result_type(*given))

    def set_view(
        self,
        use_running_average: bool | None = None,
        emit: bool | Literal["only"] | None = None,
    ) -> None:
        """For `nnx.view`, and described by `nnx.view_info`: sets what is given.

        Args:
          use_running_average: True in evaluation, False in training.
          emit: True to emit the moments besides remembering them, "only" to emit them instead.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if emit is not None:
            self.emit = emit


def _write(variable: nnx.BatchStat[Array], value: Array) -> None:
    """In place, but not into numbers, nor into the arrays of a file."""
    if isinstance(jax.tree.leaves(variable)[0], (*NUMBERS, np.ndarray)):
        variable.copy_from(variable.replace(value))
    else:
        variable[...] = value
