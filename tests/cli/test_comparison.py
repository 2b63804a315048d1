"""``bntool diff`` as a user meets it."""

import json

import pytest
import torch

from bntool.cli.main import main
from tests.places import SAMPLES


def test_table(capsys):
    assert main(["diff", str(SAMPLES / "digits.pt"), str(SAMPLES / "drifted.pt"), "--expect", "stats-only"]) == 0
    out = capsys.readouterr().out
    assert "9 of 9 BatchNorm layers changed" in out
    assert "mean var n" in out
    assert out.index("bn1") < out.index("layer1.0.bn2")  # worst first
    assert "12 other tensors: 12 the same in every bit" in out
    assert "as expected: nothing but statistics of BatchNorm layers changed" in out


@pytest.mark.parametrize(
    ("a", "b", "expect", "code"),
    [
        ("digits.pt", "digits.safetensors", "identical", 0),
        ("digits.pt", "drifted.pt", "identical", 1),
        ("digits.pt", "drifted.pt", "frozen", 1),
        ("digits.pt", "drifted.pt", "norm-eval", 1),
        ("digits.pt", "dead_channels.pt", "norm-eval", 0),
        ("digits.pt", "dead_channels.pt", "stats-only", 1),
        ("digits.pt", "nowhere.pt", "identical", 3),
        ("digits.pt", "drifted.pt", "nothing", 2),
    ],
)
def test_expectations_make_it_a_test(a, b, expect, code, capsys):
    assert main(["diff", str(SAMPLES / a), str(SAMPLES / b), "--expect", expect]) == code
    assert ("not as expected" in capsys.readouterr().out) == (code == 1)


def test_json(capsys):
    arguments = [str(SAMPLES / "digits.pt"), str(SAMPLES / "broken_nan_variance.pt"), "--json", "--expect", "frozen"]
    assert main(["diff", *arguments]) == 1
    document = json.loads(capsys.readouterr().out)
    (facts,) = document["files"]
    assert document["schema_version"] == 1
    assert facts["layers"][0]["name"] == "layer2.0.bn1"
    assert facts["layers"][0]["variance_ratio"] is None  # NaN is no JSON
    assert facts["layers"][0]["tensors"]["running_var"] == "changed"
    assert facts["expectation"] == {
        "name": "frozen",
        "met": False,
        "violations": ["layer2.0.bn1: running_var changed"],
        "recorded_layers": [],
    }
    assert facts["others"]["counts"] == {"same": 12}


def test_layers_that_did_not_change_are_listed_with_all(capsys):
    arguments = ["diff", str(SAMPLES / "digits.pt"), str(SAMPLES / "dead_channels.pt")]
    main(arguments)
    assert "neck_bn" not in capsys.readouterr().out
    main([*arguments, "--all"])
    assert "neck_bn" in capsys.readouterr().out


def test_a_state_dict_against_itself_names_the_other_copy(tmp_path, capsys):
    def lines(*arguments):
        assert main(["diff", *map(str, arguments)]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("A and B are one")]

    training = SAMPLES / "digits_training.pt"
    (line,) = lines(training, training)
    assert "--state-dict-b ema_state_dict" in line
    assert lines(training, training, "--state-dict-b", "ema_state_dict") == []
    state = torch.load(SAMPLES / "digits.pt", weights_only=True)
    flat = tmp_path / "flat.pt"
    torch.save({prefix + name: tensor for prefix in ("net.", "ema.") for name, tensor in state.items()}, flat)
    (line,) = lines(flat, flat)
    assert "--prefix-b ema." in line
    assert lines(flat, flat, "--prefix", "net.", "--prefix-b", "ema.") == []
    assert lines(flat, SAMPLES / "digits.pt", "--prefix", "net.") == []
