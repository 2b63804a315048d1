"""Arrays in .npy, .npz, .pt and .safetensors files, read without running code, a batch at a time."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, count_elements
from bntool.data.batches import Batch, Batches
from bntool.data.preprocessing import Preprocessing
from bntool.data.source import DataOptions, DataSource
from bntool.errors import CorruptFileError, UnreadableFileError, UsageError
from bntool.layers.loading import to_torch

_INPUT_KEYS = ("images", "image", "inputs", "input", "x", "data", "pixel_values", "features", "arr_0")
_LABEL_KEYS = ("labels", "label", "y", "targets", "target", "classes")
_PIXEL_CHANNELS = (1, 3, 4)


class Rows(Protocol):
    """An array whose rows are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """These rows, ascending, in their own memory."""
        ...


class ArraySource(DataSource):
    form = "a .npy, .npz, .pt or .safetensors file"

    def recognises(self, spec: str) -> bool:
        return spec.lower().endswith((".npy", ".npz", ".pt", ".pth", ".safetensors"))

    def load(self, spec: str, options: DataOptions) -> Batches:
        path = Path(spec)
        arrays = _open_numpy(path) if path.suffix.lower() in (".npy", ".npz") else _open_tensors(path)
        inputs, labels = _choose(arrays, path)
        count = inputs.shape[0]
        if labels is not None and labels.shape[0] != count:
            raise UsageError(f"there are {count} inputs but {labels.shape[0]} labels", path=path)
        if count == 0:
            raise UsageError("the array of inputs is empty", path=path)
        dealt = options.deal(count)

        def read() -> Iterator[Batch]:
            for rows in dealt:
                tensor = _prepare(inputs.read(rows), options.preprocessing, path)
                targets = None if labels is None else labels.read(rows)
                yield Batch(tensor, targets, _describe(rows, path), len(rows))

        return Batches(read, description=spec, samples=sum(map(len, dealt)), has_labels=labels is not None)


def _describe(rows: Sequence[int], path: Path) -> str:
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return f"rows {first} to {last} of {path}"
    return f"rows {', '.join(map(str, rows[:4]))}{', ...' if len(rows) > 4 else ''} of {path}"


def _choose(arrays: Mapping[str, Rows], path: Path) -> tuple[Rows, Rows | None]:
    label_key = next((key for key in _LABEL_KEYS if key in arrays), None)
    candidates = {key: rows for key, rows in arrays.items() if key != label_key and len(rows.shape) > 1}
    key = next((key for key in _INPUT_KEYS if key in candidates), None)
    if key is None and len(candidates) == 1:
        key = next(iter(candidates))
    if key is None:
        held = ", ".join(f"{key} {list(rows.shape)}" for key, rows in list(arrays.items())[:8]) or "no array"
        raise UsageError(
            f"which array holds the inputs? The file has {held}; name it {_INPUT_KEYS[0]!r} (and {_LABEL_KEYS[0]!r})",
            path=path,
        )
    return candidates[key], arrays[label_key] if label_key is not None else None


def _prepare(tensor: torch.Tensor, preprocessing: Preprocessing | None, path: Path) -> torch.Tensor:
    """Pixels become floats in the order of channels that models take; floats stay as they are."""
    if tensor.dtype is not torch.uint8:
        if preprocessing is not None:
            raise UsageError(f"--preprocess is for uint8 pixels; the array holds {tensor.dtype}", path=path)
        return tensor
    if preprocessing is None:
        raise UsageError(
            "uint8 pixels: say what the model expects, e.g. --preprocess normalize, or mean=0.5,std=0.25",
            path=path,
        )
    if preprocessing.resize is not None or preprocessing.crop is not None:
        raise UsageError("arrays are neither resized nor cropped: give mean and std only", path=path)
    if tensor.ndim != 4:
        raise UsageError(
            f"uint8 pixels of shape {list(tensor.shape)}; (N, H, W, C) or (N, C, H, W) is needed", path=path
        )
    if tensor.shape[1] not in _PIXEL_CHANNELS:
        tensor = tensor.permute(0, 3, 1, 2)
    return preprocessing.normalize(tensor.contiguous())


class _NumpyRows:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.shape: tuple[int, ...] = array.shape

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        part = self._array[np.asarray(rows)]
        return torch.from_numpy(np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("=")))


def _open_numpy(path: Path) -> Mapping[str, Rows]:
    try:
        if path.suffix.lower() == ".npy":
            arrays = {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            arrays = _open_npz(path)
    except OSError as error:
        raise UnreadableFileError(error.strerror or str(error), path=path) from error
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise CorruptFileError(f"numpy cannot read it without running code: {error}", path=path) from error
    for key, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.dtype == np.dtype("longdouble"):
            raise UsageError(f"the array {key!r} holds {array.dtype}, not plain numbers", path=path)
    return {key: _NumpyRows(array) for key, array in arrays.items() if array.ndim}


def _open_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an archive: mapped where they are stored as they are, else unpacked."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                mapped = _map_member(path, info) if info.compress_type == zipfile.ZIP_STORED else None
                if mapped is None:
                    with archive.open(info) as stream:
                        mapped = np.lib.format.read_array(stream, allow_pickle=False)
                arrays[info.filename.removesuffix(".npy")] = mapped
    return arrays


def _map_member(path: Path, info: zipfile.ZipInfo) -> np.ndarray[Any, Any] | None:
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", stream.read(4))
        stream.seek(name_length + extra_length, 1)
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            return None
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
        if dtype.hasobject or 0 in shape:
            return None
        offset = stream.tell()
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran_order else "C")


class _TensorRows:
    """Rows of a tensor of a checkpoint file."""

    def __init__(self, tensor: StoredTensor, checkpoint: Checkpoint) -> None:
        self._tensor = tensor
        self._checkpoint = checkpoint  # keeps the file open
        self.shape = tensor.shape

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        tensor, storage = self._tensor, self._tensor.storage
        if storage is None or tensor.wrapper or storage.big_endian or not tensor.is_contiguous or tensor.dtype.bits < 8:
            return to_torch(tensor)[torch.tensor(rows)]
        start, _ = tensor.byte_range
        size = count_elements(self.shape[1:]) * tensor.dtype.itemsize
        data = b"".join(
            storage.source.read(storage.offset + start + first * size, count * size) for first, count in _runs(rows)
        )
        return to_torch(LiteralTensor(tensor.dtype, (len(rows), *self.shape[1:]), data))


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring rows as (first, count)."""
    first, count = rows[0], 1
    for row in rows[1:]:
        if row == first + count:
            count += 1
        else:
            yield first, count
            first, count = row, 1
    yield first, count


def _open_tensors(path: Path) -> Mapping[str, Rows]:
    checkpoint = open_checkpoint(path)
    tensors: dict[str, Any] = {}
    for state_dict in checkpoint.state_dicts:
        tensors.update({state_dict.strip(name): tensor for name, tensor in state_dict.tensors.items()})
    return {
        name: _TensorRows(tensor, checkpoint)
        for name, tensor in tensors.items()
        if isinstance(tensor, StoredTensor) and tensor.shape
    }
