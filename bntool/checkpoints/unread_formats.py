"""Files and folders that bntool does not read: what they are, in words, and what to do instead."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bntool.checkpoints.addresses import Address, Location
from bntool.checkpoints.files import quote
from bntool.shells import quote_word

_SOURCE = "give it the checkpoint that this was made from"
_ORBAX = "restore it in JAX, write flax.serialization.to_bytes of the variables to a .msgpack file, and give that"
# first bytes, where they stand, what has them, and what to do
_KNOWN = (
    (b"TFL3", 4, "a TensorFlow Lite model", _SOURCE),
    (b"CIR0", 4, "a Circle model of ONE", _SOURCE),
    (b"ET12", 4, "a program of ExecuTorch", _SOURCE),
    (b"ORTM", 4, "a model of ONNX Runtime in its own format (.ort)", "give it the .onnx file that this was made from"),
    (b"MSL", 4, "a model of MindSpore Lite", _SOURCE),
    (b"GGUF", 0, "a GGUF file of llama.cpp", _SOURCE),
    (b"lmgg", 0, "a file of ggml", _SOURCE),
    (b"fmgg", 0, "a file of ggml", _SOURCE),
    (b"tjgg", 0, "a file of ggml", _SOURCE),
    (b"ftrt", 0, "a TensorRT engine", _SOURCE),
    (b"RKNN", 0, "an RKNN model", _SOURCE),
    (b"LDMK", 0, "a kmodel of nncase", _SOURCE),
    (b"\x01HEF", 0, "a model for Hailo", _SOURCE),
    (b"IMOD", 0, "a model for Ascend (.om)", _SOURCE),
    (b"\x0c\xdb\x3a\x2a", 0, "a file of an Orbax checkpoint", _ORBAX),
    (b"\x0c\xdb\x20\xde", 0, "a file of an Orbax checkpoint", _ORBAX),
    (b"N\xef", 0, "a tensor of an NNEF model", _SOURCE),
    (b"<net ", 0, "an OpenVINO model", _SOURCE),
    (b"7767517", 0, "an ncnn model", _SOURCE),
    (b"\xdd\x85\x76\x00", 0, "an ncnn model", _SOURCE),
    (b"Gk0\x01", 0, "the weights of an ncnn model, in half precision", _SOURCE),
    (b"8K\r\0", 0, "the weights of an ncnn model, in 8 bits", _SOURCE),
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
    ".uff": ("a UFF model of TensorRT", _SOURCE),
    ".wts": ("a text of weights for TensorRT", _SOURCE),
    ".mnn": ("an MNN model", _SOURCE),
    ".rknn": ("an RKNN model", _SOURCE),
    ".pte": ("a program of ExecuTorch", _SOURCE),
    ".tmfile": ("a Tengine model", _SOURCE),
    ".mindir": ("a graph of MindSpore", "give it the .ckpt file"),
    ".pdmodel": ("a program of Paddle", "give it the .pdparams file that it was exported from"),
    ".pdiparams": (
        "the weights of a program of Paddle, without names",
        "give it the .pdparams file that it was exported from",
    ),
    ".nb": ("a model of Paddle Lite", "give it the .pdparams file that it was exported from"),
    ".tflite": ("a TensorFlow Lite model", _SOURCE),
    ".mlmodel": ("a Core ML model", _SOURCE),
    ".gguf": ("a GGUF file of llama.cpp", _SOURCE),
    ".nnef": ("an NNEF model", _SOURCE),
    "init_net.pb": (
        "the weights of a Caffe2 net",
        "give it the .pkl file of blobs, or the checkpoint that this was made from",
    ),
    "predict_net.pb": ("a Caffe2 net, without weights", _SOURCE),
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
_SHOWN = 60  # characters of an unknown text
_SIGNATURES = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ\0": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"\x04\x22\x4d\x18": "an lz4 archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"\x08": "a protobuf message, but not an ONNX model",
}

_DOWNLOAD = "the download went wrong"
_OF_PAGES = "name the address of the file itself (on GitHub with /raw/ for /blob/, on the hub as hf://OWNER/NAME/FILE)"
# what the first 4 KiB of a text begin with, what it is and what to do
_TEXTS = (
    (r"(<!doctype html|<html)", "a web page, not a checkpoint", _DOWNLOAD),
    (r"(<\?xml[^>]*>\s*)?<Error>", "what a server answers where it gives no file", _DOWNLOAD),
    (r"<\?xml", "an XML file, such as the model of OpenVINO (beside its .bin)", _SOURCE),
    (r"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with git lfs pull"),
    (r"model_checkpoint_path", "TensorFlow's note of its latest checkpoint", "name the .index file of that"),
    (r"version 1\.\d\s*;", "the graph of an NNEF model", _SOURCE),
    (r'\{[^\x00]*"(TensorFlow\.js|weightsManifest)', "a TensorFlow.js model", _SOURCE),
    (r'\{[^\x00]*"itemInfoEntries"', "the manifest of a Core ML package", _SOURCE),
    (r'\{[^\x00]*"arg_nodes"|\{\s*"nodes": \[', "a graph of MXNet, without weights",
     "give it the .params file beside it"),
    (r'\{\s*"(class_name|module)": [^\x00]*"config"', "the configuration of a Keras model, without weights",
     "give it the file of weights, and this one by --keras-config"),
)  # fmt: skip


def describe_unknown(path: Location, head: bytes) -> str:
    """Return the message for a file of no format that is read, by its first 4 KiB and its name."""
    found = next(_find_names(path, head), None)
    if found is not None:
        return _name(*found)
    known = _describe_container(head)
    guess = next((what for magic, what in _SIGNATURES.items() if head.startswith(magic)), None)
    if known is None and guess is not None:
        known = f"the format is not known; this looks like {guess}"
    if known is None and not any(head):
        known = f"the first {len(head):,} bytes are zeros: the file is damaged, or was not written to its end"
    return known or _describe_text(path, head) or f"the format is not known; these are read: {_READ}"


def _describe_container(head: bytes) -> str | None:
    """Return the message for a container of several formats, with the first file of an archive; None for others."""
    found = next((one for one in _CONTAINERS if head.startswith(one[0], one[1])), None)
    if found is None:
        return None
    _, _, container, advice = found
    first = _find_first_member(head)
    none = f"this is {container}, but it holds none of the formats that bntool reads"
    if not first:
        return f"{none}; {advice}"
    inner = next((what for ending, what in _ENDINGS.items() if first.endswith(ending)), None)
    if inner is not None:
        return _name(f"{container} that holds {quote(first)}: {inner[0]}", inner[1])
    return f"{none}; it begins with {quote(first)}; {advice}"


def _find_first_member(head: bytes) -> str | None:
    """Return the name of the first file in an archive; None for what is no zip or tar archive."""
    if head.startswith(b"PK\x03\x04"):
        size = int.from_bytes(head[26:28], "little")
        return head[30 : 30 + size].decode(errors="replace")
    if head.startswith(b"ustar", 257):
        return head[:100].partition(b"\0")[0].decode(errors="replace")
    return None


def _read_text(head: bytes) -> str | None:
    """Return the text that a file begins with; None where it is no text."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a character that the limit cut
            return None
        text = head[: error.start].decode()
    text = text.removeprefix("\ufeff")
    return None if re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text) else text


def _describe_text(path: Location, head: bytes) -> str | None:
    """Return the message for a text."""
    text = _read_text(head)
    if text is None:
        return None
    text = text.lstrip()
    for pattern, what, advice in _TEXTS:
        if re.match(pattern, text, flags=re.IGNORECASE):
            return f"this is {what}; {_OF_PAGES if advice is _DOWNLOAD and isinstance(path, Address) else advice}"
    line = text.partition("\n")[0]
    shown = line if len(line) <= _SHOWN else line[:_SHOWN] + "..."
    return f"this is a text, not a checkpoint; it begins with {quote(shown)}"


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
    if path.name.endswith(".dlc"):
        yield "a model of Qualcomm's SDK (.dlc)", _SOURCE  # a zip archive
    if any(head.startswith(magic, offset) for magic, offset, _, _ in _CONTAINERS):
        return
    yield from (found for ending, found in _ENDINGS.items() if path.name.endswith(ending))
    if re.search(r"shard\d+of\d+(\.bin)?$", path.name):
        yield "weights of a TensorFlow.js model", _SOURCE
    if path.suffix == ".bin" and isinstance(path, Path):
        for beside, what in _BESIDE.items():
            if path.with_suffix(beside).is_file():
                yield f"the weights of {what} ({path.with_suffix(beside).name} beside it)", _SOURCE


def _name(what: str, advice: str) -> str:
    return f"this is {what}, which bntool does not read; {advice}"


_NAMES_OF_CHECKPOINTS = (
    (".index.json",),
    (".safetensors", ".pt", ".pth", ".pt2", ".ckpt", ".bin", ".pkl", ".keras", ".h5", ".onnx", ".caffemodel"),
    (".npz", ".msgpack", ".hdf5", ".pth.tar", ".pdparams", ".params", ".weights", ".nemo", ".mar"),
)
# what a folder holds that is a checkpoint of several files, which is read
_READ_FOLDERS = (".metadata", "variables")
_LOOKED_AT = 1000  # entries of a folder and of those below it
_DEPTH = 4
_ENDINGS_OF_RUNS = (".pt", ".pth", ".ckpt", ".safetensors")
# what a folder holds that is one model of a format that is not read, what that is, and what to do
_FOLDERS = (
    (("Manifest.json", "Data"), "a Core ML package (.mlpackage)", _SOURCE),
    (("graph.nnef",), "an NNEF model", _SOURCE),
    (("model.json", "group1-shard1of1.bin"), "a TensorFlow.js model", _SOURCE),
    (("coremldata.bin",), "a compiled Core ML model (.mlmodelc)", _SOURCE),
    (("saved_model.pb",), "a SavedModel without variables: its weights are constants of a graph",
     "export it to ONNX by tf2onnx, and give that"),
    (("_CHECKPOINT_METADATA",), "an Orbax checkpoint", _ORBAX),
    (("manifest.ocdbt",), "an Orbax checkpoint", _ORBAX),
)  # fmt: skip


def _name_all(folder: Path, names: Sequence[str]) -> str:
    """Describe how to look at all checkpoints of a folder, as those of a run, if it holds several with one ending."""
    ending = Path(names[0]).suffix
    several = ending in _ENDINGS_OF_RUNS and sum(name.endswith(ending) for name in names) > 1
    return f", or bntool inspect {quote_word(str(folder))}/*{ending} to look at all" if several else ""


def describe_folder(folder: Path) -> str:
    """Return the message for a folder that is no checkpoint; it names files below it that may be one."""
    for place, names in _walk(folder):
        inner = "" if place == folder else place.relative_to(folder).as_posix()
        for held, what, advice in _FOLDERS:
            if set(held) <= set(names):
                return (
                    _name(what, advice) if not inner else _name(f"a folder in which {quote(inner)} is {what}", advice)
                )
        if inner and not set(_READ_FOLDERS).isdisjoint(names):
            return f"this is a folder, not a file; name a folder in it, such as {quote(inner)}"
        likely = [name for endings in _NAMES_OF_CHECKPOINTS for name in names if name.endswith(endings)]
        if likely:
            named = f"such as {quote(f'{inner}/{likely[0]}' if inner else likely[0])}{_name_all(place, likely)}"
            return f"this is a folder, not a file; name a file of it, {named}"
    return "this is a folder, not a file, and holds nothing that is named like a checkpoint; name a file"


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder with the names in it, sorted, then those below it, the nearer first; links are not followed."""
    left, places = _LOOKED_AT, [folder]
    for place in places:
        with contextlib.suppress(OSError), os.scandir(place) as found:
            entries = sorted(itertools.islice(found, left), key=lambda entry: entry.name)
            left -= len(entries)
            yield place, [entry.name for entry in entries]
            if len(place.parts) - len(folder.parts) < _DEPTH:
                places += [place / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
