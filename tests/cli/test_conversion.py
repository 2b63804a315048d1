"""``bntool convert`` as a user meets it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bntool.cli.main import main
from tests.places import SAMPLES


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("digits.pt", ["--to", "safetensors", "--strict"], 0),
        ("digits_training.pt", ["--to", "safetensors"], 0),
        ("digits_training.pt", ["--to", "safetensors", "--strict"], 4),
        ("digits.safetensors", ["--to", "torch", "--strict"], 0),
        ("digits.pt", ["--to", "frozen-batchnorm"], 4),
        ("digits.pt", ["--to", "frozen-batchnorm", "--eps", "1e-5", "--strict"], 0),
        ("digits.pt", ["--to", "frozen-batchnorm", "--eps", "1e-3", "--strict"], 4),
        ("digits.pt", ["--to", "batchnorm"], 4),  # they are already
        ("digits_module.pt", ["--to", "frozen-batchnorm"], 4),
        ("digits.pt", ["--to", "nothing"], 2),
    ],
)
def test_exit_codes(name, arguments, code, tmp_path, capsys):
    target = tmp_path / "out"
    assert main(["convert", str(SAMPLES / name), *arguments, "-o", str(target)]) == code
    assert target.exists() == (code == 0)


def test_losses_are_said_once(tmp_path, capsys):
    arguments = ["convert", str(SAMPLES / "digits_training.pt"), "--to", "safetensors"]
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("ema_state_dict") == 1
    assert "lost other state dicts: ema_state_dict" in printed.out
    assert "nothing was written" in printed.out
    assert main([*arguments, "-o", str(tmp_path / "out.safetensors"), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (facts,) = json.loads(printed.out)["files"]
    assert len(facts["losses"]) == 2
    assert facts["to"] == "safetensors"


@pytest.mark.parametrize("arguments", [[], ["--strip-prefix", "module."]])
def test_the_name_of_the_output_says_the_format(arguments, tmp_path, capsys):
    source, there, back = SAMPLES / "digits_training.pt", tmp_path / "a.safetensors", tmp_path / "a.pth"
    assert main(["convert", str(source), "-o", str(there), *arguments]) == 0
    assert main(["convert", str(there), "-o", str(back)]) == 0
    capsys.readouterr()
    loaded = load_file(there)
    assert ("bn1.running_var" in loaded) == bool(arguments)
    state = torch.load(back, weights_only=True)
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.items())


def test_no_command_names_a_file_as_another_format(tmp_path, capsys):
    safetensors = tmp_path / "a.safetensors"
    assert main(["convert", str(SAMPLES / "digits.pt"), "-o", str(safetensors)]) == 0
    for arguments in (
        ["freeze", SAMPLES / "digits.pt", "-o", tmp_path / "b.safetensors"],
        ["average", SAMPLES / "digits.pt", safetensors, "-o", tmp_path / "b.safetensors"],
        ["average", safetensors, SAMPLES / "digits.pt", "-o", tmp_path / "b.pt"],
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert f"{arguments[-1]}: its name says " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [safetensors]
