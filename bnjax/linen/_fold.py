"""Fold the batch norms of a linen model: new variables, and flax's interceptors to apply them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from bnjax._arguments import as_array, promote, split_axes
from bnjax._fold_model import (
    Calls,
    Fit,
    Norm,
    Pairs,
    check,
    check_layer,
    check_norm,
    find,
    first,
    fold_pair,
    perturb,
    see_fit,
)
from bnjax._moments import Moments
from bnjax._normalize import affine

LAYERS = nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose
Flat = dict[str, Any]  # "params/block/Conv_0/kernel" -> array


def fold(
    model: nn.Module, variables: Mapping[str, Any], pairs: Pairs, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The variables of a model in inference whose batch norms went into the layers before them.

    Kernels are multiplied and nothing else is left of the batch norm than its bias, in the
    collection "folded". `apply_folded(model, folded, ...)` applies them; no multiplication is
    left there. See `bnjax.fold` for the formula.

    The result is checked: each named batch norm must be fed by its layer and by nothing else,
    and the model must return the same as before on the sample input, with its variables
    and with other, random ones in the batch norms.

    Args:
      model: any linen model.
      variables: its variables, as in `model.apply`.
      pairs: paths of `Dense`, `DenseGeneral`, `Conv` or `ConvTranspose` layers -> paths of the
        batch norms (flax's or ours) after them, as in `{"Block_0/Conv_0": "Block_0/BatchNorm_0"}`.
      *args, **kwargs: a sample input and what else `model.apply` takes in evaluation.

    Raises:
      ValueError: for a path, a kind of module or axes that do not fit, a batch norm that anything
        but its layer feeds, and a layer whose output is used elsewhere, too.

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
    norms, fits = _look(model, flat, pairs, args, kwargs)

    def compiled(apply: Callable[..., Any]) -> Callable[[Flat], Any]:
        return jax.jit(lambda flat: apply(unflatten_dict(flat, sep="/"), *args, **kwargs))

    run = compiled(model.apply)
    run_folded = compiled(functools.partial(apply_folded, model))

    def fold_and_run(flat: Flat, pairs: Pairs) -> Any:
        return run_folded(_folded(flat, pairs, norms, fits))

    for sample in (flat, _perturbed(flat, norms)):
        as_given = functools.partial(run, sample)
        check(pairs, fits, as_given, functools.partial(fold_and_run, sample))
    return unflatten_dict(_folded(flat, pairs, norms, fits), sep="/")


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
    norm = context.module
    if context.method_name != "__call__" or not norm.has_variable("folded", "bias"):
        return call(*args, **kwargs)
    x = as_array(first(args, kwargs))
    bias = jnp.asarray(norm.get_variable("folded", "bias"))
    own = jnp.zeros((), norm.param_dtype) if norm.use_scale or norm.use_bias else None
    with jax.numpy_dtype_promotion("standard"):
        dtype = canonicalize_dtype(x, own, dtype=norm.dtype)
    wide = promote(x.dtype, bias.dtype)
    bias = lax.expand_dims(bias.astype(wide), split_axes(norm.axis, x.shape)[1])
    return (x.astype(wide) + bias).astype(dtype)


def _look(
    model: nn.Module, flat: Flat, pairs: Pairs, args: Any, kwargs: Any
) -> tuple[dict[str, Any], dict[str, Fit]]:
    """The named batch norms, and how they sit on their layers, seen in an abstract run."""
    modules: dict[str, nn.Module] = {}
    calls: Calls = {path: [] for pair in pairs.items() for path in pair}

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name == "__call__":
            modules[path] = context.module
            if path in calls:
                calls[path].append((first(args, kwargs), y))
        return y

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: model.apply(unflatten_dict(flat, sep="/"), *args, **kwargs))
    norms = {norm: find(norm, modules) for norm in pairs.values()}
    fits = {}
    for layer, norm in pairs.items():
        module = find(layer, modules)
        check_layer(layer, module, LAYERS)
        check_norm(norm, norms[norm], f"batch_stats/{norm}/var" in flat, pairs)
        kind: dict[str, Any] = {}
        if isinstance(module, nn.DenseGeneral):
            kind = {"batch": _length(module.batch_dims), "features": _length(module.features)}
        if isinstance(module, nn.ConvTranspose):
            kind = {"transposed": module.transpose_kernel}
        ndim = flat[f"params/{layer}/kernel"].ndim
        fits[norm] = see_fit((layer, norm), calls, norms[norm].axis, ndim, **kind)
    return norms, fits


def _length(axes: Any) -> int:
    return 1 if isinstance(axes, int) else len(axes)


def _read(flat: Flat, path: str, module: Any) -> Norm:
    scale, bias = (flat.get(f"params/{path}/{name}") for name in ("scale", "bias"))
    mean, var = (flat[f"batch_stats/{path}/{name}"] for name in ("mean", "var"))
    return Norm(mean, var, scale, bias, module.epsilon)


def _perturbed(flat: Flat, norms: Mapping[str, Any]) -> Flat:
    flat = dict(flat)
    for path, module in norms.items():
        mean, var, scale, bias, _ = perturb(_read(flat, path, module))
        new = {"batch_stats": {"mean": mean, "var": var}, "params": {"scale": scale, "bias": bias}}
        given = {f"{c}/{path}/{name}": p for c, v in new.items() for name, p in v.items()}
        flat |= {name: p for name, p in given.items() if p is not None}
    return flat


def _folded(flat: Flat, pairs: Pairs, norms: Mapping[str, Any], fits: Mapping[str, Fit]) -> Flat:
    """The layers multiplied; the batch norms' variables replaced by the bias that is left."""
    flat = dict(flat)
    for layer, path in pairs.items():
        norm = _read(flat, path, norms[path])
        kernel, bias = f"params/{layer}/kernel", f"params/{layer}/bias"
        centered = norm._replace(mean=jnp.zeros_like(norm.mean), bias=None)
        flat[kernel], own = fold_pair(fits[path], flat[kernel], flat.get(bias), centered)
        if bias in flat:
            flat[bias] = own
        for name in [n for n in flat if n.split("/", 1)[1].startswith(f"{path}/")]:
            del flat[name]
        _, add = affine(Moments(norm.mean, norm.var), norm.scale, norm.bias, epsilon=norm.epsilon)
        flat[f"folded/{path}/bias"] = add
    return flat
