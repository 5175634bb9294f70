"""The layer alone in PyTorch: eager, channels last, on as many threads as JAX uses."""

from typing import Any

import torch
from torch import nn
from work import Case, Work, cores, normal

torch.set_num_threads(cores())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer_work(case: Case) -> Work:
    """The layer, and the relu if the case has one, in one mode."""
    features = case["shape"][-1]
    layer = (nn.BatchNorm2d if len(case["shape"]) == 4 else nn.BatchNorm1d)(features, momentum=0.01)
    layer = layer.to(DEVICE).train(case["mode"] != "inference")
    x, dy = (_input(case, seed) for seed in (0, 1))

    def forward() -> torch.Tensor:
        y = layer(x)
        return torch.relu(y) if case["relu"] else y

    def without_gradients() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    def forward_backward() -> Any:
        y = forward()
        return y.detach(), torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)

    figures = {"input_bytes": x.nbytes}
    if case["mode"] != "forward_backward":
        return Work(without_gradients, wait, figures)
    x.requires_grad_()
    figures["residual_bytes"] = _saved_bytes(forward)
    return Work(forward_backward, wait, figures)


def _input(case: Case, seed: int) -> torch.Tensor:
    """NCHW for PyTorch, and NHWC in memory: its channels-last format."""
    x = torch.from_numpy(normal(tuple(case["shape"]), seed))
    x = x.to(DEVICE, getattr(torch, case["dtype"]))
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def _saved_bytes(forward: Any) -> int:
    """What autograd keeps between forward and backward, each buffer counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    del y
    return sum(kept.values())


def wait(_: Any) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
