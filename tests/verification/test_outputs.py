"""Disagreement is found, and outputs that prove nothing are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bntool.errors import VerificationError
from bntool.folding.live import fold
from bntool.verification.outputs import EXACT, verify
from tests.folding.folding_networks import randomise


def network() -> nn.Module:
    return randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    )


def inputs() -> list[torch.Tensor]:
    return [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def nothing(model: nn.Module) -> None:
    pass


def test_equal_models_agree() -> None:
    model = network()
    agreement = verify(model, nothing, copy.deepcopy(model), inputs())
    assert agreement.exact == 0
    assert agreement.stored == 0
    assert agreement.inputs == 2


def test_a_wrong_tensor_is_found() -> None:
    model = network()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[4].bias[1] += 0.01
    with pytest.raises(VerificationError, match="tolerance"):
        verify(model, nothing, wrong, inputs())


def test_a_wrong_change_is_found_however_small() -> None:
    def shift(model: nn.Module) -> None:
        with torch.no_grad():
            model[4].bias[1] += 1e-6

    model = network()
    with pytest.raises(VerificationError, match="float64"):
        verify(model, shift, copy.deepcopy(model), inputs())


def test_amplified_rounding_is_no_mistake() -> None:
    class Chaos(nn.Module):
        """A logistic map: rounding grows by two in each of its steps."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            x = torch.sigmoid(self.norm(self.linear(x)))
            for _ in range(20):
                x = 3.99 * x * (1 - x)
            return x

    model = randomise(Chaos().double())
    result = fold(model, torch.randn(8, 4, dtype=torch.float64))
    assert result.report is not None
    assert result.report.exact > EXACT / 1000


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda model: model[4].weight.fill_(0), "the same for all inputs"),
        (lambda model: model[1].running_var.fill_(float("nan")), "NaN"),
    ],
)
def test_outputs_that_prove_nothing_are_refused(spoil, text: str) -> None:
    model = network()
    with torch.no_grad():
        spoil(model)
    with pytest.raises(VerificationError, match=text):
        verify(model, nothing, copy.deepcopy(model), inputs())


def test_fold_gives_a_folded_copy() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    result = fold(model, torch.randn(2, 3, 8, 8))
    assert isinstance(result.model[1], nn.Identity)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.report is not None
    assert result.report.exact < 1e-12


def test_fold_guesses_inputs() -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    assert fold(model).plan.layers == ("1",)
