"""What may be a BatchNorm without its statistics, said by every command in the same words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bntool.cli.main import main

UNNAMED = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
NAMED = nn.Sequential()
NAMED.add_module("conv", nn.Conv2d(3, 8, 3))
NAMED.add_module("bn", nn.BatchNorm2d(8))
COMMANDS = [["fold"], ["freeze"], ["freeze", "--as", "constant"], ["convert", "--to", "frozen-batchnorm"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(("model", "layer"), [(UNNAMED, "1"), (NAMED, "bn")])
def test_what_inspect_leaves_open_is_not_called_free_of_batchnorms(command, model, layer, tmp_path, capsys):
    path, out = tmp_path / "parameters.pt", tmp_path / "out.pt"
    torch.save(dict(model.named_parameters()), path)
    assert main(["inspect", str(path)]) == 0
    assert "no BatchNorm" not in capsys.readouterr().out.splitlines()[0]
    assert main([*command, str(path), "-o", str(out)]) == 4
    said = capsys.readouterr().err
    assert f"no BatchNorm layer with statistics; {layer} may be one without" in said
    assert "bntool recalibrate gives a file its statistics from data" in said
    assert not out.exists()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_file_without_any_is_said_to_have_none(command, tmp_path, capsys):
    path, out = tmp_path / "linear.pt", tmp_path / "out.pt"
    torch.save(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)).state_dict(), path)
    assert main([*command, str(path), "-o", str(out)]) == 4
    said = capsys.readouterr().err
    assert "the state dict has no BatchNorm layer" in said
    assert "may be" not in said
