"""Graphs of SavedModel folders, Caffe nets and ONNX models that run code, or write or read files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bntool.checkpoints.containers.protobufs.writing import Content, embed, integer_field
from bntool.checkpoints.formats import open_checkpoint
from bntool.cli.main import main
from bntool.inspection.safety import SafetyVerdict, judge_safety
from tests.places import INTEROP


def verdict_of(path: Path) -> SafetyVerdict:
    with open_checkpoint(path) as checkpoint:
        return judge_safety(checkpoint).verdict


def flat(content: Content) -> bytes:
    assert all(isinstance(piece, bytes) for piece in content)
    return b"".join(piece for piece in content if isinstance(piece, bytes))


def operation(name: str, **attributes: str) -> Content:
    """A NodeDef."""
    pieces = [*embed(1, b"evil"), *embed(2, name.encode())]
    for key, value in attributes.items():
        pieces += embed(5, *embed(1, key.encode()), *embed(2, *embed(2, value.encode())))
    return tuple(pieces)


def saved_model(folder: Path, node: Content, *, in_function: bool = False) -> Path:
    """The recorded SavedModel with a graph of a few harmless operations and one more."""
    target = folder / "saved"
    shutil.copytree(INTEROP / "tensorflow" / "saved_model", target)
    (target / "keras_metadata.pb").unlink()
    nodes: list[bytes] = []
    for name in ("VarHandleOp", "Conv2D", "FusedBatchNormV3", "SaveV2", "RestoreV2", "MergeV2Checkpoints", "Relu"):
        nodes += [flat(embed(1, *operation(name)))]
    graph = b"".join(nodes) + (b"" if in_function else flat(embed(1, *node)))
    if in_function:
        graph += flat(embed(2, *embed(1, *embed(1, b""), *embed(3, *node))))
    (target / "saved_model.pb").write_bytes(integer_field(1, 1) + flat(embed(2, *embed(1, b""), *embed(2, graph))))
    return target


OPERATIONS = {
    "WriteFile": SafetyVerdict.SUSPICIOUS,
    "PyFunc": SafetyVerdict.SUSPICIOUS,
    "EagerPyFunc": SafetyVerdict.SUSPICIOUS,
    "WriteScalarSummary": SafetyVerdict.SUSPICIOUS,
    "CreateSummaryFileWriter": SafetyVerdict.SUSPICIOUS,
    "DebugIdentityV3": SafetyVerdict.SUSPICIOUS,
    "DatasetToTFRecord": SafetyVerdict.SUSPICIOUS,
    "SaveDatasetV2": SafetyVerdict.SUSPICIOUS,
    "RpcCall": SafetyVerdict.SUSPICIOUS,
    "ReadFile": SafetyVerdict.UNKNOWN,
    "TFRecordDataset": SafetyVerdict.UNKNOWN,
    "WholeFileReaderV2": SafetyVerdict.UNKNOWN,
    "InitializeTableFromTextFileV2": SafetyVerdict.UNKNOWN,
    "ShardedFilename": SafetyVerdict.HARMLESS,
    "WriteVariableOp": SafetyVerdict.HARMLESS,
    "ReadVariableOp": SafetyVerdict.HARMLESS,
    "StatefulPartitionedCall": SafetyVerdict.HARMLESS,
    "PrintV2": SafetyVerdict.HARMLESS,
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("in_function", [False, True])
def test_operations_of_a_saved_model(name: str, in_function: bool, tmp_path: Path) -> None:
    folder = saved_model(tmp_path, operation(name), in_function=in_function)
    assert verdict_of(folder) is OPERATIONS[name]
    assert verdict_of(folder / "variables") is OPERATIONS[name]


def test_what_is_printed_into_a_file_is_written(tmp_path: Path) -> None:
    assert (
        verdict_of(saved_model(tmp_path, operation("PrintV2", output_stream="file:///tmp/x")))
        is SafetyVerdict.SUSPICIOUS
    )


def test_code_that_keras_2_left_in_a_saved_model(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, operation("Relu"))
    config = {"class_name": "Lambda", "config": {"function": ["4wEAAAA=", None, None], "function_type": "lambda"}}
    (folder / "keras_metadata.pb").write_bytes(flat(embed(1, *embed(5, json.dumps(config).encode()))))
    assert verdict_of(folder) is SafetyVerdict.SUSPICIOUS


@pytest.mark.parametrize("damage", ["graph", "text"])
def test_a_graph_that_cannot_be_read_is_not_harmless(damage: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path, operation("Relu"))
    if damage == "graph":
        (folder / "saved_model.pb").write_bytes(b"\x12\xff\xff")
    else:
        (folder / "saved_model.pb").rename(folder / "saved_model.pbtxt")
    assert verdict_of(folder) is SafetyVerdict.UNKNOWN


def test_the_recorded_models_are_harmless() -> None:
    for path in (
        INTEROP / "tensorflow" / "saved_model",
        INTEROP / "tensorflow" / "exported",
        INTEROP / "onnx_tiny.onnx",
    ):
        assert verdict_of(path) is SafetyVerdict.HARMLESS
    assert {verdict_of(path) for path in INTEROP.glob("*.caffemodel")} == {SafetyVerdict.HARMLESS}


PYTHON = (
    'layer { name: "evil" type: "Python" bottom: "data" top: "evil" python_param { module: "os" layer: "system" } }'
)
NETS = {
    PYTHON: SafetyVerdict.SUSPICIOUS,
    PYTHON.replace("layer { name", "layer { include { phase: TRAIN } name", 1): SafetyVerdict.SUSPICIOUS,
    'layer { name: "o" type: "HDF5Output" bottom: "data" hdf5_output_param { file_name: "x" } }': (
        SafetyVerdict.SUSPICIOUS
    ),
    'layers { name: "o" type: HDF5_OUTPUT bottom: "data" }': SafetyVerdict.SUSPICIOUS,
    'layers { bottom: "data" layer { name: "o" type: "hdf5_output" } }': SafetyVerdict.SUSPICIOUS,
    'layers { bottom: "data" layer { name: "hdf5_output" type: "relu" } }': SafetyVerdict.HARMLESS,
    'layer { name: "d" type: "Data" top: "d" data_param { source: "train_lmdb" } }': SafetyVerdict.HARMLESS,
    'layer { name: "Python" type: "ReLU" bottom: "data" top: "Python" }': SafetyVerdict.HARMLESS,
    '# layer { type: "Python" }': SafetyVerdict.HARMLESS,
    "layer {": SafetyVerdict.UNKNOWN,
}


@pytest.mark.parametrize("suffix", [".caffemodel", ".caffemodel.h5"])
@pytest.mark.parametrize("net", NETS)
def test_layers_of_the_net_beside_a_model(net: str, suffix: str, tmp_path: Path) -> None:
    shutil.copy(INTEROP / f"caffe_tiny_std{suffix}", tmp_path / f"a{suffix}")
    assert verdict_of(tmp_path / f"a{suffix}") is SafetyVerdict.HARMLESS
    text = (INTEROP / "caffe_tiny_std.prototxt").read_text()
    (tmp_path / "a.prototxt").write_text(f"{text}\n{net}\n")
    assert verdict_of(tmp_path / f"a{suffix}") is NETS[net]


def test_layers_of_a_net_that_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(INTEROP / "caffe_tiny_std.caffemodel", tmp_path / "a.caffemodel")
    (tmp_path / "other.prototxt").write_text((INTEROP / "caffe_tiny_std.prototxt").read_text() + PYTHON)
    arguments = ["inspect", str(tmp_path / "a.caffemodel"), "--prototxt", str(tmp_path / "other.prototxt"), "--json"]
    assert main(arguments) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert facts["safety"]["verdict"] == "suspicious"
    assert facts["safety"]["suspicious"] == ["os.system"]


def test_layers_in_the_model_itself(tmp_path: Path) -> None:
    parameters = flat(embed(130, *embed(1, b"os"), *embed(2, b"system")))
    layer = flat(embed(100, *embed(1, b"evil"), *embed(2, b"Python"), parameters))
    (tmp_path / "a.caffemodel").write_bytes((INTEROP / "caffe_tiny_std.caffemodel").read_bytes() + layer)
    assert verdict_of(tmp_path / "a.caffemodel") is SafetyVerdict.SUSPICIOUS


@pytest.mark.parametrize(
    ("domain", "operator", "verdict"),
    [
        ("com.microsoft", "PythonOp", SafetyVerdict.SUSPICIOUS),
        ("ai.onnx.contrib", "PyOp", SafetyVerdict.SUSPICIOUS),
        ("com.microsoft", "EPContext", SafetyVerdict.UNKNOWN),
        ("com.microsoft", "FusedConv", SafetyVerdict.HARMLESS),
        ("", "Relu", SafetyVerdict.HARMLESS),
    ],
)
@pytest.mark.parametrize("in_function", [False, True])
def test_operators_that_run_code(
    domain: str, operator: str, verdict: SafetyVerdict, in_function: bool, tmp_path: Path
) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    opsets = [helper.make_opsetid(one, 13) for one in {"", "mine", domain}]
    functions = [helper.make_function("mine", "F", ["x"], ["y"], [node], opsets)] if in_function else []
    nodes = [helper.make_node("F", ["x"], ["y"], domain="mine")] if in_function else [node]
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(np.ones(1, "f4"), "w")])
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8), tmp_path / "a.onnx")
    assert verdict_of(tmp_path / "a.onnx") is verdict
