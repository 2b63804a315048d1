"""Writing files of every format as the programs do that own it, those that torch reads but no longer writes too."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from numpy.typing import NDArray

from tests.checkpoints.flax.msgpack_files import nest, pack_variables
from tests.checkpoints.mxnet.dtypes import MXNET_DTYPES
from tests.checkpoints.tensorflow.bundle_files import DTYPES, field, varint, write_bundle

Tensors = Mapping[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> bytes:
    """The elements in C order, NaN payloads and all."""
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype)
    plain.copy_(tensor.detach().flatten())
    return plain.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def write_zip(tensors: Tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt"


def write_legacy(tensors: Tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def write_safetensors(tensors: Tensors, folder: Path) -> Path:
    plain = {name: tensor.detach().resolve_conj().clone().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, folder / "model.safetensors", metadata={"format": "pt", "note": "größe"})
    return folder / "model.safetensors"


def write_sharded(tensors: Tensors, folder: Path) -> Path:
    names = list(tensors)
    half = math.ceil(len(names) / 2)
    weight_map = {}
    for number, part in enumerate([names[:half], names[half:]], start=1):
        if part:
            file = f"model-{number:05}-of-00002.safetensors"
            plain = {name: tensors[name].detach().clone().contiguous() for name in part}
            safetensors.torch.save_file(plain, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder / "model.safetensors.index.json"


def write_sharded_bin(tensors: Tensors, folder: Path) -> Path:
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate([names[::2], names[1::2]], start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "pytorch_model.bin.index.json"


def rezip(
    path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None] = lambda n, d: (n, d), *, deflate: bool = False
) -> bytes:
    """The archive written again by Python's zipfile, with records renamed, changed or left out."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for info in source.infolist():
            changed = change(info.filename, source.read(info))
            if changed is not None:
                target.writestr(changed[0], changed[1])
    return buffer.getvalue()


def save_tar(root: Any, path: Path) -> None:
    """What torch 0.1.1 wrote, as torch.serialization's legacy_load still reads it: torch.load is the judge of this."""
    tensors: dict[int, torch.Tensor] = {}
    storages: dict[int, torch.Tensor] = {}  # a tensor over the whole of each storage

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> str | None:
            if not isinstance(value, torch.Tensor):
                return None
            value = value.detach()
            number = 1000 + len(tensors)
            tensors[number] = value
            storages[value.untyped_storage().data_ptr()] = value
            return str(number)

    members = {"sys_info": pickle.dumps({"protocol_version": 1000, "little_endian": True}, protocol=2)}
    main = io.BytesIO()
    Pickler(main, protocol=2).dump(root)
    with io.BytesIO() as stream:
        stream.write(pickle.dumps(len(storages), protocol=2))
        for key, tensor in storages.items():
            storage = tensor.untyped_storage()
            kind = getattr(torch, _storage_name(tensor.dtype))
            stream.write(pickle.dumps((key, "cpu", kind), protocol=2))
            stream.write(struct.pack("<q", len(storage) // tensor.element_size()))
            stream.write(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes())
        stream.write(pickle.dumps([], protocol=2))
        members["storages"] = stream.getvalue()
    with io.BytesIO() as stream:
        stream.write(pickle.dumps(len(tensors), protocol=2))
        for key, tensor in tensors.items():
            owner = tensor.untyped_storage().data_ptr()
            stream.write(pickle.dumps((key, owner, torch.FloatTensor), protocol=2))
            stream.write(struct.pack("<ii", tensor.dim(), 0))
            geometry = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
            stream.write(struct.pack(f"<{len(geometry)}q", *geometry))
        members["tensors"] = stream.getvalue()
    members["pickle"] = main.getvalue()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset + 2 * tarfile.BLOCKSIZE
    with path.open("r+b") as stream:
        stream.truncate(end)  # without what fills up a record of a tape


def _storage_name(dtype: torch.dtype) -> str:
    from bntool.checkpoints.dtypes import BY_NAME

    return BY_NAME[str(dtype).removeprefix("torch.")].storage or "none"


def write_tar(tensors: Tensors, folder: Path) -> Path:
    save_tar(OrderedDict(tensors), folder / "model.pth")
    return folder / "model.pth"


def as_arrays(tensors: Tensors) -> dict[str, NDArray[Any]]:
    return {name: tensor.detach().resolve_conj().numpy() for name, tensor in tensors.items()}


def write_numpy_pickle(tensors: Tensors, folder: Path) -> Path:
    (folder / "model.pkl").write_bytes(pickle.dumps(as_arrays(tensors), protocol=4))
    return folder / "model.pkl"


def save_distributed(root: Any, folder: Path) -> None:
    """A folder of torch.distributed.checkpoint, saved by this process alone."""
    import torch.distributed.checkpoint as distributed_checkpoint  # a second, and of few tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        distributed_checkpoint.save(root, checkpoint_id=folder)


def write_distributed(tensors: Tensors, folder: Path) -> Path:
    save_distributed(dict(tensors), folder)
    return folder / ".metadata"


def write_npz(tensors: Tensors, folder: Path) -> Path:
    import numpy as np

    np.savez(folder / "model.npz", **as_arrays(tensors))
    return folder / "model.npz"


def write_torchserve(tensors: Tensors, folder: Path) -> Path:
    """Stored, so that its tensors can be read by position; torch-model-archiver deflates."""
    weights = io.BytesIO()
    torch.save(tensors, weights)
    manifest = {"model": {"modelName": "m", "serializedFile": "m.pt", "handler": "image_classifier"}}
    with zipfile.ZipFile(folder / "m.mar", "w") as archive:
        archive.writestr("m.pt", weights.getvalue())
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return folder / "m.mar"


def write_nemo(tensors: Tensors, folder: Path) -> Path:
    """As save_to does (nemo/core/connectors/save_restore_connector.py)."""
    weights = io.BytesIO()
    torch.save(tensors, weights)
    with tarfile.open(folder / "m.nemo", "w:") as archive:
        for name, data in (("model_config.yaml", b"target: nemo.Model\n"), ("model_weights.ckpt", weights.getvalue())):
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset + 2 * tarfile.BLOCKSIZE
    with (folder / "m.nemo").open("r+b") as stream:
        stream.truncate(end)  # without what fills up a record of a tape
    return folder / "m.nemo"


def write_mxnet(tensors: Tensors, folder: Path) -> Path:
    """As mxnet.npx.save does; tests/oracles/mxnet_files.py lets MXNet read one."""
    codes = {name: code for code, name in MXNET_DTYPES.items()}
    data = struct.pack("<QQQ", 0x112, 0, len(tensors))
    for tensor in tensors.values():
        plain = tensor.detach().resolve_conj()
        code = codes[str(plain.dtype).removeprefix("torch.")]
        data += struct.pack(f"<Iii{plain.dim()}qiii", 0xF993FACA, 0, plain.dim(), *plain.shape, 1, 0, code) + bits(
            plain
        )
    data += struct.pack("<Q", len(tensors))
    for name in tensors:
        data += struct.pack("<Q", len(name.encode())) + name.encode()
    (folder / "model.params").write_bytes(data)
    return folder / "model.params"


def write_mindspore(tensors: Tensors, folder: Path) -> Path:
    """As mindspore.save_checkpoint does; tests/oracles/mindspore_files.py lets MindSpore read one."""
    data = b""
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj()
        kind = str(plain.dtype).removeprefix("torch.")
        kind = {"bool": "Bool", "bfloat16": "BFloat16"}.get(kind, kind.capitalize().replace("Uint", "UInt"))
        dims = b"".join(b"\x08" + varint(extent) for extent in plain.shape)
        value = field(1, name.encode()) + field(2, dims + field(2, kind.encode()) + field(3, bits(plain)))
        data += field(1, value)
    (folder / "model.ckpt").write_bytes(data)
    return folder / "model.ckpt"


def write_flax(tensors: Tensors, folder: Path) -> Path:
    arrays = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj()
        arrays[name] = (str(plain.dtype).removeprefix("torch."), tuple(plain.shape), bits(plain))
    (folder / "model.msgpack").write_bytes(pack_variables(nest(arrays)))
    return folder / "model.msgpack"


def write_tensorflow(tensors: Tensors, folder: Path) -> Path:
    """A checkpoint by names, as TensorFlow 1 saves it."""
    values = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj()
        values[name] = (DTYPES[str(plain.dtype).removeprefix("torch.")], tuple(plain.shape), bits(plain))
    return write_bundle(values, folder / "model.ckpt")
