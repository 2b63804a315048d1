"""``bntool fold`` on files that hold their graph, as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bntool.cli.main import main

FOLDER = Path(__file__).parents[1] / "fixtures" / "interop"


def test_an_onnx_model_needs_no_model_and_no_pairs(tmp_path, capsys):
    target = tmp_path / "folded.onnx"
    source = FOLDER / "onnx_folding" / "left_alone.onnx"
    assert main(["fold", str(source), "-o", str(target)]) == 4
    assert not target.exists()
    capsys.readouterr()
    source = FOLDER / "onnx_folding" / "nested_graphs.onnx"
    assert main(["fold", str(source), "-o", str(target), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert [fold["layer"] for fold in facts["folds"]] == ["y"]
    assert {skip["layer"]: skip["reason"] for skip in facts["skips"]} == {
        "bn_captured": "shared output",
        "then_out": "not adjacent",
    }
    assert facts["assumptions"] == facts["warnings"] == []
    assert main(["inspect", str(target), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert facts["state_dicts"][0]["recorded"][0]["operation"] == "fold"


def test_external_data_get_a_file_of_their_own(tmp_path, capsys):
    assert main(["fold", str(FOLDER / "onnx_tiny_ext.onnx"), "-o", str(tmp_path / "folded.onnx"), "--strict"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"folded.onnx", "folded.onnx.data"}
    assert "InferenceSession" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
def test_a_caffe_model_is_folded_with_its_net(layout, tmp_path, capsys):
    source, target = FOLDER / "caffe_folding" / "new_tops", tmp_path / "out.caffemodel"
    arguments = ["fold", f"{source}.caffemodel", "-o", str(target), "--layout", layout]
    assert main(arguments) == 4
    assert "--prototxt" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "--prototxt", f"{source}.prototxt"]) == 0
    for suffix in (".caffemodel", ".prototxt"):
        assert target.with_suffix(suffix).read_bytes() == Path(f"{source}.{layout}{suffix}").read_bytes()


def test_the_net_is_never_written_over(tmp_path, capsys):
    for suffix in (".caffemodel", ".prototxt"):
        shutil.copyfile(FOLDER / f"caffe_tiny_std{suffix}", tmp_path / f"net{suffix}")
    net = tmp_path / "net.prototxt"
    before = net.read_bytes()
    shutil.move(tmp_path / "net.caffemodel", tmp_path / "other.caffemodel")
    arguments = [
        "fold",
        str(tmp_path / "other.caffemodel"),
        "--prototxt",
        str(net),
        "-o",
        str(tmp_path / "net.caffemodel"),
    ]
    assert main([*arguments, "--force"]) == 2
    assert net.read_bytes() == before
    assert not (tmp_path / "net.caffemodel").exists()


def test_what_does_not_go_together(tmp_path, capsys):
    onnx, prototxt = str(FOLDER / "onnx_tiny.onnx"), str(FOLDER / "caffe_tiny_std.prototxt")
    target = str(tmp_path / "out.onnx")
    assert main(["fold", onnx, "-o", target, "--prototxt", prototxt]) == 2
    assert main(["fold", onnx, "-o", target, "--pair", "conv1=bn1"]) == 2
    assert main(["freeze", onnx, "-o", target]) == 4
    assert "nothing in it trains" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
