"""``bntool inspect`` as a user meets it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bntool.cli.main import main
from tests import programs
from tests.places import ROOT, SAMPLES
from tests.schemas import read_document


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    code = main(["inspect", "--json", *map(str, arguments)])
    return code, read_document(capsys.readouterr().out, "inspect")


@pytest.mark.parametrize(
    "path", sorted(p for p in SAMPLES.iterdir() if p.suffix in (".pt", ".pth", ".safetensors")), ids=lambda p: p.name
)
@pytest.mark.parametrize("extra", [[], ["--all"], ["--stats", "--verify-crc"]], ids=["plain", "all", "stats"])
def test_the_document_of_every_sample_is_valid(
    path: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = run_json(capsys, path, *extra)
    assert code == 0
    (file,) = document["files"]
    assert sum(layer["channels"] for layer in file["state_dicts"][0]["layers"]) == 188


def test_nan_becomes_null_with_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    _, document = run_json(capsys, SAMPLES / "broken_nan_variance.pt", "--layers", "layer2.0.bn1")
    (layer,) = document["files"][0]["state_dicts"][0]["layers"]
    assert layer["tensors"]["running_var"]["nonfinite"] == 1
    assert layer["tensors"]["running_var"]["min"] > 0


def test_several_files_go_on_after_a_bad_one_and_end_with_the_worst_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    code, document = run_json(
        capsys, SAMPLES / "broken_nan_variance.pt", tmp_path / "bad.pt", SAMPLES / "digits.pt", "--fail-on", "error"
    )
    assert code == 3
    assert ["error" in file for file in document["files"]] == [False, True, False]
    assert document["files"][1]["error"]["code"] == "unknown-format"


def save_run(folder: Path) -> list[Path]:
    """Twelve epochs, one with NaN; their names are in another order than they were trained in."""
    paths = []
    for epoch in range(12):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        model[1].num_batches_tracked.fill_(900)
        if epoch == 5:
            model[1].running_mean[2] = float("nan")
        paths.append(folder / f"net_{(epoch + 6) % 12}.pth")
        torch.save({"epoch": epoch, "model": model.state_dict()}, paths[-1])
    return paths


def test_several_files_are_a_row_each_and_end_with_which_are_sick(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = save_run(tmp_path)
    assert main(["inspect", *map(str, sorted(paths))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 files by epoch: 1 sick, 11 healthy"
    assert lines[1].startswith("sick first in net_11.pth (epoch 5): 1 non-finite in running_mean in 1 (channel 2); ")
    rows = [line.split() for line in lines if line.startswith(str(tmp_path))]
    assert [row[:2] for row in rows] == [[str(path), str(epoch)] for epoch, path in enumerate(paths)]
    assert lines[-1] == "12 files: 1 sick (net_11.pth), 11 healthy"


def test_several_files_as_json_stay_in_the_order_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    given = sorted([*paths, tmp_path / "bad.pth"])
    code, document = run_json(capsys, *given)
    assert code == 3
    assert [file["file"] for file in document["files"]] == list(map(str, given))
    run = document["run"]
    assert run["ordered_by"] == "epoch"
    assert run["counts"] == {"failed": 1, "sick": 1, "healthy": 11}
    assert run["broken"] == str(paths[5])
    assert [row["file"] for row in run["rows"] if row["health"]] == list(map(str, paths))
    sick = {row["file"]: row["worst"] for row in run["rows"] if row["worst"]}
    assert sick == {str(paths[5]): {"code": "non-finite", "severity": "error", "layers": ["1"]}}
    assert run["moved"][0]["layer"] == "1"
    assert len(run["moved"][0]["changes"]) == 13


def test_several_files_are_printed_whole_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(SAMPLES / name) for name in ("digits.pt", "dead_channels.pt")]
    each = []
    for path in paths:
        main(["inspect", path, "--all"])
        each.append(capsys.readouterr().out)
    main(["inspect", *reversed(paths), "--all"])
    out = capsys.readouterr().out
    assert out.startswith(f"{each[1]}\n{each[0]}\n2 files by name: ")


def test_a_file_that_is_given_twice_is_two_rows(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(SAMPLES / "digits.pt")
    _, document = run_json(capsys, path, path)
    assert [file["file"] for file in document["files"]] == [path, path]
    assert [row["file"] for row in document["run"]["rows"]] == [path, path]


@pytest.mark.parametrize(
    ("name", "level", "code"),
    [
        ("digits.pt", "notice", 0),
        ("drifted.pt", "error", 0),
        ("drifted.pt", "warning", 1),
        ("broken_nan_variance.pt", "error", 1),
    ],
)
def test_fail_on_is_a_gate(name: str, level: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(SAMPLES / name), "--fail-on", level, "--quiet"]) == code
    assert capsys.readouterr().out == ""


def test_key_names_never_reach_the_terminal_raw(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evil = "\x1b[2J\x1b]8;;http://x\x07[red]\n\u202ename"
    values = {leaf: torch.ones(2) for leaf in ("weight", "bias", "running_mean", "running_var")}
    torch.save({f"{evil}.{leaf}": value for leaf, value in values.items()}, tmp_path / "evil.pt")
    assert main(["inspect", str(tmp_path / "evil.pt"), "--all"]) == 0
    assert main(["inspect", str(tmp_path / "evil.pt")]) == 0
    out = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out)
    assert "\\x1b" in out
    _, document = run_json(capsys, tmp_path / "evil.pt")
    assert document["files"][0]["state_dicts"][0]["layers"][0]["name"] == evil  # JSON escapes by itself


@pytest.mark.parametrize("extra", [[], ["--json"], ["--stats"], ["--verify-crc"], ["--help"]])
def test_neither_torch_nor_numpy_is_imported(extra: list[str]) -> None:
    files = [*sorted(SAMPLES.glob("*.pt")), SAMPLES / "digits.safetensors"]
    loaded = programs.list_loaded("inspect", *files, *extra)
    assert not {"torch", "numpy", "rich", "safetensors"} & loaded


def test_a_closed_pipe_is_no_error() -> None:
    sample = SAMPLES / "digits.pt"
    command = f"{sys.executable} -m bntool inspect {sample} --all | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"
