"""Quantised models: what is quantised is left alone with its reason, float layers beside it are folded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bntool
from bntool.checkpoints.formats import open_checkpoint
from bntool.folding.options import FoldOptions
from bntool.folding.planning import plan_fold
from bntool.graphs.declared import declare
from tests.folding.folding_networks import largest_difference, randomise, reasons

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.ao.quantization is, its files are not
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Net(nn.Module):
    """A quantised half with a BatchNorm that torch cannot fuse, then a float half."""

    def __init__(self) -> None:
        super().__init__()
        from torch.ao.quantization import DeQuantStub, QuantStub

        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.bn_after = nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(torch.relu(self.conv(self.quant(x))))
        x = self.bn_after(self.dequant(self.conv(x[:, :3])))
        return self.bn2(self.conv2(torch.relu(x)))


@pytest.fixture(scope="module")
def quantised() -> nn.Module:
    from torch.ao import quantization

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch cannot run quantised convolutions")
    model = randomise(Net())
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    for name in ("bn_after", "conv2", "bn2"):
        getattr(model, name).qconfig = None
    prepared = quantization.prepare(model)
    prepared(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    return quantization.convert(prepared)


def test_a_live_model(quantised: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    result = bntool.fold(quantised, x)
    assert result.plan.layers == ("bn2",)
    assert reasons(result.plan) == {"bn": "UNSUPPORTED_DTYPE", "bn_after": "NOT_ADJACENT"}
    assert largest_difference(quantised, result.model, x) < 1e-5


def test_a_file(quantised: nn.Module, tmp_path) -> None:
    torch.save(quantised.state_dict(), tmp_path / "quantised.pt")
    with open_checkpoint(tmp_path / "quantised.pt") as checkpoint:
        (state_dict,) = checkpoint.state_dicts
        plan = plan_fold(state_dict, declare(state_dict, {"bn_after": "conv", "bn2": "conv2"}), FoldOptions(eps=1e-5))
    assert plan.layers == ("bn2",)
    assert reasons(plan) == {"bn_after": "UNSUPPORTED_DTYPE", "bn": "UNSUPPORTED_DTYPE"}


def test_weights_packed_by_dynamic_quantisation() -> None:
    from torch.ao.quantization import quantize_dynamic

    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Unflatten(1, (6, 1)), nn.ReLU(), nn.Conv1d(6, 6, 1)]
    model = quantize_dynamic(randomise(nn.Sequential(*layers, nn.BatchNorm1d(6))), {nn.Linear})
    x = torch.randn(3, 4)
    result = bntool.fold(model, x)
    assert result.plan.layers == ("5",)
    assert reasons(result.plan) == {"1": "NOT_ADJACENT"}
    assert largest_difference(model, result.model, x) < 1e-5


def test_quantisation_aware_layers_scale_their_weights_by_the_batchnorm_themselves() -> None:
    from torch.ao import quantization

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(quantization.fuse_modules_qat(model.train(), [["0", "1", "2"]]))
    model(torch.randn(4, 3, 8, 8))
    result = bntool.fold(model.eval(), torch.randn(2, 3, 8, 8))
    assert not result.plan.folds
    assert set(reasons(result.plan).values()) == {"REUSED"}
