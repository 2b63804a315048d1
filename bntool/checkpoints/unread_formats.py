"""Files and folders that bntool does not read: what they are, in words, and what to do instead."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.files import quote

_SOURCE = "give it the checkpoint that this was made from"
# first bytes, where they stand, what has them, and what to do
_KNOWN = (
    (b"TFL3", 4, "a TensorFlow Lite model", _SOURCE),
    (b"GGUF", 0, "a GGUF file of llama.cpp", _SOURCE),
    (b"ftrt", 0, "a TensorRT engine", _SOURCE),
    (b"<?xml", 0, "an XML file, such as the model of OpenVINO (beside its .bin)", _SOURCE),
    (b"<net ", 0, "an OpenVINO model", _SOURCE),
    (b"7767517", 0, "an ncnn model", _SOURCE),
    (b"\xdd\x85\x76\x00", 0, "an ncnn model", _SOURCE),
    (b"\x93NUMPY", 0, "a numpy array", "give it the checkpoint that this was made from, or a .npz archive of arrays"),
    (b"MATLAB ", 0, "a MATLAB file", _SOURCE),
)
_TORCH7 = "load it with the package torchfile, and save its tensors with torch.save under their names"
_TORCH7_STARTS = (
    b"\x04\0\0\0\x01\0\0\0\x03\0\0\0V 1",
    b"4\n1\n3\nV 1\n",
)  # an object; what a table begins with is less
_ENDINGS = {
    ".t7": ("a file of Torch7", _TORCH7),
    ".engine": ("a TensorRT engine", _SOURCE),
    ".plan": ("a TensorRT engine", _SOURCE),
    ".trt": ("a TensorRT engine", _SOURCE),
}
# weights that say nothing of themselves, by what stands beside them
_BESIDE = {".xml": "an OpenVINO model", ".param": "an ncnn model"}
_FROZEN_NODE = re.compile(
    rb"\x0a.{1,3}?\x0a[\x01-\x7f][^\x00-\x1f\x7f-\xff]+\x12.(Placeholder|Const|PlaceholderV2|VariableV2)", re.DOTALL
)
_CONTAINERS = (
    (b"PK\x03\x04", 0, "a zip archive", "unpack it first"),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", "those of Keras and Caffe are read"),
    (b"ustar", 257, "a tar archive", "unpack it first"),
    (b"\x80", 0, "a pickle that torch.save did not write", "those of numpy arrays are read, too"),
)
_READ = "torch, safetensors, ONNX, Keras, TensorFlow, Caffe, Flax, MXNet, MindSpore, Darknet, Paddle, arrays of numpy"
_SIGNATURES = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ\0": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"\x04\x22\x4d\x18": "an lz4 archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"<!DOCTYPE": "a web page, not a checkpoint: the download went wrong",
    b"<html": "a web page, not a checkpoint: the download went wrong",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with git lfs pull",
    b"model_checkpoint_path": "TensorFlow's note of its latest checkpoint; name the .index file of that",
    b"\x08": "a protobuf message, but not an ONNX model",
}


def describe_unknown(path: Location, head: bytes) -> str:
    """Return the message for a file of no format that is read, by its first 4 KiB and its name."""
    found = next(_find_names(path, head), None)
    if found is not None:
        return _name(*found)
    for magic, offset, container, advice in _CONTAINERS:
        if head.startswith(magic, offset):
            return f"this is {container}, but it holds none of the formats that bntool reads; {advice}"
    guess = next((what for magic, what in _SIGNATURES.items() if head.startswith(magic)), None)
    if guess:
        return f"the format is not known; this looks like {guess}"
    return f"the format is not known; these are read: {_READ}"


def _find_names(path: Location, head: bytes) -> Iterator[tuple[str, str]]:
    """Yield what a file is and what to do instead, told by its first bytes, then by its name, then by the files beside
    it.
    """
    yield from ((what, advice) for magic, offset, what, advice in _KNOWN if head.startswith(magic, offset))
    if head.startswith(_TORCH7_STARTS):
        yield _ENDINGS[".t7"]
    if _FROZEN_NODE.match(head):
        yield (
            "a frozen graph of TensorFlow",
            "give it the checkpoint of TensorFlow, or what tf2onnx makes of it",
        )
    if any(head.startswith(magic, offset) for magic, offset, _, _ in _CONTAINERS):
        return
    if path.suffix in _ENDINGS:
        yield _ENDINGS[path.suffix]
    if path.suffix == ".bin" and isinstance(path, Path):
        for beside, what in _BESIDE.items():
            if path.with_suffix(beside).is_file():
                yield f"the weights of {what} ({path.with_suffix(beside).name} beside it)", _SOURCE


def _name(what: str, advice: str) -> str:
    return f"this is {what}, which bntool does not read; {advice}"


_NAMES_OF_CHECKPOINTS = (
    (".index.json",),
    (".safetensors", ".pt", ".pth", ".pt2", ".ckpt", ".bin", ".pkl", ".keras", ".h5", ".onnx", ".caffemodel"),
    (".npz", ".msgpack"),
)
_ENDINGS_OF_RUNS = (".pt", ".pth", ".ckpt", ".safetensors")
# what a folder holds that is one model of a format that is not read, what that is, and what to do
_FOLDERS = (
    (("Manifest.json", "Data"), "a Core ML package (.mlpackage)", _SOURCE),
    (("coremldata.bin",), "a compiled Core ML model (.mlmodelc)", _SOURCE),
    (("saved_model.pb",), "a SavedModel without variables: its weights are constants of a graph",
     "export it to ONNX by tf2onnx, and give that"),
    (("_CHECKPOINT_METADATA",), "an Orbax checkpoint",
     "restore it in JAX, write flax.serialization.to_bytes of the variables to a .msgpack file, and give that"),
    (("manifest.ocdbt",), "an Orbax checkpoint",
     "restore it in JAX, write flax.serialization.to_bytes of the variables to a .msgpack file, and give that"),
)  # fmt: skip


def _name_all(folder: Path, names: Sequence[str]) -> str:
    """Describe how to look at all checkpoints of a folder, as those of a run, if it holds several with one ending."""
    ending = Path(names[0]).suffix
    several = ending in _ENDINGS_OF_RUNS and sum(name.endswith(ending) for name in names) > 1
    return f", or bntool inspect {shlex.quote(str(folder))}/*{ending} to look at all" if several else ""


def describe_folder(folder: Path) -> str:
    """Return the message for a folder that is no checkpoint; it names a file in it that may be one."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        names = sorted(entry.name for entry in itertools.islice(found, 1000))
        for held, what, advice in _FOLDERS:
            if set(held) <= set(names):
                return _name(what, advice)
        likely = [name for endings in _NAMES_OF_CHECKPOINTS for name in names if name.endswith(endings)]
        if likely:
            named = f"such as {quote(likely[0])}{_name_all(folder, likely)}"
            return f"this is a folder, not a file; name a file of it, {named}"
    return "this is a folder, not a file, and holds nothing that is named like a checkpoint; name a file"
