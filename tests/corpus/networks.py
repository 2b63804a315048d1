"""Five small networks of different kinds, and how each is trained on the digits of sample_ckpts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.places import SAMPLES

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class Residual(nn.Module):
    """A block of ResNet: two convolutions, each normalised, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """A block of MobileNet v2: expand, depthwise, project without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.skips = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return x + y if self.skips else y


class Branches(nn.Module):
    """A block of RepVGG: 3x3, 1x1 and identity, each with a BatchNorm, added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.point = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.identity = nn.BatchNorm2d(outputs) if stride == 1 and inputs == outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(x) + self.point(x)
        return F.relu(y if self.identity is None else y + self.identity(x))


class UNet(nn.Module):
    """Down, up and across; gives an image."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = _twice(1, 12)
        self.down = _twice(12, 24)
        self.middle = _twice(24, 32)
        self.up1, self.across1 = nn.ConvTranspose2d(32, 24, 2, 2), _twice(48, 24)
        self.up2, self.across2 = nn.ConvTranspose2d(24, 12, 2, 2), _twice(24, 12)
        self.last = nn.Conv2d(12, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.enter(x)
        b = self.down(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        b = self.across1(torch.cat([self.up1(c), b], 1))
        y: torch.Tensor = self.last(self.across2(torch.cat([self.up2(b), a], 1)))
        return y


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 1, 1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Waves(nn.Module):
    """Wide 1d convolutions over a signal, as of raw audio: BatchNorm behind the activation, and one on vectors."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, size, stride in ((1, 16, 9, 2), (16, 24, 7, 2), (24, 32, 5, 2)):
            layers += [nn.Conv1d(inputs, outputs, size, stride, size // 2), nn.LeakyReLU(0.1), nn.BatchNorm1d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.dense, self.norm, self.head = nn.Linear(32, 24), nn.BatchNorm1d(24), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x.flatten(2)).mean(2)
        out: torch.Tensor = self.head(F.relu(self.norm(self.dense(y))))
        return out


def _classifier(block: Callable[[int, int, int], nn.Module], widths: Iterable[tuple[int, int]]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    last = 12
    for width, stride in widths:
        layers.append(block(last, width, stride))
        last = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


def _classify(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), labels)


def _denoise(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(images + 0.5 * torch.randn_like(images)), images)


@dataclass(frozen=True)
class Network:
    """A kind of network.

    Attributes:
        held_out: no threshold was set by it.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Loss = _classify
    held_out: bool = False


NETWORKS = (
    Network("ResNet", lambda: _classifier(Residual, ((12, 1), (24, 2), (24, 1), (32, 2)))),
    Network("MobileNet", lambda: _classifier(InvertedResidual, ((12, 1), (16, 2), (16, 1), (28, 2)))),
    Network("RepVGG", lambda: _classifier(Branches, ((12, 1), (24, 2), (24, 1), (32, 2)))),
    Network("UNet", UNet, _denoise, held_out=True),
    Network("audio", Waves, held_out=True),
)


class Data:
    """Batches of digits, the same at each run."""

    def __init__(self) -> None:
        with np.load(SAMPLES / "digits_train.npz") as arrays:
            self.images, self.labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])

    def batches(self, count: int, *, size: int = 16, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """So many batches of random samples."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            chosen = torch.randint(len(self.images), (size,), generator=generator)
            yield self.images[chosen], self.labels[chosen]


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Its BatchNorm layers, in order."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
