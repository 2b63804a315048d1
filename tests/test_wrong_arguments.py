"""What is no model, no data and no list of files is called so, before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bntool
from bntool.errors import UsageError


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


BATCH = torch.randn(4, 3, 8, 8)
CALLS: dict[str, Callable[[Any], object]] = {
    "fold": lambda model: bntool.fold(model, BATCH),
    "recalibrate": lambda model: bntool.recalibrate(model, [BATCH]),
    "freeze": bntool.freeze,
    "frozen": lambda model: bntool.frozen(model).__enter__(),
    "apply_freeze": lambda model: bntool.apply_freeze(model, "a.pt"),
    "load_folded": lambda model: bntool.load_folded(model, "a.pt"),
}
OTHERS = {
    "a path": "ckpt.pt",
    "a state dict": make_model().state_dict(),
    "a class": nn.Sequential,
    "a function": make_model,
    "None": None,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("given", OTHERS)
def test_what_is_no_live_model(call: str, given: str) -> None:
    with pytest.raises(UsageError, match=r"a live model is needed, not .*bntool\."):
        CALLS[call](OTHERS[given])


@pytest.mark.parametrize("given", [None, 5, [1]])
def test_what_cannot_be_inspected(given: Any) -> None:
    with pytest.raises(UsageError, match="a path, an open checkpoint, a state dict or a live model is read, not"):
        bntool.inspect(given)


@pytest.mark.parametrize("data", [BATCH, BATCH.numpy()])
def test_a_tensor_is_no_list_of_batches(data: Any) -> None:
    """Its first axis would have been taken for batches: samples, each without an axis of samples."""
    model = make_model()
    with pytest.raises(UsageError, match=r"give \[tensor\] where it is one"):
        bntool.recalibrate(model, data)
    bntool.recalibrate(model, [data])


def test_a_path_is_no_list_of_files(tmp_path: Path) -> None:
    torch.save(make_model().state_dict(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match="give a list of them"):
        bntool.average_checkpoints(str(tmp_path / "a.pt"), tmp_path / "out.pt")


def test_freezing_a_folded_file_says_that_it_is_one(tmp_path: Path) -> None:
    torch.save(make_model().state_dict(), tmp_path / "a.pt")
    bntool.fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", pairs={"1": "0"}, eps=1e-5)
    with pytest.raises(bntool.BntoolError, match="1 BatchNorm was folded away"):
        bntool.freeze_checkpoint(tmp_path / "b.pt", tmp_path / "c.pt")
