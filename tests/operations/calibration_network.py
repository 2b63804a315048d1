"""A network and batches that are the same everywhere, for what other projects' recalibration answers on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

# name: sizes of the batches, mean of the inputs, share that dropout takes
CASES = {
    "full batches": ((8, 8, 8, 8), 0.0, 0.0),
    "a small last batch of outliers": ((8, 8, 8, 2), 0.0, 0.0),
    "dropout": ((8, 8, 8, 8), 0.0, 0.5),
    "mean 1e3": ((8, 8, 8, 8), 1e3, 0.0),
}


class Network(nn.Sequential):
    """Two convolutions, each followed by BatchNorm; the first BatchNorm sees the input itself."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(4, 4, 3, bias=False),
            nn.BatchNorm2d(4),
        )
        numbers = np.random.RandomState(0)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.from_numpy(numbers.standard_normal(parameter.shape)).float() / 3

    def statistics(self) -> dict[str, list[float]]:
        """Running statistics by name."""
        return {name: t.double().tolist() for name, t in self.state_dict().items() if name.endswith(("mean", "var"))}


def make_batches(case: str) -> list[torch.Tensor]:
    """The batches of a case, float32, (N, 3, 10, 10)."""
    sizes, mean, _ = CASES[case]
    numbers = np.random.RandomState(1)
    batches = [torch.from_numpy(numbers.standard_normal((size, 3, 10, 10)) + mean).float() for size in sizes]
    if "outliers" in case:
        batches[-1] = batches[-1] * 3 + 5
    return batches
