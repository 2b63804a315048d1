"""A network of five layers, alone and inside of another module."""

from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = build()

    def forward(self, x):
        return self.model(x)
