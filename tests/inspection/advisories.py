"""Public advisories on loading model files: a file of ours for each, and what bntool says of it."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import onnx
import torch
from onnx import helper

from tests.checkpoints.foreign import rezip
from tests.checkpoints.keras.configurations import (
    OLD_CODE,
    archive,
    function,
    hdf5,
    lambda_layer,
    layer,
    torch_pickle,
)
from tests.inspection.attacks import ATTACKS, payload, pickled
from tests.places import INTEROP


@dataclass(frozen=True)
class Advisory:
    """One advisory.

    Attributes:
        number: of CVE.
        affected: the library, and the last version that it is of.
        what: the file does.
        build: makes one in a folder; its payload would make another folder.
        says: the verdict, or the code of the error by which it is refused.
    """

    number: str
    affected: str
    what: str
    build: Callable[[Path, Path], Path]
    says: str


def script(folder: Path, canary: Path) -> Path:
    """A TorchScript archive, whose code runs when it is called."""
    del canary
    torch.jit.script(torch.nn.BatchNorm1d(2)).save(folder / "script.pt")
    return folder / "script.pt"


def setitem_on_tensor(folder: Path, canary: Path) -> Path:
    """A pickle that sets elements of a tensor that it just made."""
    del canary
    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer)
    path = folder / "items.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, data[:-1] + b"K\x00G?\xf0\0\0\0\0\0\0s." if name.endswith("data.pkl") else data)
    return path


def storage_of_false_size(folder: Path, canary: Path) -> Path:
    """A storage whose reference counts more elements than its record holds."""
    del canary
    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer)
    path = folder / "size.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, re.sub(rb"(cpuq.)K\x03", rb"\1Kc", data) if "data.pkl" in name else data)
    return path


def plain_pickle(folder: Path, canary: Path) -> Path:
    """A pickle under the name of another format."""
    (folder / "model.bin").write_bytes(payload(canary) + b"}.")
    return folder / "model.bin"


def wrong_checksum(folder: Path, canary: Path) -> Path:
    """A zip archive whose pickle has another checksum than the archive says, which torch does not mind."""
    path = pickled(lambda canary: payload(canary) + b"}.")(folder, canary)
    data = path.read_bytes()
    crc = zipfile.ZipFile(path).getinfo("archive/data.pkl").CRC.to_bytes(4, "little")
    path.write_bytes(data.replace(crc, bytes(4)))
    return path


def by_submodule(folder: Path, canary: Path) -> Path:
    """A function of a submodule of a module that a list of dangerous ones has."""
    call = b"casyncio.unix_events\n_UnixSubprocessTransport._start\n(I0\nNtR0"
    return pickled(lambda _: b"\x80\x02" + call + b"}.")(folder, canary)


Build = Callable[[Path, Path], Path]


def keras_layer(entry: dict[str, Any], *, suffix: str = ".keras") -> Build:
    """A Keras file with one layer more."""
    make = archive if suffix == ".keras" else hdf5

    def build(folder: Path, canary: Path) -> Path:
        del canary
        return make(folder / f"a{suffix}", lambda config: config["config"]["layers"].append(entry))

    return build


def hdf5_external(folder: Path, canary: Path) -> Path:
    """A ``.keras`` archive whose weights lie in another file of the machine."""
    (folder / "secret").write_bytes(bytes(16))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("layers/dense/vars/0", shape=(4,), dtype="f4", external=[(str(folder / "secret"), 0, 16)])
    del canary
    source = INTEROP / "keras_tiny.keras"
    data = rezip(source, lambda name, old: (name, buffer.getvalue() if name == "model.weights.h5" else old))
    (folder / "a.keras").write_bytes(data)
    return folder / "a.keras"


def onnx_external(location: str) -> Build:
    """An ONNX model whose tensor lies outside of its folder, directly or through a link of the folder."""

    def build(folder: Path, canary: Path) -> Path:
        del canary
        outside = folder / "outside"
        outside.mkdir()
        (outside / "secret").write_bytes(bytes(16))
        inside = folder / "model"
        inside.mkdir()
        (inside / "link").symlink_to(outside)
        tensor = onnx.TensorProto(name="w", dims=[4], data_type=onnx.TensorProto.FLOAT)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        graph = helper.make_graph([], "g", [], [], [tensor])
        (inside / "a.onnx").write_bytes(helper.make_model(graph).SerializeToString())
        return inside / "a.onnx"

    return build


_TORCH_2025 = ("CVE-2025-32434", "torch 2.5.1")
_TORCH_2026 = ("CVE-2026-24747", "torch 2.9.1")
_PICKLESCAN = "picklescan 0.0.30"
ADVISORIES = [
    Advisory(*_TORCH_2025, "a tar file of torch 0.1, under `weights_only`", ATTACKS["tar of type 7"][0], "unsafe"),
    Advisory(*_TORCH_2025, "a TorchScript archive, under `weights_only`", script, "unknown"),
    Advisory(*_TORCH_2026, "SETITEM on a tensor, under `weights_only`", setitem_on_tensor, "unsafe"),
    Advisory(*_TORCH_2026, "a storage that claims more than it has", storage_of_false_size, "corrupt"),
    Advisory("CVE-2025-10155", _PICKLESCAN, "a pickle named `.bin`", plain_pickle, "unknown-format"),
    Advisory("CVE-2025-10156", _PICKLESCAN, "a record with a wrong checksum", wrong_checksum, "corrupt"),
    Advisory("CVE-2025-10157", _PICKLESCAN, "`asyncio.unix_events`, of a listed module", by_submodule, "suspicious"),
    Advisory(
        "CVE-2025-1550",
        "Keras 3.8.0",
        "a function of any module in `config.json`",
        keras_layer(layer("Dense", units=2, activation=function("builtins", "exec"))),
        "suspicious",
    ),
    Advisory(
        "CVE-2025-8747",
        "Keras 3.10.0",
        "`keras.utils.get_file` in a Lambda, which writes files",
        keras_layer(lambda_layer("keras.utils", "get_file")),
        "suspicious",
    ),
    Advisory(
        "CVE-2025-9905",
        "Keras 3.11.2",
        "a Lambda with code in an `.h5`, whatever `safe_mode` says",
        keras_layer(layer("Lambda", function=OLD_CODE, function_type="lambda"), suffix=".h5"),
        "suspicious",
    ),
    Advisory(
        "CVE-2025-9906",
        "Keras 3.10",
        "`keras.config.enable_unsafe_deserialization` in a Lambda",
        keras_layer(lambda_layer("keras.config", "enable_unsafe_deserialization")),
        "suspicious",
    ),
    Advisory(
        "CVE-2025-49655",
        "Keras 3.11.2",
        "a TorchModuleWrapper with a torch pickle",
        keras_layer(layer("TorchModuleWrapper", content=torch_pickle())),
        "suspicious",
    ),
    Advisory(
        "CVE-2025-12058",
        "Keras 3.11.3",
        "a StringLookup whose words are the name of a file",
        keras_layer(layer("StringLookup", vocabulary="/etc/passwd")),
        "suspicious",
    ),
    Advisory("CVE-2026-1669", "Keras 3.13.1", "weights in external storage of HDF5", hdf5_external, "unsafe"),
    Advisory("CVE-2025-51480", "onnx 1.17.0", "external data at `../`", onnx_external("../outside/secret"), "unsafe"),
    Advisory(
        "CVE-2026-27489", "onnx 1.20.1", "external data by a linked folder", onnx_external("link/secret"), "unsafe"
    ),
]
