"""A network and batches that are the same everywhere, for what other projects' recalibration answers on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bntool.checkpoints.formats import open_checkpoint
from bntool.models.loading import load_model
from bntool.modules.loading import load_state
from tests.places import SAMPLES

# name: sizes of the batches, mean of the inputs, share that dropout takes
CASES = {
    "full batches": ((8, 8, 8, 8), 0.0, 0.0),
    "a small last batch of outliers": ((8, 8, 8, 2), 0.0, 0.0),
    "dropout": ((8, 8, 8, 8), 0.0, 0.5),
    "mean 1e3": ((8, 8, 8, 8), 1e3, 0.0),
}
# trained digits network: how many images, in batches of 50; whether they are sorted by class
DIGITS = {
    "digits, full batches": (400, False),
    "digits, two left over": (402, False),
    "digits, sorted by class": (400, True),
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
        return read_statistics(self)


def make_batches(case: str) -> list[torch.Tensor]:
    """The batches of a case, float32, (N, 3, 10, 10) where it is not of digits."""
    if case in DIGITS:
        return make_digits(case)
    sizes, mean, _ = CASES[case]
    numbers = np.random.RandomState(1)
    batches = [torch.from_numpy(numbers.standard_normal((size, 3, 10, 10)) + mean).float() for size in sizes]
    if "outliers" in case:
        batches[-1] = batches[-1] * 3 + 5
    return batches


def build_model(case: str) -> nn.Module:
    """The network of a case, with the statistics it has before."""
    if case in CASES:
        return Network(CASES[case][2])
    model = load_model(f"{SAMPLES / 'digits_net.py'}:build", arguments={})
    with open_checkpoint(SAMPLES / "drifted.pt") as checkpoint:
        load_state(model, checkpoint.state_dicts[0])
    return model


def make_digits(case: str) -> list[torch.Tensor]:
    """Real images in batches of 50, (N, 1, 8, 8), and what is left over."""
    count, sorted_by_class = DIGITS[case]
    with np.load(SAMPLES / "digits_train.npz") as arrays:
        images, labels = torch.from_numpy(arrays["images"][:count]), arrays["labels"][:count]
    order = labels.argsort(kind="stable") if sorted_by_class else np.arange(count)
    return list(images[torch.from_numpy(order)].split(50))


def read_statistics(model: nn.Module) -> dict[str, list[float]]:
    """Running statistics by name."""
    state = model.state_dict()
    return {n: t.double().tolist() for n, t in state.items() if n.endswith(("running_mean", "running_var"))}
