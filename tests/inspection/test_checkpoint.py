"""Inspection of real files, with torch's own view of them as the oracle."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from bntool.batchnorm import EpsSource
from bntool.inspection.checkpoint import inspect
from bntool.inspection.findings import FindingCode, Severity
from bntool.inspection.results import Inspection
from tests.places import SAMPLES


def found(inspection: Inspection) -> dict[FindingCode, set[str]]:
    """Codes with the layers that have them."""
    codes: dict[FindingCode, set[str]] = {finding.code: set() for finding in inspection.findings}
    for state_dict in inspection.state_dicts:
        codes.update({finding.code: set() for finding in state_dict.findings})
        for layer in state_dict.layers:
            for finding in layer.findings:
                codes.setdefault(finding.code, set()).add(layer.layer.name)
    return codes


@pytest.mark.parametrize("name", ["digits.pt", "digits.safetensors", "digits_legacy.pth", "digits_module.pt"])
def test_numbers_agree_with_torch(name: str) -> None:
    expected = torch.load(SAMPLES / "digits.pt", weights_only=True)
    (state_dict,) = inspect(SAMPLES / name).state_dicts
    assert len(state_dict.layers) == 9
    for layer in state_dict.layers:
        for role, summary in layer.tensors.items():
            tensor = expected[f"{layer.layer.name}.{role}"].double()
            assert summary.minimum == tensor.min().item()
            assert summary.maximum == tensor.max().item()
            assert summary.mean == pytest.approx(tensor.mean().item(), rel=1e-14)
            assert summary.nonfinite == 0
    assert state_dict.parameters == 20_110
    expected_findings = {FindingCode.UNKNOWN_GLOBAL} if "module" in name else set()  # the classes of digits_net.py
    assert found(inspect(SAMPLES / name)).keys() == expected_findings


def test_a_pickled_module_tells_eps_and_momentum() -> None:
    (state_dict,) = inspect(SAMPLES / "digits_module.pt").state_dicts
    assert {(layer.layer.eps, layer.layer.eps_source, layer.layer.momentum) for layer in state_dict.layers} == {
        (1e-5, EpsSource.MODULE, 0.1)
    }
    assert {layer.layer.class_path for layer in state_dict.layers} == {
        "torch.nn.modules.batchnorm.BatchNorm2d",
        "torch.nn.modules.batchnorm.BatchNorm1d",
    }
    (bare,) = inspect(SAMPLES / "digits.pt").state_dicts
    assert {(layer.layer.eps, layer.layer.eps_source) for layer in bare.layers} == {(None, EpsSource.UNKNOWN)}


@pytest.mark.parametrize(
    ("name", "code", "layers", "severity"),
    [
        ("broken_never_updated.pt", FindingCode.NEVER_UPDATED, 9, Severity.WARNING),
        ("broken_nan_variance.pt", FindingCode.NON_FINITE, {"layer2.0.bn1"}, Severity.ERROR),
        ("dead_channels.pt", FindingCode.DEAD_CHANNELS, {"layer1.0.bn1"}, Severity.WARNING),
        ("drifted.pt", FindingCode.COUNTER_LOW, 9, Severity.WARNING),
    ],
)
def test_each_broken_sample_shows_its_defect_and_no_other(
    name: str, code: FindingCode, layers: int | set[str], severity: Severity
) -> None:
    inspection = inspect(SAMPLES / name)
    codes = found(inspection)
    assert set(codes) == {code}
    assert codes[code] == layers if isinstance(layers, set) else len(codes[code]) == layers
    assert inspection.worst() is severity


def test_several_state_dicts_are_listed_and_one_is_chosen() -> None:
    inspection = inspect(SAMPLES / "digits_training.pt")
    listed = [(s.state_dict.key, s.state_dict.prefix, s.chosen) for s in inspection.state_dicts]
    assert listed == [("state_dict", "module.", True), ("ema_state_dict", "module.", False)]
    only = inspect(SAMPLES / "digits_training.pt", state_dict="ema_state_dict")
    assert [(s.state_dict.key, s.chosen) for s in only.state_dicts] == [("ema_state_dict", True)]


def test_layers_are_selected_by_glob_without_prefix() -> None:
    (state_dict, _) = inspect(SAMPLES / "digits_training.pt", layers=["layer1.*.bn2", "neck_*"]).state_dicts
    assert [layer.layer.name for layer in state_dict.layers] == ["layer1.0.bn2", "layer1.1.bn2", "neck_bn"]


def test_every_tensor_with_its_numbers() -> None:
    expected = torch.load(SAMPLES / "digits.pt", weights_only=True)
    (state_dict,) = inspect(SAMPLES / "digits.pt", statistics=True).state_dicts
    assert [tensor.name for tensor in state_dict.tensors] == list(expected)
    for tensor in state_dict.tensors:
        assert tensor.summary is not None
        assert tensor.summary.maximum == expected[tensor.name].max().item()
        assert tensor.role == ("buffer" if "running" in tensor.name or "tracked" in tensor.name else "parameter")


def test_an_average_whose_buffers_were_not_copied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    average = copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(50):
            model(torch.randn(8, 3, 6, 6) + 1)
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict()}, tmp_path / "ema.pt")
    assert FindingCode.EMA_STATISTICS_INITIAL in found(inspect(tmp_path / "ema.pt"))
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict()}, tmp_path / "good.pt")
    assert found(inspect(tmp_path / "good.pt")) == {}


def test_counters_that_disagree_with_the_majority(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(4)))
    for _ in range(30):
        model(torch.randn(16, 2) + 2)
    model[2].num_batches_tracked.fill_(7_000)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert found(inspect(tmp_path / "m.pt"))[FindingCode.COUNTER_DISAGREES] == {"2"}


def test_other_norms_are_counted_and_told_apart(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "bn": nn.BatchNorm2d(4),
            "ln": nn.LayerNorm(4),
            "gn": nn.GroupNorm(2, 4),
            "inorm": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        }
    )
    for _ in range(30):
        model["bn"](torch.randn(4, 4, 5, 5))
    torch.save(model, tmp_path / "m.pt")  # a pickled module: classes tell InstanceNorm from BatchNorm
    inspection = inspect(tmp_path / "m.pt")
    (state_dict,) = inspection.state_dicts
    assert [layer.layer.name for layer in state_dict.layers] == ["bn"]
    assert sum(state_dict.other_norms.values()) == 3
    assert FindingCode.INSTANCE_NORM_LOOKALIKE in found(inspection)


def test_checksums_are_verified_on_request() -> None:
    assert inspect(SAMPLES / "digits.pt").checksums is None
    assert inspect(SAMPLES / "digits.pt", verify_checksums=True).checksums == 57 + 6
    assert inspect(SAMPLES / "digits.safetensors", verify_checksums=True).checksums is None
