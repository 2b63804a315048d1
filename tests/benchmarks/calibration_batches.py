"""What batch size and order do to each way of recomputing statistics, on a real network and shifted images.

ResNet-20 for CIFAR-10, images with a quarter of their contrast; the table of docs/recalibration.md. Needs the folder of
real checkpoints that ``BNTOOL_SHARED`` names.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.modules.loading import load_state
from bntool.recalibration.live import recalibrate
from tests.places import SHARED

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SAMPLES = 2000


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.padding = (outputs - inputs) // 2
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(out + nn.functional.pad(x, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def load_resnet20() -> ResNet20:
    """The trained network of the shared folder."""
    model = ResNet20()
    with open_checkpoint(SHARED / "weights" / "resnet20-12fca82f.th") as checkpoint:
        load_state(model, choose_state_dict(checkpoint))
    return model.eval()


def load_images(name: str, *, contrast: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images, shape (N, 3, 32, 32), and labels; pixels are pulled towards grey by ``contrast``."""
    arrays = np.load(SHARED / "data" / name)
    pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 255
    pixels = 0.5 + contrast * (pixels - 0.5)
    images = (pixels - torch.tensor(_MEAN).reshape(1, 3, 1, 1)) / torch.tensor(_STD).reshape(1, 3, 1, 1)
    return images.contiguous(), torch.from_numpy(arrays["labels"])


def measure_accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        right = [
            (model.eval()(x).argmax(1) == y).double() for x, y in zip(images.split(250), labels.split(250), strict=True)
        ]
    return float(torch.cat(right).mean())


def run() -> None:
    train, train_labels = load_images("cifar10_train_4000.npz", contrast=0.25)
    test, test_labels = load_images("cifar10_test_2000.npz", contrast=0.25)
    train, train_labels = train[:_SAMPLES], train_labels[:_SAMPLES]
    by_class = train[train_labels.argsort(stable=True)]
    orders = {
        f"shuffled, {_SAMPLES // 10} a batch": train.split(_SAMPLES // 10),
        "shuffled, 2 a batch": train.split(2),
        "sorted by class, 50 a batch": by_class.split(50),
        "199 a batch and 10 left over": train.split(199),
    }
    ways = {
        "update_bn": lambda model, batches: update_bn(batches, model),
        "paper": lambda model, batches: recalibrate(model, batches, method="paper"),
        "pooled": recalibrate,
        "exact": lambda model, batches: recalibrate(model, batches, method="exact"),
    }
    print(f"stored statistics: {measure_accuracy(load_resnet20(), test, test_labels):.2%} of {len(test)} images")
    print(f"\n| batches of {_SAMPLES} images | " + " | ".join(ways) + " |")
    print("|---|" + "---:|" * len(ways))
    for order, batches in orders.items():
        cells = []
        for way in ways.values():
            model = load_resnet20()
            way(model, list(batches))
            cells.append(f"{100 * measure_accuracy(model, test, test_labels):.2f} %")
        print(f"| {order} | " + " | ".join(cells) + " |", flush=True)
