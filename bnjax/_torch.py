"""Batch norms from PyTorch and back: its names for ours, and its arrays."""

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.dtypes import canonicalize_dtype
from jax.typing import ArrayLike

# PyTorch's name, the collection it goes to, and our name.
_ENTRIES = (
    ("weight", "params", "scale"),
    ("bias", "params", "bias"),
    ("running_mean", "batch_stats", "mean"),
    ("running_var", "batch_stats", "var"),
    ("num_batches_tracked", "batch_stats", "steps"),
)


@runtime_checkable
class Tensor(Protocol):
    """PyTorch's tensor or parameter, without importing it."""

    dtype: Any

    def detach(self) -> Self:
        """Without its gradient."""

    def cpu(self) -> Self:
        """In the host's memory."""

    def float(self) -> Self:
        """As float32."""


def from_torch(
    state_dict: Mapping[str, ArrayLike | Tensor], prefix: str = ""
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Variables of our layers from a PyTorch `BatchNorm1d`, `2d`, `3d` or `SyncBatchNorm`.

    | PyTorch | ours |
    |---|---|
    | `weight`, `bias` | `params`: `scale`, `bias` |
    | `running_mean`, `running_var` | `batch_stats`: `mean`, `var` |
    | `num_batches_tracked` | `batch_stats`: `steps` (int32; see below) |

    What PyTorch's layer lacks (`affine=False`, `bias=False`, `track_running_stats=False`) is
    left out, for layers with `use_scale=False` and so on. A state dict does not carry the
    settings. `BatchNorm2d(n, eps, momentum)` continues exactly with `axis=1` (channels first),
    `epsilon=eps`, `momentum=1 - momentum` (but None stays None), and `ddof=1`, because
    PyTorch's running variance is unbiased. Only layers that count their steps have `steps`
    (`momentum=None`); drop it for others. Without running statistics PyTorch's layer uses
    the batch's in evaluation, too: `use_running_average=False`. Above 2^31 - 1, which int32
    holds, `steps` is int64 where `jax_enable_x64` is set; else it stays there, where one more
    batch is too small a part of the average for float32 to see.

    Args:
      state_dict: PyTorch tensors, also of bfloat16, on a GPU, or with a gradient; or arrays.
      prefix: the layer's name in it, say "layer1.0.bn1"; empty for the layer's own.

    Returns:
      `(params, batch_stats)`: copies, of the same dtypes where JAX has them (float64 needs
      `jax_enable_x64`).

    Raises:
      ValueError: where the layer or a part of it is missing, and for entries that are not batch
        normalization's, by name or by shape.

    Example:
      >>> import bnjax, numpy as np
      >>> state_dict = {"bn.weight": np.ones(2), "bn.bias": np.zeros(2),
      ...     "bn.running_mean": np.array([1.0, 2.0]), "bn.running_var": np.ones(2)}
      >>> params, batch_stats = bnjax.from_torch(state_dict, "bn")
      >>> print(params["scale"], batch_stats["mean"])
      [1. 1.] [1. 2.]
    """
    prefix = prefix.removesuffix(".")
    dot = f"{prefix}." if prefix else ""
    entries = {k.removeprefix(dot): v for k, v in state_dict.items() if k.startswith(dot)}
    if dot and not entries:
        raise ValueError(
            f"state_dict has no entry that starts with {dot!r}. "
            f"Batch norms in it are {_listed(_norms(state_dict)) or 'none'}."
        )
    _check_names(entries, dot)
    variables: dict[str, dict[str, Array]] = {"params": {}, "batch_stats": {}}
    for theirs, collection, ours in _ENTRIES:
        if theirs in entries:
            p = _read(entries[theirs])
            variables[collection][ours] = _as_steps(p) if ours == "steps" else jnp.array(p)
    _check_shapes(variables, dot)
    return variables["params"], variables["batch_stats"]


def from_torch_model(
    state_dict: Mapping[str, ArrayLike | Tensor], prefix: str = ""
) -> tuple[dict[str, dict[str, Array]], dict[str, dict[str, Array]]]:
    """`from_torch` of all the batch norms in the state dict of a PyTorch model.

    A batch norm is what has a `running_mean` and a `running_var`; so those without running
    statistics are not found. Names are PyTorch's: a table of them
    takes the variables into a model of ours, and `to_torch` of each leads back.

    Args:
      state_dict: as in `from_torch`.
      prefix: what all names begin with, to be left out: "module" for a model in `DataParallel`
        or `AveragedModel`, "ema_model.module" or the like for averaged weights in a checkpoint.
        Names that begin with anything else are not read.

    Returns:
      `(params, batch_stats)`, each a dict from names to what `from_torch` returns.

    Raises:
      ValueError: where there is no batch norm, and as in `from_torch`.

    Example:
      >>> import bnjax, numpy as np
      >>> norm = {"weight": np.ones(2), "running_mean": np.zeros(2), "running_var": np.ones(2)}
      >>> state_dict = {f"module.{name}.{key}": value
      ...     for name in ("bn1", "layer1.0.bn1") for key, value in norm.items()}
      >>> params, batch_stats = bnjax.from_torch_model(state_dict, "module")
      >>> print(*params)
      bn1 layer1.0.bn1
      >>> back = [bnjax.to_torch(params[name], batch_stats[name], f"module.{name}")
      ...     for name in params]
      >>> print(*back[0])
      module.bn1.weight module.bn1.running_mean module.bn1.running_var
    """
    prefix = prefix.removesuffix(".")
    dot = f"{prefix}." if prefix else ""
    all_norms = _norms(state_dict)
    norms = [name for name in all_norms if name == prefix or name.startswith(dot)]
    if not norms:
        raise ValueError(
            f"state_dict has no batch norm with running statistics under the prefix {prefix!r}. "
            f"Those in it are {_listed(all_norms) or 'none'}. "
            f"Its first entries are {_listed(list(state_dict)[:3]) or 'none'}."
        )
    params, batch_stats = {}, {}
    for name in norms:
        keys = [f"{name}.{theirs}" if name else theirs for theirs, *_ in _ENTRIES]
        own = {key: state_dict[key] for key in keys if key in state_dict}
        ours = "" if name == prefix else name.removeprefix(dot)
        params[ours], batch_stats[ours] = from_torch(own, name)
    return params, batch_stats


def _norms(state_dict: Mapping[str, object]) -> list[str]:
    """The names of the batch norms, as far as they have running statistics."""
    ends = (key.rpartition(".") for key in state_dict)
    return [name for name, _, entry in ends if entry == "running_mean"]


def _read(p: ArrayLike | Tensor) -> np.ndarray:
    """As an array of NumPy's, in which bfloat16 is what JAX added, by way of float32: exact."""
    if not isinstance(p, Tensor):
        return np.asarray(p)
    p = p.detach().cpu()
    if str(p.dtype) == "torch.bfloat16":
        return np.asarray(p.float()).astype(jnp.bfloat16)
    return np.asarray(p)


def _as_steps(p: np.ndarray) -> Array:
    """A counter: int32, as layers have it, where that holds it."""
    fits = np.all(p <= np.iinfo(np.int32).max)
    dtype = np.dtype(np.int32) if fits else canonicalize_dtype(np.int64)
    return jnp.asarray(np.minimum(p, np.iinfo(dtype).max), dtype)


def to_torch(
    params: Mapping[str, ArrayLike], batch_stats: Mapping[str, ArrayLike], prefix: str = ""
) -> dict[str, np.ndarray]:
    """Entries of a PyTorch state dict from our layers' variables: the inverse of `from_torch`.

    The table is there. `load_state_dict` takes tensors: `torch.from_numpy` makes them. PyTorch's
    layer with running statistics asks for `num_batches_tracked`, too, which is there if
    `steps` is in `batch_stats`; it matters for `momentum=None` alone. bfloat16 comes as float32,
    which holds it exactly and which NumPy and PyTorch share; a layer of bfloat16 takes it back.

    Args:
      params, batch_stats: one layer's, for example `variables["params"]["BatchNorm_0"]`.
      prefix: the name that the layer has in PyTorch's model; empty for the layer's own.

    Returns:
      NumPy arrays of the same dtypes, but for bfloat16 (`num_batches_tracked` is int64, as in
      PyTorch).

    Raises:
      ValueError: for variables that are not batch normalization's, by name or by shape.

    Example:
      >>> import bnjax, numpy as np
      >>> state = bnjax.to_torch({"scale": np.ones(2)}, {"mean": np.zeros(2), "var": np.ones(2)})
      >>> print(list(state))
      ['weight', 'running_mean', 'running_var']
    """
    variables = {"params": dict(params), "batch_stats": dict(batch_stats)}
    for collection, given in variables.items():
        known = [ours for _, where, ours in _ENTRIES if where == collection]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"{collection} has {_listed(unknown)}, but batch normalization has "
                f"{_listed(known)}. Give the variables of one layer."
            )
    arrays = {c: {name: _write(p) for name, p in v.items()} for c, v in variables.items()}
    _check_shapes(arrays, f"{prefix}." if prefix else "")
    return {
        f"{prefix}.{theirs}" if prefix else theirs: (
            arrays[c][ours].astype(np.int64) if ours == "steps" else arrays[c][ours]
        )
        for theirs, c, ours in _ENTRIES
        if ours in arrays[c]
    }


def _write(p: ArrayLike) -> np.ndarray:
    """A copy of a dtype that NumPy has by itself, for PyTorch reads no other array."""
    p = np.array(p)
    return p.astype(np.float32) if p.dtype == jnp.bfloat16 else p


def _check_names(entries: Mapping[str, Any], dot: str) -> None:
    """Refuses a part of PyTorch's state dict that is not one batch norm's, or not all of it."""
    known = [theirs for theirs, _, _ in _ENTRIES]
    if unknown := [dot + name for name in entries if name not in known]:
        raise ValueError(
            f"state_dict has {_listed(unknown)}, but a batch norm has "
            f"{_listed([dot + name for name in known])}. Give the prefix of one batch norm."
        )
    for name, needed in (
        ("bias", "weight"),
        ("running_mean", "running_var"),
        ("running_var", "running_mean"),
        ("num_batches_tracked", "running_mean"),
    ):
        if name in entries and needed not in entries:
            raise ValueError(
                f"state_dict has {dot + name!r}, but not {dot + needed!r}. "
                "Give all entries of the batch norm."
            )


def _check_shapes(variables: Mapping[str, Mapping[str, Any]], dot: str) -> None:
    """Refuses what is not one value for each feature, and steps that are not one number."""
    given = {
        f"{dot}{theirs} ({ours})": (variables[collection][ours], ours == "steps")
        for theirs, collection, ours in _ENTRIES
        if ours in variables[collection]
    }
    sizes = {p.shape for p, is_scalar in given.values() if not is_scalar}
    fits = len(sizes) < 2 and all(len(shape) == 1 for shape in sizes)
    if not fits or any(p.shape for p, is_scalar in given.values() if is_scalar):
        shapes = ", ".join(f"{name} {p.shape}" for name, (p, _) in given.items())
        raise ValueError(
            f"The shapes are {shapes}. In a PyTorch batch norm all are [features], and "
            "num_batches_tracked (steps) is a scalar."
        )


def _listed(names: list[str], most: int = 5) -> str:
    """The first names, quoted."""
    more = ["..."] if len(names) > most else []
    return ", ".join([*map(repr, names[:most]), *more])
