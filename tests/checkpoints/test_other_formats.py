"""Formats that are known by name and not read are called by it; nobody is told that such a file is truncated."""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bntool.checkpoints.containers.protobufs.writing import embed, integer_field
from bntool.checkpoints.formats import FORMATS, open_checkpoint
from bntool.errors import CorruptFileError, UnknownFormatError, UnreadableFileError


def flat(*content: object) -> bytes:
    return b"".join(piece for piece in content if isinstance(piece, bytes))


def core_ml(kind: int) -> bytes:
    """Model: specificationVersion, description with an input, and one kind of model."""
    description = flat(*embed(1, *embed(1, b"image")))
    return integer_field(1, 4) + flat(*embed(2, description)) + flat(*embed(kind, b"\x0a\x00"))


def saved_model() -> bytes:
    """SavedModel: version, MetaGraphDef with meta information and a graph of one node."""
    meta = flat(*embed(1, *embed(5, b"serve")), *embed(2, *embed(1, *embed(1, b"x"), *embed(2, b"Placeholder"))))
    return integer_field(1, 1) + flat(*embed(2, meta))


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"TFL3")
    return file.getvalue()


def tarred(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


OTHERS = {
    "model.tflite": (b"\x1c\0\0\0TFL3" + bytes(64), "TensorFlow Lite"),
    "model.gguf": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
    "model.engine": (b"ftrt" + bytes(64), "TensorRT"),
    "model.plan": (b"ftrt" + bytes(64), "TensorRT"),
    "model.xml": (b'<?xml version="1.0"?><net name="m" version="11">', "OpenVINO"),
    "bare.xml": (b'<net name="m" version="11">', "OpenVINO"),
    "model.mlmodel": (core_ml(500), "Core ML"),
    "program.mlmodel": (core_ml(502), "Core ML"),
    "renamed.onnx": (core_ml(300), "Core ML"),
    "saved_model.pb": (saved_model(), "name the folder"),
    "other.pb": (saved_model(), "name the folder"),
    "model.param": (b"7767517\n3 3\nInput data 0 1 data\n", "ncnn"),
    "half.bin": (b"Gk0\x01" + bytes(64), "weights of an ncnn model"),
    "eight.bin": (b"8K\r\0" + bytes(64), "weights of an ncnn model"),
    "group1-shard2of3.bin": (bytes(64), "TensorFlow.js"),
    "array.npy": (b"\x93NUMPY\x01\0" + bytes(64), "numpy array"),
    "model.param.bin": (struct.pack("<IIII", 7767517, 3, 3, 16) + bytes(64), "ncnn"),
    "yolo.engine": (struct.pack("<I", 30) + b'{"task": "detect", "batch": 1}ftrt' + bytes(64), "TensorRT"),
    "net.t7": (struct.pack("<iii3si13s", 4, 1, 3, b"V 1", 13, b"nn.Sequential") + bytes(64), "Torch7.* torchfile"),
    "renamed.net": (struct.pack("<iii3si13s", 4, 1, 3, b"V 1", 13, b"nn.Sequential") + bytes(64), "Torch7"),
    "ascii.net": (b"4\n1\n3\nV 1\n13\nnn.Sequential\n", "Torch7"),
    "table.t7": (struct.pack("<iii", 3, 1, 2) + bytes(64), "Torch7"),
    "a.pt.bz2": (bz2.compress(b"a"), "bzip2 .*unpack"),
    "a.pt.xz": (lzma.compress(b"a"), "xz .*unpack"),
    "a.pt.zst": (b"\x28\xb5\x2f\xfd" + bytes(8), "zstd .*unpack"),
    "a.pt.lz4": (b"\x04\x22\x4d\x18" + bytes(8), "lz4 .*unpack"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(8), "7-Zip .*unpack"),
    "a.rar": (b"Rar!\x1a\x07\x01\0" + bytes(8), "RAR .*unpack"),
    "manifest.ocdbt": (b"\x0c\xdb\x3a\x2a" + bytes(64), "Orbax.*to_bytes"),
    "5b0d0dba": (b"\x0c\xdb\x20\xde" + bytes(64), "Orbax.*to_bytes"),
    "model.pte": (b"\x20\0\0\0ET12eh00" + bytes(64), "program of ExecuTorch"),
    "renamed.bin": (b"\x20\0\0\0ET12eh00" + bytes(64), "program of ExecuTorch"),
    "model.ort": (b"\x1c\0\0\0ORTM" + bytes(64), "give it the .onnx file"),
    "model.circle": (b"\x1c\0\0\0CIR0" + bytes(64), "Circle"),
    "model.ms": (b"\x1c\0\0\0MSL2" + bytes(64), "MindSpore Lite"),
    "model.mnn": (b"\x24\0\0\0\0\0\x1e\0" + bytes(64), "MNN"),
    "model.rknn": (b"RKNN\0\0\0\0" + bytes(64), "RKNN"),
    "model.kmodel": (b"LDMK\x06\0\0\0" + bytes(64), "kmodel"),
    "model.hef": (b"\x01HEF" + bytes(64), "Hailo"),
    "model.om": (b"IMOD" + bytes(64), "Ascend"),
    "old.bin": (b"lmgg" + bytes(64), "ggml"),
    "conv.dat": (b"N\xef\x01\0" + bytes(64), "NNEF"),
    "graph.nnef": (b"version 1.0;\ngraph net(x) -> (y)", "NNEF"),
    "net.wts": (b"1\nbn1.weight 1 3f800000\n", "for TensorRT"),
    "model.dlc": (zipped("model.params"), "Qualcomm"),
    "inference.pdmodel": (b"\x0a\x08\x08\0\x10\xff" + bytes(64), "Paddle.* .pdparams"),
    "inference.pdiparams": (bytes(16) + b"\x06\0\0\0\x08\x05" + bytes(64), "Paddle.* .pdparams"),
    "init_net.pb": (b"\x0a\x08init_net\x12\x20" + bytes(64), "Caffe2"),
    "app.zip": (zipped("model.tflite"), "zip archive that holds 'model.tflite': a TensorFlow Lite model"),
    "runs.zip": (zipped("runs/best.pth"), "begins with 'runs/best.pth'.* unpack it"),
    "nnef.tar": (tarred("graph.nnef"), "tar archive that holds 'graph.nnef': an NNEF model"),
    "lite.json": (b'{"format": "layers-model", "convertedBy": "TensorFlow.js Converter v4"}', "TensorFlow.js"),
    "net-symbol.json": (b'{"nodes": [], "arg_nodes": [], "heads": []}', "MXNet.* .params"),
    "keras.json": (b'{"class_name": "Sequential", "config": {"layers": []}}', "Keras.* --keras-config"),
    "marked.pt": (b"\xef\xbb\xbfNot Found", "begins with 'Not Found'"),
    "page.pt": (b"\n<HTML><body>login", "web page.* download"),
    "denied.pt": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "server.* download"),
    "answer.pt": (b'{"error": "Repository not found"}', 'a text.* begins with \'."error": "Repository not found".\''),
    "cut.pt": (("é" * 3000).encode()[:4095] + b"\xc3", "a text, not a checkpoint"),
    "zeros.pt": (bytes(5000), "4,096 bytes are zeros"),
    "frozen.pb": (flat(*embed(1, *embed(1, b"input"), *embed(2, b"Placeholder"))), "frozen graph .* tf2onnx"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_called_by_name(name: str, tmp_path: Path) -> None:
    data, word = OTHERS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnknownFormatError, match=word) as caught:
        open_checkpoint(tmp_path / name)
    assert "truncated" not in str(caught.value)


def test_what_is_not_known_is_told_what_is(tmp_path: Path) -> None:
    (tmp_path / "notes.dat").write_bytes(b"\xfe\xed\xfa\xce" * 30)
    with pytest.raises(UnknownFormatError) as caught:
        open_checkpoint(tmp_path / "notes.dat")
    families = {type(one).__module__.split(".")[2] for one in FORMATS} - {"torch_programs", "packages"}
    assert len(families) > 8
    assert [family for family in families if family not in str(caught.value).lower()] == []


def test_a_truncated_onnx_file_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(integer_field(1, 8) + flat(*embed(2, b"pytorch")))
    with pytest.raises(CorruptFileError, match="holds no graph"):
        open_checkpoint(tmp_path / "a.onnx")


def test_a_numpy_array_really_begins_so(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(UnknownFormatError, match="numpy array"):
        open_checkpoint(tmp_path / "a.npy")


@pytest.mark.parametrize(("beside", "word"), [("m.xml", "OpenVINO"), ("m.param", "ncnn")])
def test_weights_without_a_signature_are_named_by_what_stands_beside_them(
    beside: str, word: str, tmp_path: Path
) -> None:
    (tmp_path / "m.bin").write_bytes(np.linspace(0.1, 1, 50, dtype="f4").tobytes())
    (tmp_path / beside).touch()
    with pytest.raises(UnknownFormatError, match=f"the weights of an {word} model .{beside} beside it"):
        open_checkpoint(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (["Manifest.json", "Data/x"], "Core ML package"),
        (["coremldata.bin", "model.mil"], "compiled Core ML"),
        (["saved_model.pb", "assets/x"], "SavedModel without variables.* tf2onnx"),
        (["_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"], "Orbax checkpoint.*to_bytes"),
        (["manifest.ocdbt", "d/x"], "Orbax checkpoint"),
        (["3/default/_CHECKPOINT_METADATA", "3/default/_METADATA"], "in which '3/default' is an Orbax checkpoint"),
        (["version_0/checkpoints/last.ckpt", "version_0/hparams.yaml"], "such as 'version_0/checkpoints/last.ckpt'"),
        (["b/one/x.pth", "a/notes", "c/near.pth"], "such as 'c/near.pth'"),
        (["step_1/.metadata", "step_1/__0_0.distcp"], "name a folder in it, such as 'step_1'"),
        (["1/2/3/4/5/deep.pt"], "nothing that is named like a checkpoint"),
        (["graph.nnef", "conv.dat"], "NNEF"),
        (["model.json", "group1-shard1of1.bin"], "TensorFlow.js"),
    ],
)
def test_folders_of_other_formats_are_called_by_name(held: list[str], words: str, tmp_path: Path) -> None:
    for name in held:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    with pytest.raises(UnreadableFileError, match=words):
        open_checkpoint(tmp_path)
