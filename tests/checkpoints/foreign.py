"""Writing files of layouts that torch reads but no longer writes, or that other tools write."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from numpy.typing import NDArray

from tests.checkpoints.tensorflow.bundle_files import DTYPES, write_bundle

Tensors = Mapping[str, torch.Tensor]


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        distributed_checkpoint.save(root, checkpoint_id=folder)


def write_distributed(tensors: Tensors, folder: Path) -> Path:
    save_distributed(dict(tensors), folder)
    return folder / ".metadata"


def write_tensorflow(tensors: Tensors, folder: Path) -> Path:
    """A checkpoint by names, as TensorFlow 1 saves it."""
    from tests.checkpoints.samples import bits

    values = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj()
        values[name] = (DTYPES[str(plain.dtype).removeprefix("torch.")], tuple(plain.shape), bits(plain))
    return write_bundle(values, folder / "model.ckpt")
