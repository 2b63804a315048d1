"""A small residual CNN for scikit-learn's 8x8 digits: the architecture of every checkpoint in this folder."""

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with Batch Normalization, added to a (possibly projected) shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class DigitsNet(nn.Module):
    """Stem, two residual stages, global average pool, a Linear + BatchNorm1d neck and a classifier.

    Takes float images of shape (N, 1, 8, 8), normalized as ``(pixel / 16 - 0.3) / 0.38``, and returns logits.
    """

    def __init__(self, width: int = 12, out_width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, out_width, stride=2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        # The neck keeps its (redundant) bias, as found in many real models: folding must not lose it.
        self.neck = nn.Linear(out_width, out_width)
        self.neck_bn = nn.BatchNorm1d(out_width)
        self.fc = nn.Linear(out_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        x = torch.flatten(self.avgpool(x), 1)
        x = self.relu(self.neck_bn(self.neck(x)))
        return self.fc(x)


def build() -> nn.Module:
    """Return an untrained network."""
    return DigitsNet()
