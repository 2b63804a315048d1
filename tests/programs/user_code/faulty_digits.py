"""Digits with a NaN among them, data that ends in errors, data without a batch, and a model that cannot be made."""

import numpy as np
import torch

from tests.places import SAMPLES

images = torch.from_numpy(np.load(SAMPLES / "digits_train.npz")["images"][:40])


def poisoned():
    bad = images[10:20].clone()
    bad[3, 0, 0, 0] = float("nan")
    return [images[:10], bad, images[20:]]


def raising():
    yield images[:10]
    raise OSError("disk gone")


def interrupted():
    yield images[:10]
    raise KeyboardInterrupt


def empty():
    return []


def half():
    return [images]


def build():
    raise ValueError("no weights here")
