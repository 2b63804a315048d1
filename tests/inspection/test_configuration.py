"""Findings that a project takes for meant: named in the report, and no longer judged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

from bntool.cli.main import main
from bntool.inspection.thresholds import DEFAULTS
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
        ("[[threshold]]\nname = 'outlying-var'\nvalue = 1\nreason = 'x'", "did you mean 'outlying-variance'?"),
        ("[[threshold]]\nname = 'zzz'\nvalue = 1\nreason = 'x'", "There are: dead-scale, dead-share, exploding-scale"),
        ("[[threshold]]\nname = 'dead-scale'\nvalue = 1", "says why"),
        ("[[threshold]]\nvalue = 1\nreason = 'x'", "says which: name"),
        ("[[threshold]]\nname = 'dead-scale'\nvalue = 'a'\nreason = 'x'", "no positive number"),
        ("[[threshold]]\nname = 'dead-scale'\nvalue = true\nreason = 'x'", "no positive number"),
        ("[[threshold]]\nname = 'dead-scale'\nvalue = inf\nreason = 'x'", "no positive number"),
        ("[[threshold]]\nname = 'dead-scale'\nlimit = 3\nreason = 'x'", "no key of [[threshold]]"),
        ("[[threshold]]\nname = 'average-lag'\nvalue = 3\nlayers = ['a']\nreason = 'x'", "is of a file"),
        ("ignore = 3", "write [[ignore]], with two brackets"),
        ("ignore = [3]", "write [[ignore]], with two brackets"),
        ("[ignore]\nfindings = ['non-finite']\nreason = 'x'", "write [[ignore]], with two brackets"),
        ("[[tool.bntool.ignore]]\nfindings = ['non-finite']", "the table tool.bntool is for pyproject.toml"),
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


def threshold(name: str, value: float, *globs: str) -> str:
    layers = f"layers = {list(globs)}\n" if globs else ""
    return f"[[threshold]]\nname = '{name}'\nvalue = {value}\n{layers}reason = 'a test'\n"


def write_net(path: Path, variance: float) -> None:
    """A sound network, but for the running_var of one channel of both layers."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    for layer in (net[1], net[3]):
        layer.num_batches_tracked.fill_(900)
        nn.init.uniform_(layer.weight, 0.5, 1)
        layer.running_mean.uniform_(0.5, 1)
        layer.running_var.uniform_(0.5, 1)[2] = variance
    torch.save(net.state_dict(), path)


def test_thresholds_are_set_for_the_layers_of_a_glob_and_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_net(project / "runs" / "sick.pt", 3e5)
    assert inspect(capsys, code=0)["verdict"]["sentence"] == "2 layers suspicious"
    (project / "bntool.toml").write_text(threshold("outlying-variance", 1e6, "1", "0.*"))
    facts = inspect(capsys, code=0)
    assert facts["verdict"]["sentence"] == "1 layer suspicious, 1 threshold set"
    assert [layer["name"] for layer in facts["state_dicts"][0]["layers"] if layer["findings"]] == ["3"]
    assert facts["thresholds"] == [
        {"name": "outlying-variance", "value": 1e6, "default": 1e3, "layers": ["1", "0.*"], "reason": "a test"}
    ]
    assert main(["inspect", "../runs/sick.pt"]) == 0
    assert "threshold outlying-variance 1e+06 for 1, 0.* (usually 1000): a test" in capsys.readouterr().out
    assert main(["inspect", "../runs/sick.pt", "--html", "page.html", "--quiet"]) == 0
    said = "threshold of ../bntool.toml: outlying-variance 1e+06 for 1, 0.* (usually 1000): a test"
    assert said in (project / "runs" / "page.html").read_text()
    # an error from where on the file says, and the last rule that fits counts
    rules = [("outlying-variance", 1e6), ("outlying-variance", 10), ("outlying-variance-error", 20)]
    (project / "bntool.toml").write_text("".join(threshold(*rule) for rule in rules))
    assert inspect(capsys, "--fail-on", "error", code=1)["verdict"]["sick"] == 2


def test_thresholds_between_files_count_for_them_too(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = project / "runs"
    write_net(runs / "epoch_1.pt", 0.7)
    state_dict = torch.load(runs / "epoch_1.pt")
    for name in ("1.running_var", "3.running_var"):
        state_dict[name] *= 2e4
    torch.save(state_dict, runs / "epoch_2.pt")

    def run() -> tuple[list[str], str]:
        main(["inspect", "epoch_1.pt", "epoch_2.pt", "--json"])
        found = json.loads(capsys.readouterr().out)
        jsonschema.validate(found, SCHEMA)
        return [name for jump in found["run"]["jumps"] for name in jump["layers"]], found["run"]["rows"][1]["health"]

    assert run() == (["1", "3"], "suspicious")
    (project / "bntool.toml").write_text(threshold("variance-jump", 1e5, "1"))
    assert run() == (["3"], "suspicious")
    ignore = "[[ignore]]\nfindings = ['statistics-jumped']\nlayers = ['3']\nreason = 'a test'\n"
    (project / "bntool.toml").write_text(threshold("variance-jump", 1e5, "1") + ignore)
    assert run() == ([], "healthy")


def test_the_page_lists_each_threshold_with_its_default() -> None:
    text = (ROOT / "docs" / "thresholds.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| ([\d.e+-]+) \|", text, flags=re.MULTILINE))
    assert listed == {name.replace("_", "-"): f"{value:g}" for name, value in DEFAULTS._asdict().items()}


def test_a_glob_that_selects_no_layer_is_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "bntool.toml").write_text(IGNORE.replace('"*1"', '"1", "backbone.*"'))
    assert inspect(capsys, code=1)["idle_globs"] == ["backbone.*"]
    (project / "bntool.toml").write_text(IGNORE.replace('"*1"', '"*", "backbone.*"'))
    assert "idle_globs" not in inspect(capsys, code=0)  # nothing is left for it
    (project / "bntool.toml").write_text(IGNORE.replace('"*1"', '"backbone.*"').replace("sick", "other"))
    assert "idle_globs" not in inspect(capsys, code=1)
