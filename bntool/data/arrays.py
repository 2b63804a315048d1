"""Arrays in .npy, .npz, .pt and .safetensors files, read without running code, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bntool.data.batches import Batch, Batches
from bntool.data.numpy_files import open_numpy
from bntool.data.preprocessing import Preprocessing
from bntool.data.rows import Rows, choose_arrays
from bntool.data.source import DataOptions, DataSource
from bntool.data.tensor_files import open_tensors
from bntool.errors import UsageError

_PIXEL_CHANNELS = (1, 3, 4)


class ArraySource(DataSource):
    form = "a .npy, .npz, .pt or .safetensors file"

    def recognises(self, spec: str) -> bool:
        return spec.lower().endswith((".npy", ".npz", ".pt", ".pth", ".safetensors"))

    def load(self, spec: str, options: DataOptions) -> Batches:
        path = Path(spec)
        arrays = open_numpy(path) if path.suffix.lower() in (".npy", ".npz") else open_tensors(path)
        inputs, labels = choose_arrays(arrays, path)
        return read_rows(inputs, labels, spec, options)


def read_rows(inputs: Rows, labels: Rows | None, spec: str, options: DataOptions) -> Batches:
    """Batches of the rows of arrays."""
    dealt = options.deal(inputs.shape[0])

    def read() -> Iterator[Batch]:
        for rows in dealt:
            tensor = _prepare(inputs.read(rows), options.preprocessing, spec)
            targets = None if labels is None else labels.read(rows)
            names = [f"row {row} of {spec}" for row in rows]
            yield Batch(tensor, targets, _describe(rows, spec), len(rows), names)

    return Batches(read, description=spec, samples=sum(map(len, dealt)), has_labels=labels is not None)


def _describe(rows: Sequence[int], spec: str) -> str:
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return f"rows {first} to {last} of {spec}"
    return f"rows {', '.join(map(str, rows[:4]))}{', ...' if len(rows) > 4 else ''} of {spec}"


def _prepare(tensor: torch.Tensor, preprocessing: Preprocessing | None, path: str) -> torch.Tensor:
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
