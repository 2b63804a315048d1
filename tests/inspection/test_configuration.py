"""Findings that a project takes for meant: named in the report, and no longer judged."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

from bntool.cli.main import main
from tests.places import ROOT

SCHEMA = json.loads((ROOT / "docs" / "schema" / "inspect.json").read_text())
IGNORE = """
fail-on = "error"
[[ignore]]
findings = ["non-finite"]
layers = ["*1"]
files = ["*/sick*.pt"]
reason = "a test of the alarm"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a file in which layers 1 and 3 have a NaN, and a folder below it in which commands run."""
    (tmp_path / ".git").mkdir()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    for layer in (net[1], net[3]):
        layer.num_batches_tracked.fill_(900)
        nn.init.uniform_(layer.weight, 0.5, 1)
        layer.running_mean.uniform_(0.5, 1)
        layer.running_var.uniform_(0.5, 1)[2] = torch.nan
    (tmp_path / "runs").mkdir()
    torch.save(net.state_dict(), tmp_path / "runs" / "sick.pt")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> dict[str, object]:
    assert main(["inspect", "../runs/sick.pt", *arguments, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, SCHEMA)
    (facts,) = document["files"]
    return facts


@pytest.mark.parametrize("name", ["bntool.toml", "pyproject.toml"])
def test_the_nearest_file_above_is_used_and_named(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = IGNORE if name == "bntool.toml" else "[tool.bntool]" + IGNORE.replace("[[ignore]]", "[[tool.bntool.ignore]]")
    (project / name).write_text(text)
    facts = inspect(capsys, code=1)  # layer 3 fails by the severity that the file says
    assert facts["configuration"] == f"../{name}"
    assert [(one["layer"], one["code"], one["reason"]) for one in facts["ignored"]] == [
        ("1", "non-finite", "a test of the alarm")
    ]
    assert facts["verdict"]["sentence"] == "1 layer sick, 1 finding ignored"
    assert [layer["name"] for layer in facts["state_dicts"][0]["layers"] if layer["findings"]] == ["3"]
    assert main(["inspect", "../runs/sick.pt"]) == 1
    shown = capsys.readouterr().out
    assert f"configuration: ../{name}" in shown
    assert "ignored non-finite in 1: a test of the alarm" in shown


def test_without_it_all_is_judged(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "bntool.toml").write_text(IGNORE)
    facts = inspect(capsys, "--no-config", code=0)
    assert "configuration" not in facts
    assert facts["verdict"]["sentence"] == "2 layers sick"
    (project / "other.toml").write_text(IGNORE.replace('"*1"', '"*"'))
    facts = inspect(capsys, "--config", "../other.toml", code=0)
    assert facts["verdict"]["sentence"] == "healthy, 2 findings ignored"
    assert main(["inspect", "../runs/sick.pt", "--config", "../other.toml", "--no-config"]) == 2
    (project / "bntool.toml").write_text(IGNORE.replace("sick*", "other*"))
    assert inspect(capsys, code=1)["ignored"] == []


def test_folders_above_the_repository_are_not_looked_at(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "bntool.toml").write_text(IGNORE)
    (project / "runs" / ".git").mkdir()
    assert "configuration" not in inspect(capsys, code=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fail-on = 'bad'", "is none of notice, warning, error"),
        ("fail_on = 'error'", "did you mean 'fail-on'?"),
        ("[[ignore]]\nfindings = ['non-finite']", "says why"),
        ("[[ignore]]\nreason = 'x'", "says which findings"),
        ("[[ignore]]\nfindings = ['nonfinite']\nreason = 'x'", "did you mean 'non-finite'?"),
        ("[[ignore]]\nfindings = ['not-understood']\nreason = 'x'", "can be ignored"),
        ("[[ignore]]\nfindings = 'non-finite'\nreason = 'x'", "is a list of texts"),
        ("[[ignore]]\nlayer = ['a']", "did you mean 'layers'?"),
        ("ignore = 3", "not built as it should be"),
        ("ignore = [3]", "not built as it should be"),
        ("fail-on = ", "cannot be read"),
        ("\xff", "cannot be read"),
    ],
)
def test_what_cannot_be_understood_is_an_error_that_names_the_file(
    text: str, message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "bntool.toml").write_bytes(text.encode("latin-1"))
    assert main(["inspect", "../runs/sick.pt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bntool: error: ../bntool.toml: ")
    assert message in line
