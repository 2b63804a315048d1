"""Write what the tutorial works on into the folder ``tutorial``: ``python sample_ckpts/make_tutorial_files.py``.

- ``lightning.ckpt``: a checkpoint as Lightning lays it out, with an EMA whose statistics were never copied.
- ``swa.pt``: weights averaged by torch.optim.swa_utils; update_bn was forgotten.
- ``finetuned.pt``: trained on with the statistics kept.
- ``flat.pt``: a model and its EMA in one dict, as ``net.`` and ``ema.``.
- ``run/epoch_00.pt`` to ``epoch_29.pt``: a training in which one filter explodes for a few steps of one epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from digits_net import build
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

HERE = Path(__file__).resolve().parent
OUT = Path("tutorial")
EPOCHS, BROKEN_EPOCH, CHANNEL = 30, 17, 7
BATCH = 32


with np.load(HERE / "digits_train.npz") as arrays:
    IMAGES, LABELS = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def load() -> nn.Module:
    """The trained network of ``digits.pt``."""
    model = build()
    model.load_state_dict(torch.load(HERE / "digits.pt", weights_only=True))
    return model.train()


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of the training digits."""
    for _ in range(count):
        index = torch.randint(len(LABELS), (BATCH,))
        yield IMAGES[index], LABELS[index]


def train(model: nn.Module, count: int, *, lr: float) -> torch.optim.Optimizer:
    """So many steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for images, labels in batches(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return optimizer


def write_lightning() -> None:
    training = torch.load(HERE / "digits_training.pt", weights_only=False)
    state = {name.replace("module.", "model.", 1): tensor for name, tensor in training["state_dict"].items()}
    average = {name: value.clone() for name, value in state.items()}
    for name, value in build().state_dict().items():  # the buffers of the EMA are as they were created
        if "running_" in name or name.endswith("num_batches_tracked"):
            average[f"model.{name}"] = value
    facts = {"epoch": 29, "global_step": 690, "pytorch-lightning_version": "2.6.6", "loops": {}, "callbacks": {}}
    torch.save({**facts, "state_dict": state, "ema_state_dict": average}, OUT / "lightning.ckpt")


def write_average() -> None:
    model = load()
    averaged = AveragedModel(build())  # made before the training: it averages parameters, and no buffers
    for _ in range(4):
        train(model, 10, lr=0.5)
        averaged.update_parameters(model)
    torch.save(averaged.state_dict(), OUT / "swa.pt")


def write_finetuned() -> None:
    model = load()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    train(model, 5, lr=1e-2)
    torch.save(model.state_dict(), OUT / "finetuned.pt")


def write_flat() -> None:
    model = load()
    names = model.state_dict().keys()
    ema = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(10):
        train(model, 1, lr=2e-2)
        for name in names:
            if ema[name].is_floating_point():
                ema[name].lerp_(model.state_dict()[name], 0.01)
    flat = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({**flat, **{f"ema.{name}": tensor for name, tensor in ema.items()}}, OUT / "flat.pt")


def write_run() -> None:
    model = load()
    (OUT / "run").mkdir()
    for epoch in range(EPOCHS):
        optimizer = train(model, 2, lr=1e-3)
        if epoch == BROKEN_EPOCH:
            with torch.no_grad():
                weight = model.get_submodule("layer2.0.conv1").weight
                kept = weight[CHANNEL].clone()
                weight[CHANNEL] *= 1e4
                for images, _ in batches(2):
                    model(images)
                weight[CHANNEL] = kept
        state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, OUT / "run" / f"epoch_{epoch:02}.pt")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    OUT.mkdir()
    write_lightning()
    write_average()
    write_finetuned()
    write_flat()
    write_run()
    print("wrote tutorial/lightning.ckpt, swa.pt, finetuned.pt, flat.pt and run/epoch_00.pt to epoch_29.pt")
