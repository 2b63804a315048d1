"""What ``fold`` says where nothing can be folded: which layer, what lies between; and nothing is asked for in vain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from bntool.cli.main import main
from tests.checkpoints.onnx.onnx_models import node, save_model, tensor, value
from tests.places import INTEROP


def chain(path: Path, names: list[str], *, between: str = "Relu") -> Path:
    """A convolution and then BatchNormalizations, each behind an operator that keeps it from folding."""
    rng = np.random.default_rng(0)
    tensors = [tensor("w", rng.normal(size=(4, 3, 3, 3))), *(tensor(name, rng.uniform(0.5, 2, 4)) for name in "gbmv")]
    nodes, last = [node("Conv", "x w", "c")], "c"
    for number, name in enumerate(names):
        nodes.append(node(between, last, f"r{number}"))
        last = f"n{number}" if number < len(names) - 1 else "y"
        nodes.append(node("BatchNormalization", f"r{number} g b m v", last, name=name))
    return save_model(path, nodes, tensors, inputs=[value("x", (1, 3, 8, 8))], outputs=[value("y", None)])


@pytest.mark.parametrize("operator", ["Relu", "Sigmoid"])
@pytest.mark.parametrize("options", [["--dry-run"], ["-o", "b.onnx"]])
def test_the_layer_and_what_lies_between_are_named(
    operator: str,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    chain(tmp_path / "a.onnx", ["bn_seven"], between=operator)
    assert main(["fold", "a.onnx", *options]) == 4
    said = capsys.readouterr().err
    assert "bn_seven: not adjacent" in said
    assert f"{operator} lies between" in said
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx"}


def test_of_many_layers_the_first_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain(tmp_path / "a.onnx", [f"bn_{number}" for number in range(7)])
    assert main(["fold", str(tmp_path / "a.onnx"), "--dry-run"]) == 4
    said = capsys.readouterr().err
    assert "bn_0: not adjacent" in said
    assert "bn_2: not adjacent" in said
    assert "bn_3" not in said
    assert "4 more not adjacent" in said


def _torch_file(folder: Path) -> Path:
    torch.save({"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3)}, folder / "a.pt")
    return folder / "a.pt"


def _onnx_file(folder: Path) -> Path:
    path = chain(folder / "a.onnx", ["bn"])
    model = onnx.load(path)
    model.graph.node[-1].CopyFrom(helper.make_node("Sigmoid", ["r0"], ["y"]))
    onnx.save(model, path)
    return path


def _folded_keras_file(folder: Path) -> Path:
    assert main(["fold", str(INTEROP / "keras_tiny.keras"), "-o", str(folder / "a.keras"), "--quiet"]) == 0
    return folder / "a.keras"


def _caffe_file(folder: Path) -> Path:
    path = INTEROP / "caffe_v1_conv.caffemodel"
    assert path.exists()
    del folder
    return path


@pytest.mark.parametrize("make", [_torch_file, _onnx_file, _folded_keras_file, _caffe_file])
@pytest.mark.parametrize("options", [["--dry-run"], ["-o", "OUT"]])
def test_without_a_batchnorm_nothing_is_asked_for(
    make: object, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    out = tmp_path / f"out{path.suffix}"
    capsys.readouterr()
    assert main(["fold", str(path), *(str(out) if one == "OUT" else one for one in options)]) == 4
    said = capsys.readouterr().err
    assert "there is nothing to fold: the state dict has no BatchNorm layer" in said
    assert not [word for word in ("--model", "--pair", "--prototxt", "--arch") if word in said]
    assert not out.exists()


def test_what_may_be_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = chain(tmp_path / "a.onnx", ["bn"])
    model = onnx.load(path)
    model.graph.node[-1].op_type = "SpatialBN"
    onnx.save(model, path)
    assert main(["fold", str(path), "--dry-run"]) == 4
    assert "'bn' may be one, and could not be read: a node of SpatialBN" in capsys.readouterr().err
