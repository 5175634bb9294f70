"""Fold the batch norms of an NNX model: surgery on a copy."""

import functools
from collections.abc import Callable, MutableSequence
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import DTypeLike

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

LAYERS = nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose


class Folded(nnx.Module):
    """What stands in a batch norm's place: nothing but the dtype that its output had."""

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = dtype

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """x, whatever else a batch norm takes."""
        return x.astype(self.dtype)


def fold(model: nnx.Module, pairs: Pairs, *args: Any, **kwargs: Any) -> nnx.Module:
    """A copy of a model for inference whose batch norms went into the layers before them.

    The layers get new kernels, and a bias where they had none; the batch norms are gone. The copy
    is in evaluation mode. See `bnjax.fold` for the formula.

    The result is checked: each named batch norm must be fed by its layer and by nothing else,
    and the model must return the same as before on the sample input, with its variables
    and with other, random ones in the batch norms.

    Args:
      model: any NNX model; it stays as it is.
      pairs: paths of `Linear`, `LinearGeneral`, `Conv` or `ConvTranspose` layers -> paths of
        the batch norms (flax's or ours) after them, such as `{"blocks/0/conv": "blocks/0/norm"}`.
      *args, **kwargs: a sample input and what else the model is called with in evaluation.

    Raises:
      ValueError: for a path, a kind of module or axes that do not fit, a batch norm that anything
        but its layer feeds, and a layer whose output is used elsewhere, too.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(2, 2, use_bias=False, rngs=rngs), bnjax.nnx.BatchNorm(2, rngs=rngs))
      >>> model.eval()
      >>> model.layers[1].mean[...] = jnp.array([3.0, 4.0])
      >>> x = jnp.array([[1.0, 2.0]])
      >>> folded = bnjax.nnx.fold(model, {"layers/0": "layers/1"}, x)
      >>> print(folded.layers[0].bias[...].round(), nnx.state(folded, nnx.BatchStat))
      [-3. -4.] State({})
      >>> print(jnp.allclose(folded(x), model(x)))
      True
    """
    model = nnx.clone(model)
    model.eval()
    fits = _look(model, pairs, args, kwargs)

    def run_folded(model: Any, pairs: Pairs) -> Any:
        return _folded(model, pairs, fits)(*args, **kwargs)

    for sample in (model, _perturbed(model, pairs)):
        as_given = functools.partial(sample, *args, **kwargs)
        check(pairs, fits, as_given, functools.partial(run_folded, sample))
    return _folded(model, pairs, fits)


def _look(model: Any, pairs: Pairs, args: Any, kwargs: Any) -> dict[str, Fit]:
    """How the named batch norms sit on their layers, seen in a run of a copy of the model."""
    model = nnx.clone(model)
    nodes = _nodes(model)
    modules: dict[str, Any] = {p: n for p, n in nodes.items() if isinstance(n, nnx.Module)}
    calls: Calls = {path: [] for pair in pairs.items() for path in pair}
    for layer, norm in pairs.items():
        check_layer(layer, find(layer, modules), LAYERS)
        check_norm(norm, find(norm, modules), hasattr(modules[norm], "var"), pairs)
    for path, seen in calls.items():
        _watch(modules[path], seen)
    model(*args, **kwargs)
    fits = {}
    for layer, norm in pairs.items():
        module = modules[layer]
        kind: dict[str, Any] = {}
        if isinstance(module, nnx.LinearGeneral):
            kind = {"batch": len(module.batch_axis), "features": len(module.out_features)}
        if isinstance(module, nnx.ConvTranspose):
            kind = {"transposed": module.transpose_kernel}
        fits[norm] = see_fit((layer, norm), calls, modules[norm].axis, module.kernel.ndim, **kind)
    return fits


def _watch(module: Any, seen: list[tuple[Any, Any]]) -> None:
    """Notes input and output of each call: by a class of its own, as calls are the class's."""
    kind = type(module)
    call: Callable[..., Any] = kind.__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(self, *args, **kwargs)
        seen.append((first(args, kwargs), y))
        return y

    object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"__call__": watched}))


def _nodes(model: Any) -> dict[str, Any]:
    """What the model consists of, by path. What sits in several places has the first of them."""
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}


def _read(norm: Any) -> Norm:
    mean, var, scale, bias = (getattr(norm, name) for name in ("mean", "var", "scale", "bias"))
    scale, bias = (None if p is None else p[...] for p in (scale, bias))
    return Norm(mean[...], var[...], scale, bias, norm.epsilon)


def _perturbed(model: Any, pairs: Pairs) -> Any:
    model = nnx.clone(model)
    nodes = _nodes(model)
    for path in pairs.values():
        norm = nodes[path]
        mean, var, scale, bias, _ = perturb(_read(norm))
        new = {"mean": mean, "var": var, "scale": scale, "bias": bias}
        for name, p in new.items():
            if p is not None:
                getattr(norm, name)[...] = p
    return model


def _folded(model: Any, pairs: Pairs, fits: dict[str, Fit]) -> Any:
    model = nnx.clone(model)
    nodes = _nodes(model)
    for path, norm in pairs.items():
        layer = nodes[path]
        own = None if layer.bias is None else layer.bias[...]
        kernel, bias = fold_pair(fits[norm], layer.kernel[...], own, _read(nodes[norm]))
        layer.kernel[...] = kernel
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(bias), True
        else:
            layer.bias[...] = bias
        *parent, name = norm.split("/")
        _put(nodes["/".join(parent)], name, Folded(fits[norm].dtype))
    return model


def _put(parent: Any, name: str, module: nnx.Module) -> None:
    if isinstance(parent, MutableSequence):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)
