"""What a layer does in one call, whatever the framework: choose the moments, then apply them."""

from typing import Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import Axes, check_momentum, is_static, promote
from bnjax._average import Momentum, Stats, ema
from bnjax._layer.ghosts import in_ghosts
from bnjax._layer.notices import warn_of_single_values
from bnjax._layer.recipe import Apply, Recipe
from bnjax._statistic import AxisName, Groups, M, cast, pmerge
from bnjax._sums import Guess, Pivot


class Layer(Protocol):
    """The fields of a layer that its call depends on, under the names that users know."""

    @property
    def axis(self) -> Axes: ...
    @property
    def momentum(self) -> Momentum: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def axis_name(self) -> AxisName | None: ...
    @property
    def axis_index_groups(self) -> Groups: ...
    @property
    def pivot(self) -> Pivot: ...
    @property
    def debias(self) -> bool: ...
    @property
    def ghost_batch_size(self) -> int | None: ...
    @property
    def eval_momentum(self) -> float: ...
    @property
    def skip_nonfinite(self) -> bool: ...


def call(
    layer: Layer,
    recipe: Recipe[M],
    x: Array,
    stats: Stats,
    scale: Array | None,
    bias: Array | None,
    mask: ArrayLike | None,
    dtype: DTypeLike,
    *,
    use_running_average: bool,
    initializing: bool = False,
) -> tuple[Array, M | None]:
    """The output, and in training the batch's moments, which are to be remembered or emitted."""
    if layer.pivot not in ("auto", "batch", "running"):
        raise ValueError(f"pivot is {layer.pivot!r}. Choose 'auto', 'batch' or 'running'.")
    share = layer.eval_momentum
    check_momentum(share, "eval_momentum")
    axis, axis_name, groups = layer.axis, layer.axis_name, layer.axis_index_groups

    def run(apply: Apply[M], x: Array, m: M, mask: ArrayLike | None) -> Array:
        return apply(
            x, m, scale, bias, feature_axis=axis, where=mask, epsilon=layer.epsilon, dtype=dtype
        )

    def measure(
        x: Array,
        mask: ArrayLike | None,
        guess: Guess | None,
        axis_name: AxisName | None = None,
        groups: Groups = None,
    ) -> M:
        return recipe.measure(
            x,
            guess,
            feature_axis=axis,
            where=mask,
            axis_name=axis_name,
            axis_index_groups=groups,
        )

    if use_running_average or (initializing and x.size == 0):
        m = recipe.running(stats)
        if not initializing and not (is_static(share) and share == 1):
            # In x's dtype and with a remainder, so that nothing of the batch is rounded away.
            m = m.make(m.mean, m.second, remainder=jnp.zeros_like(m.mean))
            m = cast(m, promote(x.dtype, jnp.result_type(m.mean)))
            m = ema(m, measure(x, mask, None, axis_name, groups), momentum=share)
        return run(recipe.apply, x, m, mask), None
    apply = recipe.apply if recipe.correct is None else recipe.correct(stats)
    ghosts = layer.ghost_batch_size
    guess = None
    if layer.pivot != "batch" and not initializing and ghosts is None:
        guess = Guess(stats["mean"], layer.pivot, layer.epsilon, "running.mean")

    def train(
        x: Array, mask: ArrayLike | None, axis_name: AxisName | None = None, groups: Groups = None
    ) -> tuple[Array, M]:
        m = measure(x, mask, guess, axis_name, groups)
        return run(apply, x, m, mask), m

    if initializing:
        return train(x, mask)[0], None
    if ghosts is None:
        y, m = train(x, mask, axis_name, groups)
        warn_of_single_values(recipe.of_one_value, x.shape, axis, axis_name, groups)
        return y, _finite_only(m) if layer.skip_nonfinite else m
    y, m = in_ghosts(train, x, mask, ghosts, axis)
    warn_of_single_values(recipe.of_one_value, (ghosts, *x.shape[1:]), axis)
    m = m if axis_name is None else pmerge(m, axis_name, axis_index_groups=groups)
    return y, _finite_only(m) if layer.skip_nonfinite else m


def _finite_only(m: M) -> M:
    """The same, but features whose mean or variance is not finite count as not seen."""
    finite = jnp.isfinite(m.mean), jnp.isfinite(m.second)
    if m.second.shape == m.mean.shape:
        seen = finite[0] & finite[1]
    else:  # a covariance has one count for all of its features
        seen = jnp.all(finite[0]) & jnp.all(finite[1])
    return m.make(m.mean, m.second, jnp.where(seen, m.count, 0), m.remainder)
