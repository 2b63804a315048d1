"""``bntool fold`` on files that hold their graph, as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bntool.checkpoints.formats import open_checkpoint
from bntool.cli.main import main
from tests.places import INTEROP

FOLDER = INTEROP


@pytest.mark.usefixtures("forked_onnxruntime")
def test_an_onnx_model_needs_no_model_and_no_pairs(tmp_path, capsys):
    target = tmp_path / "folded.onnx"
    source = FOLDER / "onnx_folding" / "left_alone.onnx"
    assert main(["fold", str(source), "-o", str(target), "--strict"]) == 4
    assert main(["fold", str(source), "-o", str(target), "--layers", "bn_relu"]) == 4
    assert not target.exists()
    capsys.readouterr()
    source = FOLDER / "onnx_folding" / "nested_graphs.onnx"
    assert main(["fold", str(source), "-o", str(target), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert [fold["layer"] for fold in facts["folds"]] == ["bn_captured", "then_out", "y"]
    assert facts["skips"] == []
    assert facts["assumptions"] == facts["warnings"] == []
    assert main(["inspect", str(target), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert facts["state_dicts"][0]["recorded"][0]["operation"] == "fold"


@pytest.mark.usefixtures("forked_onnxruntime")
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


def test_a_caffe_net_is_frozen_by_its_prototxt(tmp_path, capsys):
    source, target = FOLDER / "caffe_folding" / "in_place", tmp_path / "frozen.caffemodel"
    arguments = ["freeze", f"{source}.caffemodel", "-o", str(target)]
    assert main(arguments) == 4
    assert main([*arguments, "--emit", "python", "--prototxt", f"{source}.prototxt"]) == 4
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    assert main([*arguments, "--no-requires-grad", "--prototxt", f"{source}.prototxt"]) == 0
    out = capsys.readouterr().out
    assert "apply_freeze" not in out
    assert "use_global_stats in 2 layers" in out
    assert target.read_bytes() == Path(f"{source}.caffemodel").read_bytes()
    text = target.with_suffix(".prototxt").read_text()
    assert text == Path(f"{source}.policy.prototxt").read_text()
    assert text.count("use_global_stats: true") == 2
    assert text.count("lr_mult: 0 decay_mult: 0") == 10  # of three blobs of a BatchNorm, two of a Scale


def test_the_switches_of_freeze_are_apart_in_a_net(tmp_path):
    source, target = FOLDER / "caffe_folding" / "in_place", tmp_path / "frozen.caffemodel"
    arguments = ["freeze", f"{source}.caffemodel", "-o", str(target), "--prototxt", f"{source}.prototxt", "--force"]
    assert main([*arguments, "--layers", "bn2"]) == 0
    text = target.with_suffix(".prototxt").read_text()
    assert (text.count("use_global_stats"), text.count("lr_mult: 0")) == (1, 3)
    assert main([*arguments, "--no-norm-eval", "--no-requires-grad"]) == 0
    text = target.with_suffix(".prototxt").read_text()
    assert (text.count("use_global_stats"), text.count("lr_mult: 0")) == (0, 4)


def test_the_net_says_eps_and_where_it_is_from(tmp_path, capsys):
    model, net = FOLDER / "caffe_tiny_std.caffemodel", FOLDER / "caffe_tiny_eps1e3.prototxt"
    assert main(["inspect", str(model), "--prototxt", str(net)]) == 0
    assert "eps 0.001 (prototxt)" in capsys.readouterr().out
    assert main(["inspect", str(model), "--prototxt", str(net), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    (layer,) = facts["state_dicts"][0]["layers"]
    assert (layer["eps"], layer["eps_source"]) == (1e-3, "prototxt")
    assert layer["scale_factor"] == pytest.approx(999.98236)
    assert main(["inspect", str(FOLDER / "onnx_tiny.onnx"), "--prototxt", str(net)]) == 2
    assert main(["inspect", str(model), "--prototxt", str(tmp_path / "none.prototxt")]) == 3


def test_constants_in_a_program_for_inference_promise_no_freezing(tmp_path, capsys):
    target = tmp_path / "constant.onnx"
    assert main(["freeze", str(FOLDER / "onnx_tiny.onnx"), "--as", "constant", "-o", str(target)]) == 0
    out = capsys.readouterr().out
    for wrong in ("apply_freeze", "model.train()", "freezes nothing", "num_batches_tracked", "--emit"):
        assert wrong not in out
    assert "statistics folded into weight and bias" in out


@pytest.mark.parametrize("name", ["onnx_tiny.onnx", "caffe_tiny_std.caffemodel"])
@pytest.mark.parametrize("target", ["torch", "safetensors", "batchnorm", "frozen-batchnorm"])
def test_programs_are_not_converted_to_state_dicts(name, target, tmp_path, capsys):
    assert main(["convert", str(FOLDER / name), "--to", target, "-o", str(tmp_path / "out"), "--eps", "1e-5"]) == 4
    assert "are no state dicts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("forked_onnxruntime")
def test_onnxruntime_runs_both_models_before_the_folded_one_appears(tmp_path, capsys):
    for name in ("opset13", "half", "transposed_groups", "gemm"):
        source, target = FOLDER / "onnx_folding" / f"{name}.onnx", tmp_path / f"{name}.onnx"
        assert main(["fold", str(source), "-o", str(target), "--json"]) == 0
        (facts,) = json.loads(capsys.readouterr().out)["files"]
        assert facts["runtime"]["runtime"].startswith("onnxruntime")
        assert facts["runtime"]["error"] <= (8e-3 if name == "half" else 1e-5)
    assert main(["fold", str(FOLDER / "onnx_tiny_ext.onnx"), "-o", str(tmp_path / "ext.onnx")]) == 0
    assert "proven by the graph, and run by onnxruntime" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"ext.onnx", "ext.onnx.data"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_fold_that_onnxruntime_contradicts_is_not_written(tmp_path, capsys, monkeypatch):
    import numpy as np

    from bntool.checkpoints.tensors import LiteralTensor
    from bntool.folding import producers

    def wrong(tensor, recipe):  # every weight becomes zeros
        return LiteralTensor(tensor.dtype, tensor.shape, bytes(tensor.dtype.byte_count(int(np.prod(tensor.shape)))))

    monkeypatch.setattr(producers, "scale", wrong)
    monkeypatch.setattr("bntool.checkpoints.application.scale", wrong)
    target = tmp_path / "folded.onnx"
    assert main(["fold", str(FOLDER / "onnx_folding" / "opset13.onnx"), "-o", str(target)]) == 5
    assert "puts out something else" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_graph_is_the_proof(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["fold", str(FOLDER / "onnx_tiny.onnx"), "-o", str(tmp_path / "folded.onnx")]) == 0
    assert "proven by the graph; not run: onnxruntime is not installed" in capsys.readouterr().out


def test_diff_compares_across_formats(tmp_path, capsys):
    """A network of PyTorch and what torch.onnx exported of it; eps comes from the file that says it."""
    a, b = str(FOLDER / "exported.pt"), FOLDER / "exported.onnx"
    assert main(["diff", a, str(b), "--expect", "identical", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert [layer["name"] for layer in facts["layers"]] == ["1", "4"]
    assert all(layer["eps_known"] for layer in facts["layers"])
    data = bytearray(b.read_bytes())
    with open_checkpoint(b) as checkpoint:
        storage = checkpoint.state_dict("").tensors["4.running_var"].storage
        data[storage.offset + 3] ^= 1
    (tmp_path / "other.onnx").write_bytes(data)
    assert main(["diff", a, str(tmp_path / "other.onnx"), "--expect", "norm-eval"]) == 1
    assert "1 of 2 BatchNorm layers changed" in capsys.readouterr().out


def test_diff_compares_a_caffe_model_with_pytorch(tmp_path, capsys):
    import torch

    from bntool.checkpoints.tensors import read_numbers

    source = FOLDER / "caffe_tiny_old4d.caffemodel"
    with open_checkpoint(source) as checkpoint:
        state = {
            name: torch.tensor(list(read_numbers(tensor))).reshape(tensor.shape)
            for name, tensor in checkpoint.state_dict("").tensors.items()
        }
    torch.save({**state, "bn1.num_batches_tracked": torch.tensor(7)}, tmp_path / "same.pt")
    assert main(["diff", str(source), str(tmp_path / "same.pt"), "--expect", "identical"]) == 0
    assert main(["diff", str(source), str(FOLDER / "caffe_tiny_std_neutral.caffemodel"), "--expect", "identical"]) == 1
    capsys.readouterr()
    folder = FOLDER / "tensorflow"
    assert main(["diff", str(folder / "keras2"), str(folder / "saved_model"), "--expect", "frozen"]) == 0
    assert "0 of 2 BatchNorm layers changed" in capsys.readouterr().out
