"""Data and models made of the digits by functions: a stream, iterators, a model with a loss among its outputs."""

import numpy as np
import torch
from digits_net import build

from tests.places import SAMPLES

with np.load(SAMPLES / "digits_train.npz") as arrays:
    images, labels = torch.from_numpy(arrays["images"][:200]), torch.from_numpy(arrays["labels"][:200])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(list(zip(images, labels, strict=True)))


def stream():
    return Stream()


def batches():
    return zip(images.split(50), labels.split(50), strict=True)


used_up = batches()
the_same = batches()


def again():
    return the_same


class WithLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = build()

    def forward(self, x):
        return {"loss": None, "logits": self.model(x)}


def with_loss():
    return WithLoss()
