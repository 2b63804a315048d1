"""Exported programs compute what torch computes with the original, and nothing wrong passes."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from bntool.errors import UserCodeError, VerificationError
from bntool.operations.exporting import export_program

torch.set_num_threads(1)


class Fixed(nn.Module):
    """Works for one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).reshape(2, 2)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.linear(x) + y}


def test_a_program_gives_the_outputs_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dropout(0.5))
    x = torch.randn(2, 1, 6, 6)
    program = export_program(model, model, [x, torch.randn(2, 1, 6, 6)], tolerance=1e-6)
    assert model.training
    assert (program.any_batch, program.inputs, program.shapes) == (True, 4, ((2, 1, 6, 6),))
    loaded = torch.export.load(io.BytesIO(program.data)).module()
    other = torch.randn(5, 1, 6, 6)
    assert torch.equal(loaded(other), model.eval()(other))


def test_a_fixed_batch_is_said() -> None:
    program = export_program(Fixed(), model := Fixed(), [torch.randn(2, 3)], tolerance=1e9)
    assert not program.any_batch
    assert program.inputs == 1
    assert model.training


def test_keyword_arguments() -> None:
    model = TwoInputs()
    program = export_program(model, model, [{"x": torch.randn(2, 3), "y": torch.randn(2, 2)}], tolerance=1e-6)
    assert program.any_batch


def test_another_model_does_not_pass() -> None:
    with pytest.raises(VerificationError, match="exported program"):
        export_program(nn.Linear(3, 2), nn.Linear(3, 2), [torch.randn(2, 3)], tolerance=1e-5)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_is_the_models_matter() -> None:
    with pytest.raises(UserCodeError, match="leave out --export"):
        export_program(Branching(), Branching(), [torch.randn(2, 3)], tolerance=1e-5)
