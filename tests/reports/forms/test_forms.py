"""Reports for programs: each form is read back by a parser of its own."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import pytest
import torch
from markdown_it import MarkdownIt
from torch import nn

from bntool.cli.main import main
from bntool.reports.forms.form import ReportForm
from tests.places import SAMPLES

SICK, LOW = str(SAMPLES / "broken_nan_variance.pt"), str(SAMPLES / "drifted.pt")
HOSTILE = "a|b%0A<script>alert(1)</script>::error ::`x`,y"


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    assert main(list(arguments)) == code
    return capsys.readouterr().out


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    """A file whose one layer has a NaN and a name that every form must escape."""
    layer = nn.BatchNorm1d(3)
    layer.running_var[1] = torch.nan
    torch.save({f"{HOSTILE}.{name}": value for name, value in layer.state_dict().items()}, tmp_path / "a,b: c.pt")
    return str(tmp_path / "a,b: c.pt")


def test_github_takes_each_line_for_one_annotation(capsys: pytest.CaptureFixture[str], hostile: str) -> None:
    shown = run(capsys, "inspect", SICK, hostile, "nothing.pt", "--report", "github", code=3)
    for line in shown.splitlines():
        match = re.fullmatch(r"::(error|warning|notice) file=([^,:]+),title=([^,:]+)::(.*)", line)
        assert match, line
        assert Path(unquote(match[2])).name in {"broken_nan_variance.pt", "a,b: c.pt", "nothing.pt"}
    named = [line for line in shown.splitlines() if "script" in line]
    assert named
    assert all(unquote(line.partition("::")[2]).count(HOSTILE) for line in named)
    assert "channel 5" in shown


def test_sarif_has_what_the_standard_requires(capsys: pytest.CaptureFixture[str], hostile: str) -> None:
    log = json.loads(run(capsys, "inspect", SICK, LOW, hostile, "nothing.pt", "--report", "sarif", code=3))
    assert log["version"] == "2.1.0"
    (one,) = log["runs"]
    driver = one["tool"]["driver"]
    assert driver["name"] == "bntool"
    rules = [rule["id"] for rule in driver["rules"]]
    assert len(set(rules)) == len(rules)
    assert one["invocations"][0]["executionSuccessful"] is False
    for result in one["results"]:
        assert result["message"]["text"]
        assert result["level"] in {"error", "warning", "note"}
        assert rules[result["ruleIndex"]] == result["ruleId"]
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[A-Za-z0-9\-._~:/?#@!$&'()*+,;=%]+", uri)  # RFC 3986
        assert result["locations"][0]["physicalLocation"]["region"] == {"startLine": 1}
    layers = {
        one["logicalLocations"][0]["fullyQualifiedName"]
        for r in one["results"]
        for one in r["locations"]
        if "logicalLocations" in one
    }
    assert {"layer2.0.bn1", HOSTILE} <= layers


def test_junit_counts_what_fails_the_gate(capsys: pytest.CaptureFixture[str], hostile: str) -> None:
    root = ET.fromstring(run(capsys, "inspect", SICK, LOW, hostile, "--report", "junit", code=0))
    assert (root.get("failures"), root.get("errors")) == ("2", "0")
    cases = {(case.get("classname"), case.get("name")): case for case in root.iter("testcase")}
    assert "running_var" in cases[SICK, "layer2.0.bn1"].find("failure").get("message")
    assert cases[hostile, HOSTILE].find("failure") is not None
    assert "counter-low" in ET.tostring(root, encoding="unicode")
    strict = ET.fromstring(
        run(capsys, "inspect", SICK, LOW, "no.pt", "--report", "junit", "--fail-on", "warning", code=3)
    )
    assert (strict.get("failures"), strict.get("errors")) == ("10", "1")
    assert sum(1 for _ in strict.iter("failure")) == 10
    assert int(strict.get("tests")) == sum(1 for _ in strict.iter("testcase"))


def test_csv_has_a_row_for_each_layer(capsys: pytest.CaptureFixture[str], hostile: str) -> None:
    rows = list(csv.DictReader(io.StringIO(run(capsys, "inspect", SICK, hostile, "no.pt", "--report", "csv", code=3))))
    assert [row["name"] for row in rows if row["file"] == hostile] == [HOSTILE]
    (sick,) = [row for row in rows if row["name"] == "layer2.0.bn1"]
    assert (sick["channels"], sick["findings"], sick["num_batches_tracked"]) == ("32", "non-finite", "690")
    document = json.loads(run(capsys, "inspect", SICK, "--json", code=0))
    layer = next(one for one in document["files"][0]["state_dicts"][0]["layers"] if one["name"] == "bn1")
    row = next(one for one in rows if one["name"] == "bn1")
    assert float(row["tensors.running_var.max"]) == layer["tensors"]["running_var"]["max"]
    assert rows[-1]["error"] == "there is no such file"


def test_csv_holds_no_formulas(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layer = nn.BatchNorm1d(3)
    torch.save({f"=cmd|'/c calc'!A1.{name}": value for name, value in layer.state_dict().items()}, tmp_path / "f.pt")
    (row,) = csv.DictReader(io.StringIO(run(capsys, "inspect", str(tmp_path / "f.pt"), "--report", "csv", code=0)))
    assert row["name"].startswith("'=cmd")
    assert row["tensors.bias.min"] == "0.0"


@pytest.mark.parametrize("form", ["csv", "junit", "markdown", "github", "sarif", "json"])
def test_no_form_holds_what_a_terminal_would_obey(
    form: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Controls, marks that reorder text, zero-width characters, halves of surrogate pairs."""
    obeyed = "\x1b[31m\x00\u202e\u2066\u200b\u2028\x85"
    layer = nn.BatchNorm1d(3)
    layer.running_var[1] = torch.nan
    state = {f"a{obeyed}\ud800😀.{name}": value for name, value in layer.state_dict().items()}
    torch.save(state, tmp_path / "f.pt")
    shown = run(capsys, "inspect", str(tmp_path / "f.pt"), "--report", form, code=0)
    assert not set(obeyed[:1] + obeyed[5:] + "\ud800") & set(shown)
    assert "run" in shown or "name" in shown


@pytest.mark.parametrize("command", ["inspect", "run", "diff", "freeze"])
def test_markdown_is_tables_and_no_html(command: str, capsys: pytest.CaptureFixture[str], hostile: str) -> None:
    arguments = {
        "inspect": ("inspect", hostile),
        "run": ("inspect", hostile, SICK),
        "diff": ("diff", hostile, hostile),
        "freeze": ("freeze", hostile, "--dry-run"),
    }[command]
    text = run(capsys, *arguments, "--report", "markdown", code=0)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    kinds = [token.type for token in tokens] + [one.type for token in tokens for one in token.children or ()]
    assert not [kind for kind in kinds if kind.startswith("html")]
    assert "link_open" not in kinds
    if command in {"inspect", "run"}:
        assert "table_open" in kinds
        shown = "".join(
            one.content for token in tokens for one in token.children or () if one.type in {"text", "text_special"}
        )
        assert "<script>alert(1)</script>" in shown


def test_a_failing_gate_says_why_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", SICK, LOW, "--quiet", "--fail-on", "error"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"bntool: error: {SICK}: layer2.0.bn1, channel 5: non-finite: NaN or infinite: 1 of 32")
    assert main(["inspect", LOW, "--quiet", "--fail-on", "error"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["diff", str(SAMPLES / "digits.pt"), LOW, "--expect", "norm-eval", "--quiet"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert (
        "bn1: expectation: running_mean, running_var, num_batches_tracked changed, against --expect norm-eval"
        in lines[0]
    )


def test_a_gate_that_could_not_judge_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    torch.save(dict(net.named_parameters()), tmp_path / "p.pt")
    assert main(["inspect", str(tmp_path / "p.pt"), "--quiet", "--fail-on", "error"]) == 1
    assert "statistics-missing" in capsys.readouterr().err


def test_forms_of_problems_are_of_commands_that_judge(capsys: pytest.CaptureFixture[str]) -> None:
    for form in ReportForm:
        wanted = 2 if form.lists_problems else 0
        assert main(["freeze", LOW, "--dry-run", "--report", form.value]) == wanted
        assert main(["diff", LOW, LOW, "--report", form.value]) == 0
    assert main(["inspect", LOW, "--json", "--report", "csv"]) == 2
    assert "does not go with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "column", "value"),
    [
        ("explain 4", "code", "4"),
        ("freeze digits.pt --dry-run", "name", "bn1"),
        ("convert digits_module.pt --to torch --dry-run", "list", "kept"),
        ("convert digits.pt --add-prefix net --dry-run", "new_name", "net.bn1.weight"),
        ("fold digits.pt --pair conv1=bn1 --eps 1e-5 --dry-run", "into", "conv1"),
        ("average digits.pt drifted.pt --dry-run", "weight", "0.5"),
        ("diff digits.pt drifted.pt", "name", "neck_bn"),
    ],
)
def test_csv_of_every_command_has_its_rows(
    command: str, column: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SAMPLES)
    rows = list(csv.DictReader(io.StringIO(run(capsys, *command.split(), "--report", "csv", code=0))))
    assert value in {row[column] for row in rows}
