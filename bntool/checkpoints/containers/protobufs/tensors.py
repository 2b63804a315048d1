"""Tensors whose elements a message does not hold as one plain run of bytes: gathered or decoded when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.containers.protobufs.reading import Field, Message, Wire, read_varints
from bntool.checkpoints.dtypes import DType, NumberKind
from bntool.checkpoints.tensors import Storage, StoredTensor, Tensor, contiguous_strides, count_elements, describe_shape
from bntool.errors import CorruptFileError


@dataclass(frozen=True, slots=True)
class GatheredTensor(AsArray):
    """A repeated fixed-width field that lies in several runs: not packed, or packed in parts.

    Attributes:
        message: that it is a field of.
        runs: the fields in order.
    """

    dtype: DType
    shape: tuple[int, ...]
    message: Message = field(repr=False, compare=False)
    runs: tuple[Field, ...] = field(repr=False)

    def chunks(self) -> Iterator[bytes]:
        """See :class:`~bntool.checkpoints.tensors.Tensor`."""
        for run in self.runs:
            yield self.message.buffer.read(run.value_start, run.length)


@dataclass(frozen=True, slots=True)
class VarintTensor(AsArray):
    """A repeated field of varints: integers, or the bits of small floats.

    Attributes:
        message: that it is a field of.
        runs: the fields in order, packed or not.
    """

    dtype: DType
    shape: tuple[int, ...]
    message: Message = field(repr=False, compare=False)
    runs: tuple[Field, ...] = field(repr=False)

    def chunks(self) -> Iterator[bytes]:
        """See :class:`~bntool.checkpoints.tensors.Tensor`.

        Raises:
            CorruptFileError: there are more or fewer elements than the shape says, or one is too large for the dtype.
        """
        item, count = self.dtype.itemsize, count_elements(self.shape)
        signed = self.dtype.kind is NumberKind.INTEGER and not self.dtype.name.startswith("u")
        mask = (1 << 8 * item) - 1
        found = 0
        for run in self.runs:
            data = bytearray()
            values = [run.value] if run.wire is Wire.VARINT else read_varints(self._bytes(run))
            for value in values:
                number = value - (1 << 64) if signed and value >= 1 << 63 else value
                lowest, highest = (-(mask >> 1) - 1, mask >> 1) if signed else (0, mask)
                if not lowest <= number <= highest:
                    raise CorruptFileError(f"{number} is no {self.dtype}")
                data += (number & mask).to_bytes(item, "little")
            found += len(values)
            yield bytes(data)
        if found != count:
            raise CorruptFileError(f"{found} elements do not fill the shape {describe_shape(self.shape)}")

    def _bytes(self, run: Field) -> bytes:
        return self.message.buffer.read(run.value_start, run.length)


def read_fixed(message: Message, number: int, *, dtype: DType, shape: tuple[int, ...], key: str) -> Tensor:
    """Return a repeated fixed-width field (or raw bytes) as a tensor.

    Args:
        key: names the storage inside the file.

    Raises:
        CorruptFileError: it does not hold as many elements as the shape says.
    """
    runs = tuple(message.all(number))
    total = sum(run.length for run in runs)
    if any(run.wire in (Wire.VARINT, Wire.GROUP) for run in runs) or total != dtype.byte_count(count_elements(shape)):
        raise CorruptFileError(f"{total} bytes do not hold a {dtype} tensor of shape {describe_shape(shape)}")
    if len(runs) > 1:
        return GatheredTensor(dtype, shape, message, runs)
    offset = runs[0].value_start if runs else 0
    storage = Storage(source=message.buffer.source, offset=offset, nbytes=total, key=key)
    return StoredTensor(dtype, shape, contiguous_strides(shape), 0, storage)
