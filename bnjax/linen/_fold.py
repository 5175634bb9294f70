"""Fold the batch norms of a linen model: new variables, and flax's interceptors to apply them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype
from jax import Array, lax

from bnjax._arguments import as_array, promote, split_axes
from bnjax._fold_check import Share, check_norm, check_use
from bnjax._fold_model import (
    BatchNorm,
    Call,
    Calls,
    Fit,
    Kernel,
    Norm,
    Pairs,
    check_pairs,
    find,
    first,
    fold_pair,
    multiply,
    record,
    refuse_layer,
    refuse_norm,
    see_fit,
)
from bnjax._moments import Moments
from bnjax._normalize import affine

LAYERS = nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose
Flat = dict[str, Any]  # "params/block/Conv_0/kernel" -> array


@runtime_checkable
class LinenBatchNorm(BatchNorm, Protocol):
    """What else decides the dtype of its output."""

    dtype: Dtype | None
    param_dtype: Dtype
    use_scale: bool
    use_bias: bool

    def clone(self) -> nn.Module:
        """The same module, unbound."""


def fold(
    model: nn.Module, variables: Mapping[str, Any], pairs: Pairs, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The variables of a model in inference whose batch norms went into the layers before them.

    Kernels are multiplied and nothing else is left of the batch norm than its bias, in the
    collection "folded". `apply_folded(model, folded, ...)` applies them; no multiplication is
    left there. See `bnjax.fold` for the formula.

    The pairs are checked on the sample input: each batch norm must be fed by its layer and by
    nothing else, must normalize with its running statistics and do nothing else, and nothing else
    may depend on the layer. That holds at any precision; what the new kernels lose to rounding is
    what their dtype loses.

    Args:
      model: any linen model.
      variables: its variables, as in `model.apply`.
      pairs: paths of `Dense`, `DenseGeneral`, `Conv` or `ConvTranspose` layers -> paths of the
        batch norms (flax's or ours) after them, as in `{"Block_0/Conv_0": "Block_0/BatchNorm_0"}`.
      *args, **kwargs: a sample input and what else `model.apply` takes in evaluation.

    Raises:
      ValueError: for a path, a kind of module or axes that do not fit, a batch norm that anything
        but its layer feeds, a layer whose output is used elsewhere, too, and for statistics that
        no data have (NaN, inf, a negative variance).

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> model = nn.Sequential([nn.Dense(2), bnjax.linen.BatchNorm(use_running_average=True)])
      >>> x = jnp.array([[1.0, 2.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> variables["batch_stats"]["layers_1"]["mean"] = jnp.array([3.0, 4.0])
      >>> folded = bnjax.linen.fold(model, variables, {"layers_0": "layers_1"}, x)
      >>> print(folded["folded"]["layers_1"]["bias"].round(), "batch_stats" in folded)
      [-3. -4.] False
      >>> y = bnjax.linen.apply_folded(model, folded, x)
      >>> print(jnp.allclose(y, model.apply(variables, x)))
      True
    """
    flat = flatten_dict(nn.meta.unbox(variables), sep="/")
    modules, fits = _look(model, flat, pairs, args, kwargs)
    norms = {path: _read(flat, path, module.epsilon) for path, module in modules.items()}
    for layer, path in pairs.items():
        apply = functools.partial(_apply_norm, modules[path], flat, path)
        check_norm((layer, path), norms[path], modules[path].axis, fits[path], apply)

    @jax.jit
    def run(flat: Flat, shares: Mapping[str, Share]) -> Any:
        shared = flat
        for layer, path in pairs.items():
            share = shares[path]
            arrays = multiply(fits[path], *_arrays(flat, layer), share.factor)
            shared = _put(shared, layer, path, *arrays, {"mul": share.mul, "bias": share.add})
        return apply_folded(model, unflatten_dict(shared, sep="/"), *args, **kwargs)

    check_use(norms, fits, pairs, functools.partial(run, flat), shifts=False)
    folded = flat
    for layer, path in pairs.items():
        norm, (kernel, bias) = norms[path], _arrays(flat, layer)
        centered = norm._replace(mean=jnp.zeros_like(norm.mean), bias=None)
        kernel, own = fold_pair(fits[path], kernel, bias, centered)
        _, add = affine(Moments(norm.mean, norm.var), norm.scale, norm.bias, epsilon=norm.epsilon)
        own_bias = None if bias is None else own
        folded = _put(folded, layer, path, kernel, own_bias, {"bias": add})
    return unflatten_dict(folded, sep="/")


def apply_folded(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """`model.apply`, where folded batch norms add their bias and do nothing else.

    Others are called as always. The variables are from `fold`, now or from a checkpoint.

    Example:
      See `bnjax.linen.fold`.
    """
    with nn.intercept_methods(_add_bias):
        return model.apply(variables, *args, **kwargs)


def _add_bias(
    call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """In place of the call of a folded batch norm, with the dtype that its output had."""
    module = context.module
    is_folded = context.method_name == "__call__" and module.has_variable("folded", "bias")
    if not (is_folded and isinstance(module, LinenBatchNorm)):
        return call(*args, **kwargs)
    x = as_array(first(args, kwargs))
    own = jnp.zeros((), module.param_dtype) if module.use_scale or module.use_bias else None
    with jax.numpy_dtype_promotion("standard"):
        dtype = canonicalize_dtype(x, own, dtype=module.dtype)
    bias = jnp.asarray(module.get_variable("folded", "bias"))
    wide = promote(x.dtype, bias.dtype)
    _, others = split_axes(module.axis, x.shape)
    y = x.astype(wide)
    if module.has_variable("folded", "mul"):  # while `fold` checks
        mul: Array = module.get_variable("folded", "mul")
        y *= lax.expand_dims(mul.astype(wide), others)
    return (y + lax.expand_dims(bias.astype(wide), others)).astype(dtype)


def _look(
    model: nn.Module, flat: Flat, pairs: Pairs, args: Any, kwargs: Any
) -> tuple[dict[str, LinenBatchNorm], dict[str, Fit]]:
    """The named batch norms, and how they sit on their layers, seen in an abstract run."""
    modules: dict[str, nn.Module] = {}
    calls: Calls = {path: [] for pair in pairs.items() for path in pair}

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path = "/".join(context.module.path)
        seen = calls.get(path, [])
        before = len(seen)
        y = call(*args, **kwargs)
        if context.method_name == "__call__":
            modules[path] = context.module
            seen[before:] = [record(args, kwargs, y)]  # not what it calls by super()
        return y

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: model.apply(unflatten_dict(flat, sep="/"), *args, **kwargs))
    check_pairs(pairs)
    norms: dict[str, LinenBatchNorm] = {}
    fits: dict[str, Fit] = {}
    for layer, path in pairs.items():
        module, norm = find(layer, modules), find(path, modules)
        if not isinstance(module, LAYERS):
            raise refuse_layer(layer, module, LAYERS)
        if not (isinstance(norm, LinenBatchNorm) and f"batch_stats/{path}/var" in flat):
            raise refuse_norm(path, norm)
        array, _ = _arrays(flat, layer)
        kernel = Kernel(array.ndim, array.dtype)
        if isinstance(module, nn.DenseGeneral):
            batch, features = map(_length, (module.batch_dims, module.features))
            kernel = kernel._replace(batch=batch, features=features)
        if isinstance(module, nn.ConvTranspose):
            kernel = kernel._replace(transposed=module.transpose_kernel)
        fits[path] = see_fit((layer, path), calls, norm.axis, kernel)
        norms[path] = norm
    return norms, fits


def _length(axes: int | Sequence[int]) -> int:
    return 1 if isinstance(axes, int) else len(axes)


def _arrays(flat: Flat, layer: str) -> tuple[Array, Array | None]:
    return flat[f"params/{layer}/kernel"], flat.get(f"params/{layer}/bias")


def _read(flat: Flat, path: str, epsilon: float) -> Norm:
    scale, bias = (flat.get(f"params/{path}/{name}") for name in ("scale", "bias"))
    mean, var = (flat[f"batch_stats/{path}/{name}"] for name in ("mean", "var"))
    return Norm(mean, var, scale, bias, epsilon)


def _apply_norm(module: LinenBatchNorm, flat: Flat, path: str, norm: Norm, call: Call) -> Array:
    """The batch norm alone, called again with other variables."""
    own = {n.replace(f"/{path}/", "/", 1): p for n, p in flat.items() if _is_of(path, n)}
    own |= {"batch_stats/mean": norm.mean, "batch_stats/var": norm.var}
    affine = {"params/scale": norm.scale, "params/bias": norm.bias}
    own |= {name: p for name, p in affine.items() if p is not None}
    variables = unflatten_dict(own, sep="/")
    y, _ = module.clone().apply(variables, call.x, *call.args, **call.kwargs, mutable=True)
    return y


def _is_of(path: str, name: str) -> bool:
    """Whether a variable belongs to the module at this path."""
    return name.split("/", 1)[1].startswith(f"{path}/")


def _put(
    flat: Flat, layer: str, path: str, kernel: Array, bias: Array | None, left: Mapping[str, Array]
) -> Flat:
    """New arrays in the layer, and in place of the batch norm's variables what is left of it."""
    flat = {name: p for name, p in flat.items() if not _is_of(path, name)}
    flat[f"params/{layer}/kernel"] = kernel
    if bias is not None:
        flat[f"params/{layer}/bias"] = bias
    return flat | {f"folded/{path}/{name}": p for name, p in left.items()}
