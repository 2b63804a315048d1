"""Convolutions that pad with other values than zeros, so that a shift passes: exact, exported, and in no checkpoint."""

from __future__ import annotations

import copy
import io

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bntool
from bntool.errors import RefusedError, UsageError, VerificationError
from bntool.folding.transforms.padding_values import PaddingValues
from bntool.modules.padding import ValuePaddedConv2d
from tests.folding.folding_networks import randomise, reasons

EXACT = 1e-12
DIMENSIONS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


def prepare(model: nn.Module) -> nn.Module:
    """Random elements and scales of both signs, none of them tiny, in float64."""
    model = randomise(model.double())
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.copy_(module.weight.sign() * module.weight.abs().clamp(min=0.1))
    return model.eval()


def mix(dimensions: int = 2, **last: object) -> nn.Module:
    """As a ConvMixer without its residuals: only a padded convolution reads the BatchNorm after an activation."""
    convolution, norm = DIMENSIONS[dimensions]
    options = {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False, **last}
    return prepare(nn.Sequential(convolution(3, 4, 1), nn.GELU(), norm(4), convolution(4, 4, **options)))


def image(*extents: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, channels, *(extents or (6, 7)), dtype=torch.float64, generator=generator)


def difference(model: nn.Module, folded: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected, found = model(x), folded(x)
    return float((found - expected).abs().max() / expected.abs().max())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 3, padding=2, stride=2)

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(F.gelu(self.stem(x)))


class Residual(Network):
    """The shift of what a padded convolution and an addition read: the convolution's bias makes up for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        return self.last(x + self.conv(x))


class Fork(Residual):
    """Both readers need another padding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        return self.last(x).mean((2, 3)) + self.conv(x).mean((2, 3))[:, :2]


class Twice(Network):
    """One convolution on two sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        return self.last(x).mean((2, 3)) + self.last(F.avg_pool2d(x, 2)).mean((2, 3))


class Called(Network):
    """The forward takes the weight and pads with zeros itself: what its module pads with says nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.begin(x), self.last.weight, self.last.bias, padding=2, stride=2)


class PaddedPool(Network):
    """A pool that counts the zeros beyond the border still needs them to be zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.avg_pool2d(self.begin(x), 3, padding=1))


@pytest.mark.parametrize(
    "last",
    [
        {},
        {"groups": 1, "bias": True},
        {"padding": "same", "kernel_size": 5, "dilation": 2},
        {"padding": (2, 0), "kernel_size": (5, 3), "stride": 2, "groups": 2},
        {"padding": (0, 1)},
    ],
)
def test_a_shift_passes_a_padded_convolution(last) -> None:
    model = mix(**last)
    before = copy.deepcopy(model.state_dict())
    kept = bntool.fold(model, image())
    assert reasons(kept.plan) == {"2": "PADDED_CONSUMER"}
    assert kept.plan.padding == ()
    result = bntool.fold(model, image(), change_padding=True)
    assert [fold.layer for fold in result.plan.folds] == ["2"]
    assert result.plan.padding == ("3",)
    assert isinstance(result.model[3], ValuePaddedConv2d)
    for x in (image(), image(11, 9), image(5, 5)[:1]):
        assert difference(model, result.model, x) < EXACT
    assert type(model[3]) is nn.Conv2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("dimensions", "extents"), [(1, (9,)), (3, (4, 5, 6))])
def test_in_one_and_three_dimensions(dimensions, extents) -> None:
    model = mix(dimensions)
    result = bntool.fold(model, image(*extents), change_padding=True)
    assert (len(result.plan.folds), result.plan.padding) == (1, ("3",))
    assert difference(model, result.model, image(*(extent + 3 for extent in extents))) < EXACT


def test_values_are_what_stands_for_zero() -> None:
    model = mix()
    result = bntool.fold(model, image(), change_padding=True)
    norm = model[2]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    assert torch.allclose(result.model.state_dict()["3.padding_values"], -shift / scale, rtol=1e-12)


@pytest.mark.parametrize(("network", "paddings"), [(Residual, {"conv"}), (Fork, {"conv", "last"}), (Twice, {"last"})])
def test_several_readers_and_calls(network, paddings) -> None:
    model = prepare(network())
    result = bntool.fold(model, image(), change_padding=True)
    assert set(result.plan.padding) == paddings
    assert difference(model, result.model, image(10, 8)) < EXACT
    assert max(layer.exact for layer in result.report.layers) < EXACT


@pytest.mark.parametrize(
    ("network", "standing_in_the_way"),
    [
        (Called, "convolution (last), which reads zeros beyond the border, does not let it pass"),
        (PaddedPool, "avg_pool2d does not let it pass"),
    ],
)
def test_zeros_that_no_module_of_a_convolution_adds_stay(network, standing_in_the_way) -> None:
    result = bntool.fold(prepare(network()), image(), change_padding=True)
    assert (result.plan.folds, result.plan.padding) == ((), ())
    (skip,) = result.plan.skips
    assert standing_in_the_way in skip.detail


def test_a_padding_that_need_not_change_stays() -> None:
    convolutions = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.GELU(), nn.BatchNorm2d(4)]
    model = prepare(nn.Sequential(*convolutions, nn.Conv2d(4, 2, 3, padding=1)))
    plain, result = bntool.fold(model, image()), bntool.fold(model, image(), change_padding=True)
    assert result.plan.padding == ("5",)
    assert {fold.layer for fold in plain.plan.folds} < {fold.layer for fold in result.plan.folds} == {"1", "4"}
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):  # the same as without
        assert torch.equal(plain.model.state_dict()[name], result.model.state_dict()[name])


def test_another_value_is_caught(monkeypatch) -> None:
    original = PaddingValues.__init__

    def spoil(self, node, values) -> None:
        original(self, node, values * 1.01)

    monkeypatch.setattr(PaddingValues, "__init__", spoil)
    with pytest.raises(VerificationError):
        bntool.fold(mix(), image(), change_padding=True)


@pytest.mark.parametrize("arguments", [{"layout": "same-keys"}, {"layout": "deploy"}, {"pairs": ["0=2"], "eps": 1e-5}])
def test_what_cannot_be_combined(arguments) -> None:
    with pytest.raises(UsageError):
        bntool.fold(mix(), image(), change_padding=True, **arguments)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_exported_and_run(tmp_path, suffix) -> None:
    model = mix().float()
    source, program = tmp_path / "model.pt", tmp_path / f"folded{suffix}"
    torch.save(model.state_dict(), source)
    result = bntool.fold_checkpoint(source, model=model, input_shape=(2, 3, 6, 7), export=program, change_padding=True)
    assert result.plan.padding == ("3",)
    assert "1 convolution pads with other values than zeros" in " ".join(result.warnings)
    x = image(6, 7).float()
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(program)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        found = torch.export.load(io.BytesIO(program.read_bytes())).module()(x)
    with torch.no_grad():
        assert torch.allclose(found, model(x), atol=1e-5)
    assert result.checkpoint is not None
    with pytest.raises(RefusedError, match="no checkpoint can say"):
        bntool.save_checkpoint(result.checkpoint, tmp_path / "folded.pt")
    assert not (tmp_path / "folded.pt").exists()


def test_a_checkpoint_is_refused(tmp_path) -> None:
    model, source = mix(), tmp_path / "model.pt"
    torch.save(model.state_dict(), source)
    output, export = tmp_path / "folded.pt", tmp_path / "folded.pt2"
    with pytest.raises(RefusedError, match="does not fit into the unmodified code"):
        bntool.fold_checkpoint(
            source, output, model=model, input_shape=(2, 3, 6, 7), export=export, change_padding=True
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    for more in ({}, {"model": model}, {"model": model, "pairs": {"2": "0"}, "dry_run": True}):
        with pytest.raises(UsageError, match="--change-padding"):
            bntool.fold_checkpoint(source, change_padding=True, **more)
