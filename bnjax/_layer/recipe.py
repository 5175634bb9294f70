"""What one kind of layer does not share with the others."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic, Literal, Protocol, TypeVar

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from bnjax._arguments import Axes, Shape
from bnjax._average import Stats
from bnjax._covariance import CovMoments, cov_moments
from bnjax._moments import Moments, moments_near
from bnjax._normalize import normalize
from bnjax._renormalize import renormalize
from bnjax._statistic import AxisName, Groups, M
from bnjax._sums import Guess
from bnjax._whiten import whiten

M_co = TypeVar("M_co", covariant=True)
M_contra = TypeVar("M_contra", contravariant=True)
Limit = ArrayLike | Callable[[ArrayLike], ArrayLike]
Method = Literal["cholesky", "newton_schulz"]


class Measure(Protocol[M_co]):
    """How a batch is measured: as `moments` does, with a guess at the mean or without."""

    def __call__(
        self,
        x: Array,
        guess: Guess | None,
        *,
        feature_axis: Axes,
        where: ArrayLike | None,
        axis_name: AxisName | None,
        axis_index_groups: Groups,
    ) -> M_co: ...


class Apply(Protocol[M_contra]):
    """How the output is computed with a statistic: as `normalize` does."""

    def __call__(
        self,
        x: Array,
        m: M_contra,
        scale: Array | None,
        bias: Array | None,
        *,
        feature_axis: Axes,
        where: ArrayLike | None,
        epsilon: float,
        dtype: DTypeLike,
    ) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Recipe(Generic[M]):
    """What one kind of layer is made of. Fields, parameters and averages are every layer's.

    Attributes:
      statistic: what it measures and remembers.
      start: the statistic before the first batch, for features of these sizes.
      measure: gives the statistic of a batch.
      apply: gives the output, in training with the batch's statistic, else with the running one.
      correct: what gives the output in training instead, made of the running statistics.
      counts_steps: whether that depends on the number of updates before.
      of_one_value: what the output is where a batch has one value per feature.
    """

    statistic: type[M]
    start: Callable[[Shape, DTypeLike], M]
    measure: Measure[M]
    apply: Apply[M]
    correct: Callable[[Stats], Apply[M]] | None = None
    counts_steps: bool = False
    of_one_value: str = "the bias"

    @property
    def names(self) -> tuple[str, str]:
        """Of the mean and the second moment, where they are remembered."""
        return "mean", self.statistic.second_name()

    def initial(self, sizes: Shape, dtype: DTypeLike) -> Stats:
        """What is remembered before the first batch, for features of these sizes."""
        start = self.start(sizes, dtype)
        return dict(zip(self.names, (start.mean, start.second), strict=True))

    def running(self, stats: Stats) -> M:
        """What is remembered, as a statistic."""
        return self.statistic.make(*(stats[name] for name in self.names))


BATCH_NORM = Recipe(Moments, Moments.initial, moments_near, normalize)


def batch_renorm(r_max: Limit, d_max: Limit) -> Recipe[Moments]:
    """Batch norm whose output in training is corrected within these limits."""

    def correct(stats: Stats) -> Apply[Moments]:
        def now(limit: Limit) -> ArrayLike:
            return limit(stats["steps"]) if callable(limit) else limit

        running = BATCH_NORM.running(stats)
        return functools.partial(renormalize, running=running, r_max=now(r_max), d_max=now(d_max))

    return dataclasses.replace(
        BATCH_NORM,
        correct=correct,
        counts_steps=callable(r_max) or callable(d_max),
        of_one_value="x normalized by the running statistics, up to d_max",
    )


def decorrelated(group_size: int | None, method: Method, iterations: int) -> Recipe[CovMoments]:
    """Whitening by covariances in groups of features."""

    def measure(
        x: Array,
        guess: Guess | None,
        *,
        feature_axis: Axes,
        where: ArrayLike | None,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups = None,
    ) -> CovMoments:
        """About a mean that is far off, the covariance may not be positive: no guesses."""
        return cov_moments(
            x,
            feature_axis=feature_axis,
            group_size=group_size,
            where=where,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )

    start = functools.partial(CovMoments.initial, group_size=group_size)
    apply = functools.partial(whiten, method=method, iterations=iterations)
    return Recipe(CovMoments, start, measure, apply)
