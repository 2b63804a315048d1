"""The user's own model and data code: whatever it prints, raises or decides, the result stays right and alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.cli.main import main
from bntool.errors import UserCodeError
from bntool.graphs.traced.tracing import trace
from tests.programs import copy_user_code, run_bntool
from tests.programs.user_code import user_nets


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy_user_code("user_nets", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "user_nets", raising=False)
    return tmp_path


def save(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = user_nets.Net()
    for _ in range(30):
        model(torch.randn(8, 3, 9, 9) * 2 + 1)
    torch.save(model.to(dtype).state_dict(), folder / "net.pt")
    return model.eval()


FOLD = ("fold", "net.pt", "--input-shape", "2,3,9,9", "-o", "out.pt", "--force")


def test_what_follows_a_look_at_the_data_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(folder)
    assert main([*FOLD, "--model", "user_nets.py:branching", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert [(skip["layer"], skip["reason"]) for skip in facts["skips"]] == [("bn2", "data dependent")]
    assert main([*FOLD, "--model", "user_nets.py:branching", "--strict"]) == 4
    original = user_nets.branching()
    original.load_state_dict(torch.load("net.pt", weights_only=True))
    folded = bntool.load_folded(user_nets.branching(), "out.pt")
    with torch.no_grad():
        for x in (torch.randn(4, 3, 9, 9), torch.randn(4, 3, 9, 9) + 5):  # both paths
            x = x.double()  # noqa: PLW2901
            wanted, found = original.double().eval()(x), folded.double().eval()(x)
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_is_alive_when_data_is_looked_at_may_be_read_by_the_other_path() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = self.conv(x)
            after = self.bn(before)
            return before + after if bool(x.sum() > 1e3) else after

    graph = trace(Late().eval(), torch.randn(2, 3, 8, 8))
    conv = next(node for node in graph.nodes if node.layer == "conv")
    assert len({edge.target for edge in graph.outputs(conv)}) == 2


def test_an_exit_inside_of_the_model_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(folder)
    assert main([*FOLD, "--model", "user_nets.py:exiting"]) == 6
    assert "SystemExit" in capsys.readouterr().err
    assert not (folder / "out.pt").exists()
    with pytest.raises(UserCodeError):
        bntool.fold(user_nets.exiting(), torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("command", ["fold", "recalibrate"])
def test_what_user_code_prints_is_not_in_the_result(command: str, folder: Path) -> None:
    save(folder)
    torch.save({"images": torch.randn(8, 3, 9, 9)}, folder / "data.pt")
    options = ["--model", "user_nets.py:printing", "--data", "data.pt", "--dry-run", "--json"]
    done = run_bntool(command, "net.pt", *options, cwd=folder)
    assert json.loads(done.stdout)["command"] == command
    assert "hello from python" in done.stderr
    assert "hello from below" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_files_of_other_precision_than_the_model(dtype: torch.dtype, folder: Path) -> None:
    original = save(folder, dtype).double()
    assert main([*FOLD, "--model", "user_nets.py:build", "--quiet"]) == 0
    stored = torch.load("out.pt", weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    folded = bntool.load_folded(user_nets.build(), "out.pt").double().eval()
    with torch.no_grad():
        x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
        wanted, found = original(x), folded(x)
        error = (wanted - found).abs().max() / wanted.abs().max()
    assert error < max(16 * torch.finfo(dtype).eps, 1e-6)  # load_folded gives a float32 model


def test_a_selection_of_ones_own_is_no_skip_under_strict(folder: Path) -> None:
    save(folder)
    assert main([*FOLD, "--model", "user_nets.py:build", "--layers", "bn2", "--strict", "--quiet"]) == 0


def test_a_tolerance_that_is_no_number_is_a_usage_error(folder: Path) -> None:
    save(folder)
    assert main([*FOLD, "--model", "user_nets.py:build", "--tolerance", "nan"]) == 2


def test_a_glob_that_matches_nothing_does_not_pass_a_gate(folder: Path) -> None:
    save(folder)
    assert main(["inspect", "net.pt", "--layers", "nothing*", "--fail-on", "warning", "--quiet"]) == 2
