"""Samples that are decoded one by one, in processes beside this one, and put together to batches."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bntool.data.batches import Batch
from bntool.data.pixels import arrange_pixels
from bntool.data.policies import LeftOut, OnBadData
from bntool.data.preprocessing import Preprocessing
from bntool.data.rows import to_calculable
from bntool.data.workers import LostWorkerError, iterate
from bntool.errors import CorruptFileError, RefusedError, UsageError
from bntool.representation import list_first

_LARGEST = 1 << 63  # of int64, as labels are
_SHOWN = 20  # characters of a label


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, decoded.

    Attributes:
        name: what to call it, e.g. its file.
        values: the input of a model, but for preprocessing: of an image uint8 (channels, height, width).
        label: None where there is none.
    """

    name: str
    values: np.ndarray[Any, Any]
    label: Any = None


# from one sample as it is stored; why it cannot be used where it cannot. Goes to other processes.
Decode: TypeAlias = Callable[[Any], "Sample | str"]


@dataclass(frozen=True)
class Decoding:
    """The way from samples to batches.

    Attributes:
        decode: one sample.
        preprocessing: what is done to their pixels; None where they are no pixels.
        are_images: they are decoded images; else arrays as they are stored, whose pixels may lie in any order.
        spec: what the data are called in messages.
    """

    decode: Decode
    preprocessing: Preprocessing | None
    are_images: bool
    spec: str

    def run(
        self,
        lots: Iterable[tuple[int, Sequence[Any]]],
        *,
        workers: int,
        on_bad_data: OnBadData,
        bad_inputs: list[LeftOut],
    ) -> Iterator[Batch]:
        """Yield batches of samples that are stored, in their order whatever the number of processes.

        Args:
            lots: the samples of each batch, with its position; read as far ahead as the processes need.
            workers: processes that decode beside this one.
            on_bad_data: what to do about a sample that cannot be used.
            bad_inputs: is given those that are left out.

        Raises:
            CorruptFileError: a sample cannot be used (``OnBadData.STOP``).
            RefusedError: a process was lost.
            UsageError: samples differ in shape.
        """
        positions: deque[int] = deque()

        def take() -> Iterator[Sequence[Any]]:
            for position, lot in lots:
                positions.append(position)
                yield lot

        loader = DataLoader(_Decoded(self.decode), batch_sampler=take(), num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
        for decoded in _watch_workers(loader):
            position = positions.popleft()
            bad = [sample for sample in decoded if isinstance(sample, str)]
            if bad and on_bad_data is OnBadData.STOP:
                what = "images" if self.are_images else "samples"
                raise CorruptFileError(f"{bad[0]}; --on-bad-data skip leaves such {what} out")
            bad_inputs.extend(LeftOut(text, 1) for text in bad)
            if len(bad) < len(decoded):
                batch = self._put_together([sample for sample in decoded if isinstance(sample, Sample)])
                yield replace(batch, position=position)

    def _put_together(self, samples: Sequence[Sample]) -> Batch:
        names = [sample.name for sample in samples]
        first = samples[0]
        other = next((sample for sample in samples if sample.values.shape != first.values.shape), None)
        if other is not None:
            self._refuse_shapes(first, other)
        values = to_calculable(np.stack([sample.values for sample in samples]))
        if self.preprocessing is not None:
            pixels = values if self.are_images else arrange_pixels(values, self.spec)
            values = self.preprocessing.normalize(pixels)
        labels = [sample.label for sample in samples]
        targets = None if None in labels else torch.tensor(labels, device="cpu")
        return Batch(values, targets, "the batch of " + list_first(names), len(samples), names)

    def _refuse_shapes(self, first: Sample, other: Sample) -> None:
        if self.are_images:
            sizes = [f"{width}x{height}" for _, height, width in (first.values.shape, other.values.shape)]
            raise UsageError(
                f"the images differ in size: this one is {sizes[0]}, {other.name} {sizes[1]}; give --preprocess with "
                "resize and crop",
                path=first.name,
            )
        raise UsageError(
            f"the samples differ in shape: this one is {list(first.values.shape)}, {other.name} "
            f"{list(other.values.shape)}",
            path=first.name,
        )


class _Decoded(Dataset[Any]):
    """Decodes samples; what a DataLoader takes for the index of a sample is the sample as it is stored."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode

    def __getitem__(self, stored: Any) -> Sample | str:
        return self._decode(stored)


def _watch_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the items of a loader.

    Raises:
        RefusedError: a worker was lost.
    """
    try:
        yield from iterate(loader)
    except LostWorkerError as error:
        raise RefusedError(" ".join(str(error).split())) from error


def read_label(value: Any, name: str) -> int | str:
    """Read the index of a class; where it is none, say why.

    Args:
        value: as it is stored: a number, or the text of one.
        name: what to call the sample.
    """
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        label = int(value)
        is_whole = isinstance(value, str | bytes) or label == value
        if is_whole and -_LARGEST <= label < _LARGEST:
            return label
    shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return f"the label of {name} is no index of a class but {shown[:_SHOWN]!r}"


def find_first(samples: Iterable[Sample | str], on_bad_data: OnBadData) -> Sample | None:
    """Find the first sample that can be used, which tells what the others are; None where there is no sample at all.

    Raises:
        CorruptFileError: it cannot be used (``OnBadData.STOP``), or none can.
    """
    bad: str | None = None
    for sample in samples:
        if isinstance(sample, Sample):
            return sample
        bad = bad or sample
        if on_bad_data is OnBadData.STOP:
            raise CorruptFileError(f"{bad}; --on-bad-data skip leaves such samples out")
    if bad is not None:
        raise CorruptFileError(f"no sample can be used; the first: {bad}")
    return None


def explain(error: Exception) -> str:
    """Return the reason why an image cannot be read, without the path that Pillow and the system add."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is empty or no image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
