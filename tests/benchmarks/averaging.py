"""What averaging does to accuracy, with each way to come by statistics: the table of docs/averaging.md.

Two trained networks go on training with a constant learning rate, and the files of the last epochs are averaged:
the digits network of sample_ckpts, and, where the shared folder is there, ResNet-20 on CIFAR-10.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import bntool
from tests.benchmarks.calibration_batches import load_images, load_resnet20, measure_accuracy
from tests.places import SAMPLES, SHARED

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A trained network and its data."""

    name: str
    build: Callable[[], nn.Module]
    train: Pair
    test: Pair
    learning_rate: float
    epochs: int


def list_tasks() -> Iterator[Task]:
    sys.path.insert(0, str(SAMPLES))
    from digits_net import build

    def build_digits() -> nn.Module:
        model = build()
        model.load_state_dict(torch.load(SAMPLES / "digits.pt", weights_only=True))
        return model

    arrays = [np.load(SAMPLES / f"digits_{part}.npz") for part in ("train", "test")]
    pairs = [(torch.from_numpy(one["images"]), torch.from_numpy(one["labels"])) for one in arrays]
    yield Task("digits network", build_digits, *pairs, learning_rate=1.0, epochs=6)
    if SHARED.is_dir():
        images = [load_images(f"cifar10_{part}.npz") for part in ("train_4000", "test_2000")]
        yield Task("ResNet-20", load_resnet20, *images, learning_rate=0.1, epochs=6)


def train(task: Task, folder: Path) -> list[Path]:
    """The files of all epochs."""
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.learning_rate, momentum=0.9, weight_decay=1e-4)
    images, labels = task.train
    paths = []
    for epoch in range(task.epochs):
        for index in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images[index]), labels[index]).backward()
            optimizer.step()
        paths.append(folder / f"epoch_{epoch}.pt")
        torch.save(model.state_dict(), paths[-1])
    return paths


def run() -> None:
    for task in list_tasks():
        with tempfile.TemporaryDirectory() as name:
            measure(task, Path(name))


def measure(task: Task, folder: Path) -> None:
    paths = train(task, folder)
    last, batches = paths[task.epochs // 2 :], list(task.train[0].split(128))

    def accuracy(path: Path) -> str:
        model = task.build()
        model.load_state_dict(torch.load(path, weights_only=True))
        return f"{measure_accuracy(model, *task.test):.2%}"

    def recalibrated(method: str) -> str:
        model = task.build()
        model.load_state_dict(torch.load(folder / "pooled.pt", weights_only=True))
        bntool.recalibrate(model, batches, method=method)
        return f"{measure_accuracy(model, *task.test):.2%}"

    bntool.average_checkpoints(last, folder / "pooled.pt")
    bntool.average_checkpoints(last, folder / "last.pt", statistics_from=last[-1])
    states = [torch.load(path, weights_only=True) for path in last]
    numbers = {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(value.dtype)
        for key, value in states[0].items()
    }
    torch.save(numbers, folder / "numbers.pt")
    print(f"{task.name}, {len(last)} files")
    print("  each file:", ", ".join(map(accuracy, last)))
    for title, file in (("those of the last file", "last"), ("averaged as numbers", "numbers"), ("pooled", "pooled")):
        print(f"  averaged, statistics {title}:", accuracy(folder / f"{file}.pt"))
    for method in ("pooled", "exact"):
        print(f"  averaged, then recalibrated ({method}):", recalibrated(method))
