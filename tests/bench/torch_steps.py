"""A training step of ResNet-50 in PyTorch: eager, channels last, bfloat16 by autocast."""

import torch
from torch import nn
from torch_layers import DEVICE, wait
from work import Case, Work, normal


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, and around them a shortcut."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * channels
        self.branch = nn.Sequential(
            *(_conv(inputs, channels, 1, 1), nn.ReLU()),
            *(_conv(channels, channels, 3, stride), nn.ReLU()),
            _conv(channels, outputs, 1, 1),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    inputs, blocks = 64, []
    for i, count in enumerate((3, 4, 6, 3)):
        for j in range(count):
            blocks.append(Bottleneck(inputs, 64 * 2**i, 2 if i > 0 and j == 0 else 1))
            inputs = 256 * 2**i
    stem = _conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)
    return nn.Sequential(*stem, *blocks, *head)


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
    """A convolution and its batch normalization."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, momentum=0.01))


def step_work(case: Case) -> Work:
    """Loss, gradients, and stochastic gradient descent."""
    model = resnet50().to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images = torch.from_numpy(normal((case["batch"], 224, 224, 3), 0)).to(DEVICE)
    images = images.permute(0, 3, 1, 2)  # NHWC in memory: channels last
    labels = torch.arange(case["batch"], device=DEVICE) % 1000

    def call() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case["dtype"] == "bfloat16"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return Work(call, wait, {})
