"""Arrays in .npy, .npz, .pt and .safetensors files, read without running code, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bntool.data.batches import Batch, Batches
from bntool.data.fingerprints import make_fingerprint
from bntool.data.numpy_files import open_numpy
from bntool.data.pixels import arrange_pixels
from bntool.data.preprocessing import Preprocessing
from bntool.data.rows import Rows, choose_arrays
from bntool.data.source import DataOptions, DataSource
from bntool.data.tensor_files import open_tensors
from bntool.errors import UsageError

_LOOKED_AT = 16  # rows that tell one array from another of its shape


class ArraySource(DataSource):
    form = "a .npy, .npz, .pt or .safetensors file"

    def recognises(self, spec: str) -> bool:
        return spec.lower().endswith((".npy", ".npz", ".pt", ".pth", ".safetensors"))

    def load(self, spec: str, options: DataOptions) -> Batches:
        path = Path(spec)
        arrays = open_numpy(path) if path.suffix.lower() in (".npy", ".npz") else open_tensors(path)
        inputs, labels = choose_arrays(arrays, path, options.columns)
        return read_rows(inputs, labels, spec, options)


def read_rows(inputs: Rows, labels: Rows | None, spec: str, options: DataOptions) -> Batches:
    """Return batches of the rows of arrays."""
    dealt = options.deal(inputs.shape[0])
    is_pixels = inputs.read([0]).dtype is torch.uint8
    steps = choose_pixel_steps(options, spec) if is_pixels else None
    if options.preprocessing is not None and not is_pixels:
        dtype = inputs.read([0]).dtype
        raise UsageError(f"--preprocess is for uint8 pixels; the array holds {dtype}", path=spec)

    def read() -> Iterator[Batch]:
        for position, rows in dealt.batches.items():
            values = inputs.read(rows)
            tensor = values if steps is None else steps.normalize(arrange_pixels(values, spec))
            targets = None if labels is None else labels.read(rows)
            names = [f"row {row} of {spec}" for row in rows]
            yield Batch(tensor, targets, _describe(rows, spec), len(rows), names, position=position)

    def identify() -> str:
        some = sorted({inputs.shape[0] * part // _LOOKED_AT for part in range(_LOOKED_AT)})
        content = inputs.read(some)
        return make_fingerprint(
            inputs.shape, content.dtype, content.numpy().tobytes(), options.columns, dealt.fingerprint
        )

    return Batches(
        read,
        description=spec,
        samples=dealt.samples,
        has_labels=labels is not None,
        preprocessing=steps,
        share=options.share,
        count=dealt.total,
        identify=identify,
    )


def choose_pixel_steps(options: DataOptions, spec: str) -> Preprocessing:
    """Choose the steps for pixels, which have their size: the user's without resize and crop, or the rest of the
    model's.

    Raises:
        UsageError: there are none, or they would change the size.
    """
    steps = options.preprocessing
    if steps is None and options.model_preprocessing is not None:
        return options.model_preprocessing.without_geometry()
    if steps is None:
        raise UsageError(
            "uint8 pixels: say what the model expects, e.g. --preprocess normalize, or mean=0.5,std=0.25", path=spec
        )
    if steps.resize is not None or steps.crop is not None:
        raise UsageError(
            f"arrays are neither resized nor cropped; give --preprocess {steps.without_geometry().describe()}",
            path=spec,
        )
    return steps


def _describe(rows: Sequence[int], spec: str) -> str:
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return f"rows {first} to {last} of {spec}"
    return f"rows {', '.join(map(str, rows[:4]))}{', ...' if len(rows) > 4 else ''} of {spec}"
