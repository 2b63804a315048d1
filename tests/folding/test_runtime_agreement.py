"""Folded ONNX files beside their originals in ONNX Runtime, which runs in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bntool.cli.main import main
from bntool.errors import VerificationError
from bntool.folding.onnxruntime_process import OnnxRuntime, RuntimeFailure
from bntool.folding.runtime_agreement import compare_in_onnxruntime
from tests.checkpoints.onnx.onnx_models import node, save_model, tensor, value

SHAPE = (2, 3, 16, 16)
pytestmark = pytest.mark.usefixtures("forked_onnxruntime")


def write(path: Path, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto], *, opset: int = 13) -> Path:
    kind = tensors[0].data_type
    ends = {"inputs": [value("x", SHAPE, kind)], "outputs": [value("y", None, kind)]}
    return save_model(path, nodes, tensors, **ends, opset=opset)


def far_means(path: Path, last: str = "Identity", *, bias: float = 0.0, dtype: str = "f4", scale: float = 3e3) -> Path:
    """A bias that cancels the mean, so that the original's own rounding is amplified; then a convolution and an end."""
    rng = np.random.default_rng(0)
    values = {
        "w": rng.normal(size=(8, 3, 3, 3)), "c": [scale] * 8, "g": [1] * 8, "b": rng.normal(size=8),
        "m": rng.normal(size=8) * 30 + scale, "v": rng.uniform(0.5, 2, 8), "w2": rng.normal(size=(1, 8, 1, 1)),
        "b2": [bias],
    }  # fmt: skip
    nodes = [
        node("Conv", "x w c", "k"),
        node("BatchNormalization", "k g b m v", "n", name="bn", epsilon=1e-3),
        node("Conv", "n w2 b2", "o"),
        node(last, "o", "y"),
    ]
    return write(path, nodes, [tensor(name, numbers, dtype) for name, numbers in values.items()])


@pytest.mark.parametrize(
    ("last", "options"),
    [
        ("Identity", {}),
        ("Sigmoid", {"bias": -90.0}),
        ("Softplus", {"bias": -40.0}),
        ("Exp", {"bias": -60.0}),
        ("Identity", {"dtype": "f2", "scale": 300.0}),
        ("Sigmoid", {"dtype": "f2", "scale": 300.0, "bias": -9.0}),
    ],
)
def test_the_rounding_of_the_original_is_allowed(
    last: str, options: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = far_means(tmp_path / "a.onnx", last, **options), tmp_path / "b.onnx"
    assert main(["fold", str(source), "-o", str(target), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    runtime = facts["runtime"]
    assert runtime["inputs"] == 3
    assert runtime["error"] <= max(1e-5, 16 * (runtime["noise"] or 0), 8 * 2**-10 * (options.get("dtype") == "f2"))
    assert "BatchNormalization" not in {one.op_type for one in onnx.load(target).graph.node}


@pytest.mark.parametrize("change", [1.001, 1.5, 0.0, float("nan")])
def test_what_is_wrong_is_found_all_the_same(change: float, tmp_path: Path) -> None:
    source = far_means(tmp_path / "a.onnx", scale=1.0)
    model = onnx.load(source)
    weight = model.graph.initializer[0]
    weight.CopyFrom(tensor(weight.name, numpy_helper.to_array(weight) * change))
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(VerificationError, match="something else"):
        compare_in_onnxruntime(source, tmp_path / "b.onnx", tolerance=1e-5, unit=2**-23)


def crashing(path: Path) -> Path:
    """Empty names for outputs that opset 9 still has: onnxruntime 1.32 reads through a null pointer."""
    values = {"w": np.ones((4, 3, 3, 3)), **dict.fromkeys("gbmv", np.ones(4))}
    nodes = [
        node("Conv", "x w", "c"),
        helper.make_node("BatchNormalization", ["c", *"gbmv"], ["y", "", "", "", ""], name="bn"),
    ]
    return write(path, nodes, [tensor(name, numbers) for name, numbers in values.items()], opset=9)


def test_a_model_that_crashes_the_runtime_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = crashing(tmp_path / "a.onnx")
    with OnnxRuntime(source) as runtime:
        try:
            runtime.run({"x": np.ones(SHAPE, "f4")})
        except RuntimeFailure as failure:
            said = str(failure)
        else:
            pytest.skip("this version of ONNX Runtime does not crash")
    assert "crashes" in said
    assert main(["fold", str(source), "-o", str(tmp_path / "b.onnx")]) == 0
    assert "not run: onnxruntime cannot run the original: ONNX Runtime crashes" in capsys.readouterr().out
    good = far_means(tmp_path / "good.onnx")
    with pytest.raises(VerificationError, match="does not run the folded model: ONNX Runtime crashes"):
        compare_in_onnxruntime(good, source, tolerance=1e-5, unit=2**-23)


def test_the_process_answers_and_says_what_fails(tmp_path: Path) -> None:
    source = far_means(tmp_path / "a.onnx")
    x = np.random.default_rng(0).normal(size=SHAPE).astype("f4")
    import onnxruntime

    expected = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    with OnnxRuntime(source, optimised=True) as runtime:
        assert [(one.name, one.kind, one.shape) for one in runtime.inputs] == [("x", "tensor(float)", SHAPE)]
        with pytest.raises(RuntimeFailure):
            runtime.run({"x": x[:, :2]})
        (found,) = runtime.run({"x": x})
        assert np.array_equal(found, expected[0])
    (tmp_path / "b.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(RuntimeFailure):
        OnnxRuntime(tmp_path / "b.onnx")


def test_outputs_that_are_no_numbers_are_passed_over(tmp_path: Path) -> None:
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"])
    nodes = [node("Relu", "x", "y"), node("Identity", "words", "z")]
    outputs = [value("y", None), value("z", None, TensorProto.STRING)]
    save_model(tmp_path / "a.onnx", nodes, [words], inputs=[value("x", (2, 3))], outputs=outputs)
    with OnnxRuntime(tmp_path / "a.onnx") as runtime:
        found = runtime.run({"x": np.ones((2, 3), "f4")})
    assert found[0].shape == (2, 3)
    assert found[1] is None
