"""Files in which a BatchNorm has no bias, or no weight, while others have both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import bntool
from bntool.cli.main import main
from bntool.comparison.checkpoint import Change, diff
from bntool.inspection.findings import FindingCode, Severity
from bntool.inspection.results import Inspection
from bntool.inspection.verdict import Health
from bntool.reports.layers import list_scales
from tests.benchmarks.inspection import resnet50_state
from tests.places import SAMPLES

DIGITS = SAMPLES / "digits.pt"


def without(names: list[str], path: Path) -> Inspection:
    tensors = torch.load(DIGITS)
    for name in names:
        del tensors[name]
    torch.save(tensors, path / "lost.pt")
    return bntool.inspect(path / "lost.pt")


@pytest.mark.parametrize("role", ["weight", "bias"])
def test_what_one_layer_alone_lacks_may_be_lost(tmp_path: Path, role: str) -> None:
    inspection = without([f"layer1.0.bn1.{role}"], tmp_path)
    (finding,) = inspection.state_dicts[0].findings
    assert (finding.code, finding.severity) == (FindingCode.AFFINE_MISSING, Severity.NOTICE)
    assert finding.layers == ("layer1.0.bn1",)
    assert "8 other layers have weight and bias" in finding.message
    assert inspection.verdict.sentence == f"not judged: whether the {role} of layer1.0.bn1 was lost"
    assert not inspection.fails_on(Severity.WARNING)


def test_some_of_the_layers_that_are_called_alike_may_have_lost_it(tmp_path: Path) -> None:
    inspection = without(["layer1.0.bn2.bias", "layer2.0.bn2.bias"], tmp_path)
    assert inspection.state_dicts[0].findings[0].layers == ("layer1.0.bn2", "layer2.0.bn2")
    assert inspection.verdict.health is Health.NOT_JUDGED


def test_where_all_that_are_called_alike_lack_it_they_are_made_so(tmp_path: Path) -> None:
    names = [name for name in torch.load(DIGITS) if name.endswith("bn2.bias")]
    assert len(names) > 1
    assert without(names, tmp_path).verdict.health is Health.HEALTHY


def test_where_most_layers_lack_it_they_are_made_so(tmp_path: Path) -> None:
    names = [name for name in torch.load(DIGITS) if "bn" in name and name.endswith("bias")]
    assert without(names[1:], tmp_path).verdict.health is Health.HEALTHY


def test_a_recognised_architecture_has_it(tmp_path: Path) -> None:
    tensors = resnet50_state()
    del tensors["layer3.2.bn2.bias"]
    torch.save(tensors, tmp_path / "lost.pt")
    inspection = bntool.inspect(tmp_path / "lost.pt")
    (finding,) = [f for f in inspection.state_dicts[0].findings if f.code is FindingCode.AFFINE_MISSING]
    assert (finding.severity, finding.layers) == (Severity.WARNING, ("layer3.2.bn2",))
    assert inspection.verdict.suspicious >= 1
    assert inspection.fails_on(Severity.WARNING)


@pytest.mark.skipif("bias" not in nn.BatchNorm2d.__init__.__kwdefaults__, reason="torch makes none without bias")
def test_a_module_says_itself_that_it_is_made_without(tmp_path: Path) -> None:
    layers = [layer for i in range(5) for layer in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, bias=i != 2))]  # type: ignore[call-arg, unused-ignore]
    torch.save(nn.Sequential(*layers), tmp_path / "module.pt")
    assert not bntool.inspect(tmp_path / "module.pt").state_dicts[0].findings


@pytest.mark.parametrize("role", ["weight", "bias"])
@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_what_the_model_computes_is_not_judged(tmp_path: Path, role: str, how: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for _ in range(30):
        model(torch.randn(8, 3, 9, 9))
    if how == "pruned":
        prune.l1_unstructured(model[1], role, 0.5)
    else:
        parametrize.register_parametrization(model[1], role, nn.Softplus())
    torch.save(model.state_dict(), tmp_path / "computed.pt")
    inspection = bntool.inspect(tmp_path / "computed.pt")
    (finding,) = inspection.state_dicts[0].findings
    assert (finding.code, finding.severity, finding.layers) == (FindingCode.AFFINE_COMPUTED, Severity.NOTICE, ("1",))
    assert inspection.verdict.sentence == f"not judged: the {role} of 1, which the model computes"
    assert inspection.fails_on(Severity.ERROR)
    model[1].running_var *= 2
    torch.save(model.state_dict(), tmp_path / "moved.pt")
    (layer,) = diff(tmp_path / "computed.pt", tmp_path / "moved.pt").layers
    assert layer.statistics is not None
    assert layer.scale_change is None  # of a scale that nobody knows
    model.load_state_dict(torch.load(tmp_path / "computed.pt"))
    with torch.no_grad():
        next(p for name, p in model[1].named_parameters() if "orig" in name).mul_(2).add_(1)
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    (layer,) = diff(tmp_path / "computed.pt", tmp_path / "trained.pt").layers
    assert layer.changes[role] is Change.VALUES
    assert main(["diff", str(tmp_path / "computed.pt"), str(tmp_path / "trained.pt"), "--expect", "frozen"]) == 1


@pytest.mark.parametrize(("role", "other"), [("weight", "gamma"), ("weight", "scale"), ("bias", "beta")])
def test_what_is_called_otherwise_is_not_judged(tmp_path: Path, role: str, other: str) -> None:
    tensors = torch.load(DIGITS)
    called = {name.replace(f"bn2.{role}", f"bn2.{other}"): tensor for name, tensor in tensors.items()}
    torch.save(called, tmp_path / "called.pt")
    inspection = bntool.inspect(tmp_path / "called.pt")
    assert inspection.verdict.health is Health.NOT_JUDGED
    assert [finding.code for finding in inspection.state_dicts[0].findings] == [FindingCode.AFFINE_COMPUTED]


def test_a_weight_that_cannot_be_read_gives_no_scale(tmp_path: Path) -> None:
    tensors = torch.load(DIGITS)
    tensors["bn1.weight"] = tensors["bn1.weight"].to("meta")
    tensors["bn1.running_var"][0] = 1e-30  # with a weight of 1 its scale would be large
    torch.save(tensors, tmp_path / "meta.pt")
    layer = bntool.inspect(tmp_path / "meta.pt").state_dicts[0].layers[0]
    assert not list_scales(layer)
    assert not any("scale" in finding.code.value for finding in layer.findings)
    (compared,) = (one for one in diff(DIGITS, tmp_path / "meta.pt").layers if one.name == "bn1")
    assert compared.scale_change is None
