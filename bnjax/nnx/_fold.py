"""Fold the batch norms of an NNX model: surgery on a copy."""

import functools
from collections.abc import Callable, Mapping, MutableSequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from bnjax._arguments import Axes, as_array, promote, split_axes
from bnjax._fold_check import Share, check_norm, check_use
from bnjax._fold_model import (
    BatchNorm,
    Call,
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
    spread,
)

Layer = nnx.Linear | nnx.LinearGeneral | nnx.Conv | nnx.ConvTranspose
LAYERS = nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose


@runtime_checkable
class NNXBatchNorm(BatchNorm, Protocol):
    """And its variables."""

    mean: nnx.BatchStat[Array]
    var: nnx.BatchStat[Array]
    scale: nnx.Param[Array] | None
    bias: nnx.Param[Array] | None

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """The normalized input."""


class Folded(nnx.Module):
    """What stands in a batch norm's place: nothing but the dtype that its output had."""

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = dtype

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """x, whatever else a batch norm takes."""
        return x.astype(self.dtype)


class Affine(nnx.Module):
    """What stands there while `fold` checks: (x - shift) * mul + add."""

    def __init__(self, share: Share, axis: Axes, dtype: DTypeLike) -> None:
        self.shift, self.mul, self.add = (nnx.Variable(p) for p in share[1:])
        self.axis, self.dtype = axis, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Of the first argument."""
        x = as_array(first(args, kwargs))
        _, others = split_axes(self.axis, x.shape)
        arrays = [p[...] for p in (self.shift, self.mul, self.add)]
        wide = promote(x.dtype, *(p.dtype for p in arrays))
        shift, mul, add = (lax.expand_dims(p.astype(wide), others) for p in arrays)
        return ((x.astype(wide) - shift) * mul + add).astype(self.dtype)


def fold(model: nnx.Module, pairs: Pairs, *args: Any, **kwargs: Any) -> nnx.Module:
    """A copy of a model for inference whose batch norms went into the layers before them.

    The layers get new kernels, and a bias where they had none; the batch norms are gone. The copy
    is in evaluation mode. See `bnjax.fold` for the formula.

    The pairs are checked on the sample input: each batch norm must be fed by its layer and by
    nothing else, must normalize with its running statistics and do nothing else, and nothing else
    may depend on the layer. That holds at any precision; what the new kernels lose to rounding is
    what their dtype loses.

    Args:
      model: any NNX model; it stays as it is.
      pairs: paths of `Linear`, `LinearGeneral`, `Conv` or `ConvTranspose` layers -> paths of
        the batch norms (flax's or ours) after them, such as `{"blocks/0/conv": "blocks/0/norm"}`.
      *args, **kwargs: a sample input and what else the model is called with in evaluation.

    Raises:
      ValueError: for a path, a kind of module or axes that do not fit, a batch norm that anything
        but its layer feeds, a layer whose output is used elsewhere, too, and for statistics that
        no data have (NaN, inf, a negative variance).

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
    norms, fits = _look(model, pairs, args, kwargs)
    values = {path: _read(norm) for path, norm in norms.items()}
    for pair in pairs.items():
        norm, fit = norms[pair[1]], fits[pair[1]]
        check_norm(pair, values[pair[1]], norm.axis, fit, functools.partial(_apply_norm, norm))

    def run(shares: Mapping[str, Share]) -> Any:
        def share_out(layer: Layer, path: str) -> nnx.Module:
            share, fit = shares[path], fits[path]
            kernel, bias = multiply(fit, *_arrays(layer), share.factor)
            shift = spread(fit, kernel, share.shift)
            start = jnp.zeros(shift.shape, kernel.dtype) if bias is None else bias
            _set(layer, kernel, start + shift.astype(start.dtype))
            return Affine(share, norms[path].axis, fit.norm_calls[0].y.dtype)

        return _changed(model, pairs, share_out)(*args, **kwargs)

    def fold_in(layer: Layer, path: str) -> nnx.Module:
        _set(layer, *fold_pair(fits[path], *_arrays(layer), values[path]))
        return Folded(fits[path].norm_calls[0].y.dtype)

    check_use(values, fits, pairs, run, shifts=True)
    return _changed(model, pairs, fold_in)


def _look(
    model: nnx.Module, pairs: Pairs, args: Any, kwargs: Any
) -> tuple[dict[str, NNXBatchNorm], dict[str, Fit]]:
    """The named batch norms, and how they sit on their layers, seen in a run of a copy."""
    check_pairs(pairs)
    copy = nnx.clone(model)
    modules, watched = _modules(model), _modules(copy)
    layers: dict[str, Layer] = {}
    norms: dict[str, NNXBatchNorm] = {}
    for layer, path in pairs.items():
        module, norm = find(layer, modules), find(path, modules)
        if not isinstance(module, LAYERS):
            raise refuse_layer(layer, module, LAYERS)
        if not isinstance(norm, NNXBatchNorm):
            raise refuse_norm(path, norm)
        layers[layer], norms[path] = module, norm
    calls = {path: _watch(watched[path]) for path in (*layers, *norms)}
    copy(*args, **kwargs)
    fits = {}
    for pair in pairs.items():
        linear = layers[pair[0]]
        array, _ = _arrays(linear)
        kernel = Kernel(array.ndim, array.dtype)
        if isinstance(linear, nnx.LinearGeneral):
            batch, features = map(len, (linear.batch_axis, linear.out_features))
            kernel = kernel._replace(batch=batch, features=features)
        if isinstance(linear, nnx.ConvTranspose):
            kernel = kernel._replace(transposed=linear.transpose_kernel)
        fits[pair[1]] = see_fit(pair, calls, norms[pair[1]].axis, kernel)
    return norms, fits


def _watch(module: nnx.Module) -> list[Call]:
    """Will hold the calls: the module gets a class of its own, as calls are the class's."""
    seen: list[Call] = []
    kind = type(module)
    call: Callable[..., Array] = kind.__call__

    def watched(self: nnx.Module, *args: Any, **kwargs: Any) -> Array:
        y = call(self, *args, **kwargs)
        seen.append(record(args, kwargs, y))
        return y

    object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"__call__": watched}))
    return seen


def _nodes(model: nnx.Module) -> dict[str, Any]:
    """What the model consists of, by path. What sits in several places has the first of them."""
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}


def _modules(model: nnx.Module) -> dict[str, nnx.Module]:
    return {path: node for path, node in _nodes(model).items() if isinstance(node, nnx.Module)}


def _arrays(layer: Layer) -> tuple[Array, Array | None]:
    return layer.kernel[...], None if layer.bias is None else layer.bias[...]


def _set(layer: Layer, kernel: Array, bias: Array | None) -> None:
    layer.kernel[...] = kernel
    if layer.bias is not None:
        layer.bias[...] = bias
    elif bias is not None:
        layer.bias, layer.use_bias = nnx.Param(bias), True


def _read(norm: NNXBatchNorm) -> Norm:
    scale, bias = (None if p is None else p[...] for p in (norm.scale, norm.bias))
    return Norm(norm.mean[...], norm.var[...], scale, bias, norm.epsilon)


def _apply_norm(norm: NNXBatchNorm, values: Norm, call: Call) -> Array:
    """The batch norm alone, called again with other variables."""
    norm = nnx.clone(norm)
    for name in ("mean", "var", "scale", "bias"):
        if getattr(values, name) is not None:
            getattr(norm, name)[...] = getattr(values, name)
    return norm(call.x, *call.args, **call.kwargs)


def _changed(
    model: nnx.Module, pairs: Pairs, change: Callable[[Layer, str], nnx.Module]
) -> nnx.Module:
    """A copy in which layers are changed, and what that returns is in the batch norms' places."""
    model = nnx.clone(model)
    nodes = _nodes(model)
    for layer, path in pairs.items():
        *parent, name = path.split("/")
        _put(nodes["/".join(parent)], name, change(nodes[layer], path))
    return model


def _put(parent: Any, name: str, module: nnx.Module) -> None:
    if isinstance(parent, MutableSequence):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)
