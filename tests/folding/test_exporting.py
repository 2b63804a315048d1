"""Exported programs compute what torch computes with the original, and nothing wrong passes."""

from __future__ import annotations

import io

import onnxruntime
import pytest
import torch
from torch import nn

from bntool.errors import MissingExtraError, UserCodeError, VerificationError
from bntool.folding import outputs
from bntool.folding.exporting import Program, export_program
from bntool.folding.options import ProgramKind


@pytest.fixture(params=ProgramKind)
def kind(request) -> ProgramKind:
    return request.param


def load(program: Program):
    """The program as its user loads it."""
    if program.kind is ProgramKind.PT2:
        return torch.export.load(io.BytesIO(program.data)).module()
    session = onnxruntime.InferenceSession(program.data)
    (name,) = [formal.name for formal in session.get_inputs()]
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


class Fixed(nn.Module):
    """Works for one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).reshape(2, 2)


def test_a_program_gives_the_outputs_of_the_model(kind) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dropout(0.5))
    x = torch.randn(2, 1, 6, 6)
    program = export_program(model, model, [x, torch.randn(2, 1, 6, 6)], tolerance=1e-6, kind=kind)
    assert model.training
    assert (program.any_batch, program.inputs, program.shapes) == (True, 4, ((2, 1, 6, 6),))
    assert program.runtime.startswith("torch 2" if kind is ProgramKind.PT2 else "onnxruntime 1")
    other = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        assert torch.allclose(load(program)(other), model.eval()(other), atol=1e-6)


def test_a_fixed_batch_is_said(kind) -> None:
    program = export_program(Fixed(), model := Fixed(), [torch.randn(2, 3)], tolerance=1e9, kind=kind)
    assert not program.any_batch
    assert program.inputs == 1
    assert model.training


def test_several_inputs_by_name_and_outputs_of_other_kinds(kind) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, *, y):
            z = self.linear(x) * 2 + y
            return {"scores": [z, z.sum(1)], "labels": z.argmax(1)}

    model, inputs = Detector(), {"y": torch.randn(2, 2), "x": torch.randn(2, 3)}
    program = export_program(model, model, [inputs], tolerance=1e-6, kind=kind)
    assert program.any_batch
    assert program.inputs == 3


def test_another_model_does_not_pass(kind) -> None:
    with pytest.raises(VerificationError, match="exported program"):
        export_program(nn.Linear(3, 2), nn.Linear(3, 2), [torch.randn(2, 3)], tolerance=1e-5, kind=kind)


def test_missing_packages_are_named(monkeypatch) -> None:
    monkeypatch.setattr(outputs, "_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(MissingExtraError, match=r"needs no_such_package: pip install 'bntool\[onnx\]'"):
        outputs.check_packages()


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_is_the_models_matter() -> None:
    with pytest.raises(UserCodeError, match="leave out --export"):
        export_program(Branching(), Branching(), [torch.randn(2, 3)], tolerance=1e-5)
