"""A ResNet-18 in PyTorch, with the names of torchvision's: its batch norms in one call."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from agreement import difference
from torch.nn.functional import cross_entropy

import bnjax

WIDTHS = 64, 128, 256, 512
CLASSES = 10


def bare_conv(width, out, size, stride=1):
    return torch.nn.Conv2d(width, out, size, stride, size // 2, bias=False)


class BasicBlock(torch.nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = bare_conv(width, out, 3, stride)
        self.bn1 = torch.nn.BatchNorm2d(out)
        self.relu = torch.nn.ReLU()
        self.conv2 = bare_conv(out, out, 3)
        self.bn2 = torch.nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or width != out:
            shortcut = bare_conv(width, out, 1, stride), torch.nn.BatchNorm2d(out)
            self.downsample = torch.nn.Sequential(*shortcut)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = bare_conv(3, 64, 7, 2)
        self.bn1 = torch.nn.BatchNorm2d(64)
        self.relu = torch.nn.ReLU()
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1)
        for i, (width, out) in enumerate(zip((64, *WIDTHS), WIDTHS, strict=False), 1):
            blocks = BasicBlock(width, out, 1 if i == 1 else 2), BasicBlock(out, out, 1)
            setattr(self, f"layer{i}", torch.nn.Sequential(*blocks))
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(512, CLASSES)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class Flax(nn.Module):
    """The same in linen. Names are PyTorch's, with the dots that flax does not allow as _."""

    @nn.compact
    def __call__(self, x, train=False):
        def conv(x, out, size, stride, name):
            layer = nn.Conv(
                out,
                (size, size),
                stride,
                size // 2,
                use_bias=False,
                param_dtype=jnp.float64,
                name=name,
            )
            return layer(x)

        def norm(x, name):
            layer = bnjax.linen.BatchNorm(not train, momentum=0.9, ddof=1, name=name)
            return layer(x)

        x = nn.relu(norm(conv(x, 64, 7, 2, "conv1"), "bn1"))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, out in enumerate(WIDTHS, 1):
            for j in range(2):
                block, stride = f"layer{i}_{j}_", 2 if i > 1 and j == 0 else 1
                y = nn.relu(norm(conv(x, out, 3, stride, f"{block}conv1"), f"{block}bn1"))
                y = norm(conv(y, out, 3, 1, f"{block}conv2"), f"{block}bn2")
                if x.shape != y.shape:
                    x = conv(x, out, 1, stride, f"{block}downsample_0")
                    x = norm(x, f"{block}downsample_1")
                x = nn.relu(x + y)
        return nn.Dense(CLASSES, param_dtype=jnp.float64, name="fc")(x.mean((1, 2)))


def random_model():
    torch.manual_seed(0)
    model = ResNet18().double()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for p in layer.weight, layer.running_var:
                torch.nn.init.uniform_(p, 0.5, 2.0)
            for p in layer.bias, layer.running_mean:
                torch.nn.init.normal_(p)
    return model


def variables_of(model):
    """All batch norms by one call; what else there is, is transposed."""
    state = model.state_dict()
    params, batch_stats = bnjax.from_torch_model(state)
    for stats in batch_stats.values():
        del stats["steps"]
    for name, array in state.items():
        layer, _, kind = name.rpartition(".")
        if array.ndim == 4:
            params[layer] = {"kernel": jnp.transpose(array.numpy(), (2, 3, 1, 0))}
        elif layer == "fc":
            dense = params.setdefault(layer, {})
            dense["kernel" if kind == "weight" else kind] = jnp.array(array.numpy().T)
    return {"params": flax_names(params), "batch_stats": flax_names(batch_stats)}


def flax_names(tree):
    return {name.replace(".", "_"): p for name, p in tree.items()}


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 8, 3, 64, 64)), rng.integers(0, CLASSES, (3, 8))


def train_torch(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for x, labels in zip(*map(torch.from_numpy, data()), strict=True):
        optimizer.zero_grad()
        losses.append(cross_entropy(model(x), labels))
        losses[-1].backward()
        optimizer.step()
    model.eval()
    return [loss.item() for loss in losses]


def train_flax(variables):
    optimizer = optax.sgd(0.01, momentum=0.9)

    @jax.jit
    def step(variables, state, x, labels):
        def loss(params):
            y, updates = Flax().apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(y, labels)
            return losses.mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer.update(grads, state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, state, value

    state, losses = optimizer.init(variables["params"]), []
    for x, labels in zip(*data(), strict=True):
        variables, state, loss = step(variables, state, channels_last(x), labels)
        losses.append(loss)
    return losses, variables


def channels_last(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


@pytest.fixture
def doubles():
    with jax.enable_x64(True):
        yield


@torch.no_grad()
def predictions(model, x):
    return model(torch.from_numpy(x)).numpy()


@pytest.mark.usefixtures("doubles")
def test_a_resnet_of_pytorch(row):
    model = random_model().eval()
    variables = variables_of(model)
    x = data()[0][0]
    expected = predictions(model, x)
    evaluated = Flax().apply(variables, channels_last(x))

    pairs = {"conv1": "bn1"}
    for name in variables["batch_stats"]:
        layer = name.replace("bn", "conv").replace("downsample_1", "downsample_0")
        pairs[layer] = name
    folded = bnjax.linen.fold(Flax(), variables, pairs, channels_last(x))
    folded = bnjax.linen.apply_folded(Flax(), folded, channels_last(x))
    assert len(pairs) == 20

    losses, trained = train_flax(variables)
    expected_losses = train_torch(model)
    differences = {
        "evaluated": difference(evaluated, expected),
        "folded": difference(folded, expected),
        "losses": difference(losses, expected_losses),
        "trained": difference(trained, variables_of(model)),
    }
    print(differences)
    assert max(differences.values()) < 1e-10
    row(
        "ResNet-18 in PyTorch, float64: evaluated, folded, three steps of training",
        "torch",
        max(differences.values()),
        "`from_torch_model`, then `momentum=0.9, ddof=1`",
    )
