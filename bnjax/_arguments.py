"""Read the arguments, or refuse them: axes, masks, dtypes. Errors say what came and the cure."""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

Axes = int | Sequence[int]
Shape = tuple[int, ...]


def promote(*dtypes: DTypeLike) -> np.dtype:
    """The common dtype, at least float32, also where JAX's promotion is set to strict."""
    wide = (dtype for dtype in dtypes if not _is_narrow(dtype))
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, wide, np.dtype(np.float32))


def _is_narrow(dtype: DTypeLike) -> bool:
    """Whether JAX promotes it to nothing: numbers of fewer than 8 bits, floats of 8."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits < 8
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def output_dtype(x: Array, *others: ArrayLike | None) -> np.dtype:
    """That of x, float32 for integers, but complex where something else is."""
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else promote(x.dtype)
    if any(p is not None and jnp.iscomplexobj(p) for p in others):
        return promote(dtype, np.complex64)
    return jnp.dtype(dtype)


def is_static(x: Any) -> bool:
    """Whether the value can be looked at now: not traced, and held by this process."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def as_array(x: ArrayLike) -> Array:
    """A JAX array, and the very same one if it is that: `jnp.asarray` copies traced ones."""
    return x if isinstance(x, Array) else jnp.asarray(x)


def split_axes(feature_axis: Axes, shape: Shape, name: str = "x") -> tuple[Shape, Shape]:
    """The feature axes and the reduced axes, both ascending."""
    ndim = len(shape)
    said = f"feature_axis (a layer's axis) is {feature_axis!r}, but "
    given = tuple(feature_axis) if isinstance(feature_axis, Iterable) else (feature_axis,)
    if not all(map(is_whole, given)):
        raise TypeError(f"{said}axes are whole numbers. Choose one, such as -1, or several.")
    axes = sorted(a + ndim * (a < 0) for a in map(operator.index, given))
    if any(not 0 <= a < ndim for a in axes):
        cure = f"Choose from {-ndim} to {ndim - 1}." if ndim else f"Give {name} a feature axis."
        raise ValueError(f"{said}{name} has shape {shape}. {cure}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"{said}that names an axis of {name} twice. Name each axis once.")
    return tuple(axes), tuple(i for i in range(ndim) if i not in axes)


def check_features(name: str, shape: Shape, features: Shape) -> None:
    """Refuses per-feature arrays of another shape."""
    if shape != features:
        raise ValueError(
            f"{name} has shape {shape}, but the features of x have shape {features}. "
            "Give one value for each feature."
        )


def check_not_empty(shape: Shape, values: int) -> None:
    """Refuses an x that has no value to measure."""
    if not values:
        raise ValueError(
            f"x has shape {shape}, so there is no value to measure. Leave empty batches out."
        )


def is_whole(given: Any) -> bool:
    """Whether it is an integer, also one of NumPy."""
    return isinstance(given, int | np.integer)


def check_number(name: str, given: ArrayLike, cure: str) -> None:
    """Refuses what is not one real number: an array, a word, a complex number."""
    shape = np.shape(given)
    dtype = given.dtype if hasattr(given, "dtype") else np.asarray(given).dtype
    kinds = np.floating, np.integer, np.bool_
    if not shape and any(jnp.issubdtype(dtype, kind) for kind in kinds):
        return
    said = f"has shape {shape}" if shape else f"is {given!r}"
    raise ValueError(f"{name} {said}, but it is one number for all features. {cure}")


def check_epsilon(epsilon: ArrayLike, dtype: DTypeLike = np.float32) -> None:
    """Refuses an epsilon that is not positive in this dtype, where its value is known."""
    cure = "Choose a positive number, such as 1e-5."
    check_number("epsilon", epsilon, cure)
    if is_static(epsilon) and not np.asarray(epsilon) >= jnp.finfo(dtype).tiny:
        said = f"{epsilon}, zero in {np.dtype(dtype)}" if np.asarray(epsilon) > 0 else epsilon
        raise ValueError(f"epsilon is {said}, but it keeps the variance away from zero. {cure}")


def check_momentum(momentum: ArrayLike, name: str = "momentum") -> None:
    """Refuses a momentum outside [0, 1], where its value is known."""
    cure = "Choose a number from 0 to 1."
    check_number(name, momentum, cure)
    if is_static(momentum) and not 0 <= np.asarray(momentum) <= 1:
        raise ValueError(
            f"{name} is {momentum}, but it is the share of the running statistics that is "
            f"kept. {cure}"
        )


def read_ddof(ddof: int) -> int:
    """The degrees of freedom; refuses what is no whole number from 0 on."""
    if not is_whole(ddof) or ddof < 0:
        raise ValueError(
            f"ddof is {ddof!r}, but the variance is divided by count - ddof. "
            "Choose 0, or 1 for the unbiased variance."
        )
    return int(ddof)


def read_affine(name: str, given: ArrayLike | None, shape: Shape, features: Shape) -> Array | None:
    """A scale or bias as an array; refuses what is neither per feature nor broadcasts to x."""
    if given is None:
        return None
    p = as_array(given)
    sizes = tuple(shape[i] for i in features)
    if p.shape == sizes or (p.ndim == len(shape) and _fits(p.shape, shape)):
        return p
    raise ValueError(
        f"{name} has shape {p.shape}, but x has shape {shape} and features of shape {sizes}. "
        "Give one value for each feature, or an array of x's rank that broadcasts to x."
    )


def read_mask(where: ArrayLike | None, shape: Shape, features: Shape) -> Array | None:
    """`where` with the rank of x, narrow as it came: booleans, or real weights >= 0."""
    if where is None:
        return None
    w = as_array(where)
    if jnp.iscomplexobj(w):
        raise ValueError(
            f"where (a layer's mask) has dtype {w.dtype}. "
            "Give booleans or integers as a mask, or floats >= 0 as sample weights."
        )
    batch = tuple(n for i, n in enumerate(shape) if i not in features)
    missing = len(shape) - w.ndim
    lacks_features = _fits(w.shape, batch)
    said = f"where (a layer's mask) has shape {w.shape} and x has shape {shape}: "
    if not _fits(w.shape[::-1], shape[::-1]):
        cure = f"Write {_over_examples(w.shape, len(shape), features)}."
        raise ValueError(
            f"{said}they do not broadcast. "
            + (cure if lacks_features else "Give a mask that broadcasts to x as in NumPy.")
        )
    if missing and w.size != 1 and lacks_features:
        raise ValueError(
            f"{said}examples or features could be meant. For a mask of the examples write "
            f"{_over_examples(w.shape, len(shape), features)}, of the last axes "
            f"mask.reshape({(1,) * missing + w.shape})."
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        w = w.astype(bool)
    elif is_static(where) and not np.all(np.asarray(where) >= 0):
        least = np.min(np.asarray(where))
        held = f"the negative weight {least}" if least < 0 else f"the weight {least}"
        raise ValueError(
            f"where (a layer's mask) holds {held}. "
            "Sample weights must not be negative: clip them at 0."
        )
    return lax.expand_dims(w, tuple(range(missing)))


def expand(p: ArrayLike, ndim: int, reduced: Shape) -> Array:
    """p with the rank of x: `[*features]` gets axes of length 1, of x's rank it stays."""
    p = as_array(p)
    return p if p.ndim == ndim else lax.expand_dims(p, reduced)


def _fits(small: Shape, big: Shape) -> bool:
    """Whether each axis of `small` is 1 or as long as the axis of `big` at its place."""
    return len(small) <= len(big) and all(a in (1, b) for a, b in zip(small, big, strict=False))


def _over_examples(shape: Shape, ndim: int, features: Shape) -> str:
    """How to write a mask whose axes are the first ones of x that are no features."""
    if features == (ndim - 1,) and len(shape) == ndim - 1:
        return "mask[..., None]"
    sizes = iter(shape)
    return f"mask.reshape({tuple(1 if i in features else next(sizes, 1) for i in range(ndim))})"
