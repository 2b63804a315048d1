"""Files that hold the parameters of BatchNorms without their statistics, and files that only look so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bntool
from bntool.inspection.configuration import read_configuration
from bntool.inspection.findings import FindingCode, Severity
from bntool.inspection.verdict import Health
from tests.benchmarks.inspection import resnet50_state

MISSING = FindingCode.STATISTICS_MISSING


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)


CNN = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
TRANSFORMER = nn.Sequential(nn.Conv2d(3, 8, 4, 4), *(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)))
MLP = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))


def save(model: nn.Module, path: Path, form: str) -> Path:
    """Its parameters, or all of it, with or without the versions of modules."""
    if form == "named_parameters":
        torch.save(dict(model.named_parameters()), path / "p.pt")
    elif form == "state_dict":
        torch.save(model.state_dict(), path / "p.pt")
    else:
        save_file({name: tensor.detach() for name, tensor in model.named_parameters()}, path / "p.safetensors")
        return path / "p.safetensors"
    return path / "p.pt"


@pytest.mark.parametrize("form", ["named_parameters", "safetensors"])
def test_behind_a_convolution_it_may_be_one(form: str, tmp_path: Path) -> None:
    inspection = bntool.inspect(save(CNN, tmp_path, form))
    (finding,) = inspection.state_dicts[0].findings
    assert (finding.code, finding.severity, finding.layers) == (MISSING, Severity.NOTICE, ("1",))
    assert "may be a BatchNorm without its statistics" in finding.message
    assert inspection.verdict.health is Health.NOT_JUDGED
    assert inspection.findings == ()
    assert inspection.fails_on(Severity.ERROR)


@pytest.mark.parametrize("form", ["named_parameters", "safetensors"])
def test_by_its_name_it_is_one(form: str, tmp_path: Path) -> None:
    inspection = bntool.inspect(save(Named(), tmp_path, form))
    (finding,) = inspection.state_dicts[0].findings
    assert (finding.code, finding.severity, finding.layers) == (MISSING, Severity.WARNING, ("bn1",))
    assert inspection.verdict.sentence == "1 layer suspicious"


def test_by_its_architecture_it_is_one(tmp_path: Path) -> None:
    parts = ("running_mean", "running_var", "num_batches_tracked")
    state = {name: tensor for name, tensor in resnet50_state().items() if not name.endswith(parts)}
    renamed = {name: tensor[:1] if tensor.dim() > 1 else tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "p.pt")
    (finding,) = bntool.inspect(tmp_path / "p.pt").state_dicts[0].findings
    assert (finding.severity, len(finding.layers)) == (Severity.WARNING, 53)
    assert "by their names and shapes" in finding.message
    torch.save(renamed, tmp_path / "p.pt")
    (finding,) = bntool.inspect(tmp_path / "p.pt").state_dicts[0].findings
    assert "by their names:" not in finding.message
    assert finding.message.endswith("BatchNorms by their names")


@pytest.mark.parametrize("form", ["named_parameters", "safetensors", "state_dict"])
@pytest.mark.parametrize("model", [TRANSFORMER, MLP], ids=["transformer", "MLP"])
def test_layer_norms_are_none(model: nn.Module, form: str, tmp_path: Path) -> None:
    inspection = bntool.inspect(save(model, tmp_path, form))
    assert inspection.state_dicts[0].findings == ()
    assert inspection.verdict.health is Health.NO_BATCH_NORM


def test_module_versions_tell_a_group_norm(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    assert bntool.inspect(save(model, tmp_path, "state_dict")).verdict.health is Health.NO_BATCH_NORM
    assert bntool.inspect(save(model, tmp_path, "safetensors")).verdict.health is Health.NOT_JUDGED


@pytest.mark.parametrize(
    "name", ["gn1", "layers.3.gn", "ln_1", "stem_ln", "group_norm", "LayerNorm", "block.norm.groupnorm2"]
)
def test_names_tell_a_group_norm(name: str, tmp_path: Path) -> None:
    tensors = {"conv.weight": torch.randn(8, 3, 3, 3), f"{name}.weight": torch.ones(8), f"{name}.bias": torch.zeros(8)}
    torch.save(tensors, tmp_path / "p.pt")
    inspection = bntool.inspect(tmp_path / "p.pt")
    assert inspection.verdict.health is Health.NO_BATCH_NORM
    assert not inspection.fails_on(Severity.WARNING)


@pytest.mark.parametrize("name", ["norm1", "aligned", "sign", "0", "bgn"])
def test_other_names_leave_it_open_and_the_way_out_is_said(name: str, tmp_path: Path) -> None:
    tensors = {"conv.weight": torch.randn(8, 3, 3, 3), f"{name}.weight": torch.ones(8), f"{name}.bias": torch.zeros(8)}
    torch.save(tensors, tmp_path / "p.pt")
    inspection = bntool.inspect(tmp_path / "p.pt")
    assert inspection.verdict.health is Health.NOT_JUDGED
    (finding,) = inspection.state_dicts[0].findings
    assert "[[ignore]] of statistics-missing in bntool.toml" in finding.advice
    ignore = "[[ignore]]\nfindings = ['statistics-missing']\nreason = 'GroupNorms'\n"
    (tmp_path / "bntool.toml").write_text(ignore)
    configuration = read_configuration(tmp_path / "bntool.toml")
    told = bntool.inspect(tmp_path / "p.pt", configuration=configuration)
    assert not told.fails_on(Severity.WARNING)


@pytest.mark.parametrize("kept", ["running_mean", "running_var", "num_batches_tracked"])
def test_a_part_of_the_statistics(kept: str, tmp_path: Path) -> None:
    torch.save(
        {n: t for n, t in CNN.state_dict().items() if n.startswith("0.") or n[2:] in ("weight", kept)},
        tmp_path / "p.pt",
    )
    (finding,) = bntool.inspect(tmp_path / "p.pt").state_dicts[0].findings
    assert (finding.code, finding.severity, finding.layers) == (MISSING, Severity.WARNING, ("1",))
