"""load_folded refuses what it cannot understand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bntool.errors import UsageError
from bntool.folding.loading import load_folded
from bntool.folding.structure import describe_structure, structure_of
from bntool.plan import AddTensor, RemoveModule, RemoveTensor, Values


def test_a_file_without_a_record(tmp_path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(UsageError, match="no record of a fold"):
        load_folded(nn.Linear(2, 2), tmp_path / "plain.pt")


def test_structure_survives_the_record() -> None:
    steps = (
        AddTensor("conv.bias", Values((1.0, 2.0), (2,)), dtype="float16", after="conv.weight"),
        RemoveTensor("bn.weight"),
        RemoveModule("bn"),
    )
    added, removed = structure_of(describe_structure(steps))
    assert (added.name, added.value.shape, added.dtype) == ("conv.bias", (2,), "float16")
    assert removed == RemoveModule("bn")


@pytest.mark.parametrize("record", [{}, {"added_parameters": [1], "removed_modules": []}])
def test_a_damaged_record(record) -> None:
    with pytest.raises(UsageError, match="damaged"):
        structure_of(record)
