"""TorchScript and torch.export archives, judged by torch itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import read_bytes
from bntool.errors import FileError, RefusedError
from bntool.plan import Operation, Plan, Record, RemoveTensor, SetAttribute, SetTensor, Values
from tests.checkpoints.foreign import bits
from tests.checkpoints.torch_programs.compiled_net import (
    INPUT,
    MAKERS,
    make_net,
)

STEP = SetTensor("bn.running_mean", Values((1.0, 2.0, 3.0, 4.0), (4,)))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (make, _) in MAKERS.items():
            make(folder / name)
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_reads_what_torch_reads(name: str, folder: Path) -> None:
    expected, _ = MAKERS[name][1](folder / name)
    with open_checkpoint(folder / name) as checkpoint:
        (state_dict,) = checkpoint.state_dicts
        assert list(state_dict.tensors) == list(expected)
        for key, tensor in state_dict.tensors.items():
            assert read_bytes(tensor) == bits(expected[key]), key
        first, second = find_batchnorms(state_dict)
    assert (first.name, first.eps, first.momentum) == ("bn", 1e-3, 0.03)
    assert (second.name, second.eps, second.momentum) == ("head.2", 1e-5, 0.1)
    assert first.class_path == "torch.nn.modules.batchnorm.BatchNorm2d"


def test_parameters_are_told_from_buffers(folder: Path) -> None:
    for name in MAKERS:
        with open_checkpoint(folder / name) as checkpoint:
            tensors: dict[str, Any] = dict(checkpoint.state_dicts[0].tensors)
        parameters = {key for key, _ in make_net().named_parameters()}
        assert {key for key, tensor in tensors.items() if tensor.is_parameter} == parameters


@pytest.mark.parametrize("with_record", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_torch_runs_what_was_written(name: str, with_record: bool, folder: Path, tmp_path: Path) -> None:
    steps = (STEP, Record({"n": 1})) if with_record else (STEP,)
    with open_checkpoint(folder / name) as checkpoint:
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps)), tmp_path / name)
    net = make_net()
    net.bn.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    state, run = MAKERS[name][1](tmp_path / name)
    assert torch.equal(state["bn.running_mean"], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with torch.no_grad():
        torch.testing.assert_close(run(INPUT), net(INPUT))
    with open_checkpoint(tmp_path / name) as written:
        assert written.records == ({"": ({"n": 1},)} if with_record else {})
        assert written.format.verify_checksums(written)


@pytest.mark.parametrize("step", [RemoveTensor("bn.weight"), SetAttribute("bn", "training", value=True)])
@pytest.mark.parametrize("name", MAKERS)
def test_other_changes_are_refused(name: str, step: Any, folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(folder / name) as checkpoint, pytest.raises(RefusedError):
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(step,))), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_module_has_no_state_dict(tmp_path: Path) -> None:
    torch.jit.freeze(torch.jit.script(make_net())).save(tmp_path / "frozen.pt")
    with open_checkpoint(tmp_path / "frozen.pt") as checkpoint:
        assert (checkpoint.format.name, checkpoint.state_dicts) == ("torchscript", ())


def test_tied_weights_of_an_export_stay_tied(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    net[2].weight = net[0].weight
    torch.export.save(torch.export.export(net, (torch.randn(2, 3),)), tmp_path / "tied.pt2")
    step = SetTensor("0.weight", Values(tuple(range(9)), (3, 3)))
    with open_checkpoint(tmp_path / "tied.pt2") as checkpoint, pytest.raises(RefusedError, match="shares its memory"):
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(step,))), tmp_path / "new.pt2")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", MAKERS)
def test_a_truncated_file_is_an_error_of_ours(name: str, share: float, folder: Path, tmp_path: Path) -> None:
    data = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError):
        open_checkpoint(tmp_path / name)
