"""``bntool convert`` as a user meets it."""

import json

import pytest

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


def test_losses_come_before_anything_is_written(tmp_path, capsys):
    arguments = ["convert", str(SAMPLES / "digits_training.pt"), "--to", "safetensors"]
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "this will be lost: other state dicts: ema_state_dict" in printed.err
    assert "nothing was written" in printed.out
    assert main([*arguments, "-o", str(tmp_path / "out.safetensors"), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (facts,) = json.loads(printed.out)["files"]
    assert len(facts["losses"]) == 2
    assert facts["to"] == "safetensors"
