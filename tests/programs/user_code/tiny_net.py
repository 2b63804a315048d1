"""A network whose outputs depend on tiny weights, by a factor."""

from torch import nn


class Tiny(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.conv, self.bn, self.factor = nn.Conv2d(1, 32, 1, bias=False), nn.BatchNorm2d(32), factor

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y[:, 1:] * self.factor * self.factor + x, y[:, :1] * 1e9


def build(factor=1.0):
    return Tiny(factor)
