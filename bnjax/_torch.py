"""Batch norms from PyTorch and back: its names for ours, and its arrays."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

# PyTorch's name, the collection it goes to, and our name.
_ENTRIES = (
    ("weight", "params", "scale"),
    ("bias", "params", "bias"),
    ("running_mean", "batch_stats", "mean"),
    ("running_var", "batch_stats", "var"),
    ("num_batches_tracked", "batch_stats", "steps"),
)


def from_torch(
    state_dict: Mapping[str, ArrayLike], prefix: str = ""
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Variables of our layers from a PyTorch `BatchNorm1d`, `2d`, `3d` or `SyncBatchNorm`.

    | PyTorch | ours |
    |---|---|
    | `weight`, `bias` | `params`: `scale`, `bias` |
    | `running_mean`, `running_var` | `batch_stats`: `mean`, `var` |
    | `num_batches_tracked` | `batch_stats`: `steps` (int32) |

    What PyTorch's layer lacks (`affine=False`, `bias=False`, `track_running_stats=False`) is
    left out, for layers with `use_scale=False` and so on. A state dict does not carry the
    settings. `BatchNorm2d(n, eps, momentum)` continues exactly with `axis=1` (channels first),
    `epsilon=eps`, `momentum=1 - momentum` (but None stays None), and `ddof=1`, because
    PyTorch's running variance is unbiased. Only layers that count their steps have `steps`
    (`momentum=None`); drop it for others. Without running statistics PyTorch's layer uses
    the batch's in evaluation, too: `use_running_average=False`.

    Args:
      state_dict: arrays, or PyTorch tensors on the CPU of a dtype that NumPy has.
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
    dot = f"{prefix}." if prefix else ""
    entries = {k.removeprefix(dot): v for k, v in state_dict.items() if k.startswith(dot)}
    if dot and not entries:
        norms = [k.removesuffix(".running_mean") for k in state_dict if k.endswith(".running_mean")]
        raise ValueError(
            f"state_dict has no entry that starts with {dot!r}. "
            f"Batch norms in it are {_listed(norms) or 'none'}."
        )
    _check_names(entries, dot)
    variables: dict[str, dict[str, Array]] = {"params": {}, "batch_stats": {}}
    for theirs, collection, ours in _ENTRIES:
        if theirs in entries:
            p = np.asarray(entries[theirs])
            variables[collection][ours] = jnp.array(p, jnp.int32 if ours == "steps" else None)
    _check_shapes(variables, dot)
    return variables["params"], variables["batch_stats"]


def to_torch(
    params: Mapping[str, ArrayLike], batch_stats: Mapping[str, ArrayLike], prefix: str = ""
) -> dict[str, np.ndarray]:
    """Entries of a PyTorch state dict from our layers' variables: the inverse of `from_torch`.

    The table is there. `load_state_dict` takes tensors: `torch.from_numpy` makes them. PyTorch's
    layer with running statistics asks for `num_batches_tracked`, too, which is there if
    `steps` is in `batch_stats`; it matters for `momentum=None` alone.

    Args:
      params, batch_stats: one layer's, for example `variables["params"]["BatchNorm_0"]`.
      prefix: the name that the layer has in PyTorch's model; empty for the layer's own.

    Returns:
      NumPy arrays of the same dtypes (`num_batches_tracked` is int64, as in PyTorch).

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
    arrays = {c: {name: np.array(p) for name, p in v.items()} for c, v in variables.items()}
    _check_shapes(arrays, f"{prefix}." if prefix else "")
    return {
        f"{prefix}.{theirs}" if prefix else theirs: (
            arrays[c][ours].astype(np.int64) if ours == "steps" else arrays[c][ours]
        )
        for theirs, c, ours in _ENTRIES
        if ours in arrays[c]
    }


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
