"""What is shown of an inspection, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.cli.main import main
from bntool.reports.page.inspection import make_inspection_page
from tests.places import SAMPLES


def test_what_is_sick_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever of the state dicts of a file it is, and all others in the order of the file."""
    sound = torch.load(SAMPLES / "digits.pt")
    again = {name: tensor.clone() for name, tensor in sound.items()}
    sick = {**sound, "bn1.running_var": -sound["bn1.running_var"]}
    suspicious = {**sound, "bn1.num_batches_tracked": torch.tensor(3)}
    torch.save({"a": sound, "b": suspicious, "c": again, "d": sick}, tmp_path / "four.pt")
    assert main(["inspect", str(tmp_path / "four.pt")]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("state dict '")]
    assert [line[12] for line in shown] == ["d", "b", "a", "c"]
    inspection = bntool.inspect(tmp_path / "four.pt")
    page = make_inspection_page("four.pt", inspection)
    assert [table.title[-1] for table in page.tables] == ["d", "b", "a", "c"]
    assert [one.state_dict.key for one in inspection.state_dicts] == ["a", "b", "c", "d"]


def test_momentum_none_is_a_setting_and_not_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)), tmp_path / "module.pt")
    assert main(["inspect", str(tmp_path / "module.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading, first, second = (line for line in lines if line.startswith(("layer ", "0 ", "1 ")))
    assert "momentum" in heading
    assert " 0.1 " in first
    assert " None " in second


def test_a_finding_on_a_layer_that_has_no_row_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where no layer that has one is sick."""
    tensors = torch.load(SAMPLES / "digits.pt")
    del tensors["layer1.0.bn1.running_var"]
    torch.save(tensors, tmp_path / "lost.pt")
    assert main(["inspect", str(tmp_path / "lost.pt")]) == 0
    assert "! warning statistics-missing in layer1.0.bn1" in capsys.readouterr().out
