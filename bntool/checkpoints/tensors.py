"""Tensors that have not been read yet: dtype, shape, strides, and where their bytes lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.dtypes import DType, decode_numbers, encode_numbers
from bntool.checkpoints.files import CHUNK, ByteSource, Chunk, SourceFile
from bntool.errors import BntoolError, CorruptFileError, NoNumbersError, UnsafeFileError

MAX_DIMENSIONS = 64  # what torch computes with
MAX_EXPANSION = 1 << 23  # elements a stride-0 tensor may expand to beyond what its storage holds
MAX_RUNS = 1 << 18  # pieces that such a tensor may be copied in


class Tensor(Protocol):
    """The interface of a tensor, wherever it comes from."""

    @property
    def dtype(self) -> DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def chunks(self) -> Iterator[Chunk]:
        """Yield the elements in C order, little endian, a piece at a time."""
        ...

    def numpy(self) -> Any:
        """Return the elements as an array of numpy."""
        ...


def count_elements(shape: Sequence[int]) -> int:
    return math.prod(shape)


def read_bytes(tensor: Tensor) -> bytes:
    """Return all elements of a tensor in C order, little endian."""
    if isinstance(tensor, StoredTensor) and tensor.storage is not None and tensor.strides in ((1,), ()):
        storage = tensor.storage  # a plain vector, as most that are asked for
        if tensor.wrapper is None and not storage.big_endian and len(tensor.shape) == len(tensor.strides):
            start = storage.offset + tensor.storage_offset * tensor.dtype.itemsize
            return bytes(storage.source.read(start, tensor.nbytes))
    return b"".join(tensor.chunks())


def named_chunks(name: str, tensor: Tensor) -> Iterator[Chunk]:
    """Yield the chunks of a tensor; an error that names no tensor gets this name."""
    try:
        yield from tensor.chunks()
    except BntoolError as error:
        error.tensor = error.tensor or name
        raise


def has_elements(tensor: Tensor) -> bool:
    """Return whether the file holds plain elements for it: it is not uninitialised, on meta, sparse or quantised."""
    return not isinstance(tensor, StoredTensor) or (tensor.storage is not None and tensor.wrapper is None)


def announce(tensors: Iterable[Tensor]) -> None:
    """Say that these tensors will be read soon; a file that is far away fetches them together."""
    wanted: dict[SourceFile, list[tuple[int, int]]] = {}
    for tensor in tensors:
        source = tensor.storage.source if isinstance(tensor, StoredTensor) and tensor.storage is not None else None
        if isinstance(source, SourceFile) and source.is_far and isinstance(tensor, StoredTensor):
            start, end = tensor.place
            wanted.setdefault(source, []).append((start, end - start))
    for source, ranges in wanted.items():
        source.announce(ranges)


def read_numbers(tensor: Tensor, *, name: str | None = None) -> Sequence[float]:
    """Return all elements of a tensor in C order as Python numbers, exactly.

    Args:
        name: what an error calls it.

    Raises:
        NoNumbersError: it has no plain elements, or those of its dtype are not single numbers.
    """
    try:
        return decode_numbers(read_bytes(tensor), tensor.dtype)
    except BntoolError as error:
        error.tensor = error.tensor or name
        raise


def read_number(tensor: Tensor, *, name: str) -> float:
    """Return the one element of a tensor, as a counter is.

    Raises:
        CorruptFileError: it has none, or several.
    """
    if count_elements(tensor.shape) != 1:
        raise CorruptFileError(
            f"it has the shape {describe_shape(tensor.shape)}, and is to hold one number", tensor=name
        )
    return read_numbers(tensor, name=name)[0]


def find_coarsest_spacing(tensors: Iterable[Tensor]) -> float:
    """Return the relative spacing of numbers in the coarsest floating dtype among tensors; 0 where none is floating."""
    return max((tensor.dtype.spacing for tensor in tensors), default=0.0)


def describe_shape(shape: Sequence[int]) -> str:
    """Return a shape as PyTorch prints it; of a hostile file's the first eight dimensions."""
    return f"[{', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''}]"


def equal_streams(a: Iterator[Chunk], b: Iterator[Chunk]) -> bool:
    """Return whether two runs of bytes are equal, however they are cut into pieces."""
    left: Chunk = b""
    right: Chunk = b""
    while True:
        left = left or next(a, b"")
        right = right or next(b, b"")
        if not left or not right:
            return not left and not right
        if len(left) == len(right):
            if left != right:
                return False
            left, right = b"", b""
            continue
        size = min(len(left), len(right))
        if left[:size] != right[:size]:
            return False
        left, right = left[size:], right[size:]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes of a file that one or more tensors view.

    Attributes:
        source: what to read from.
        offset, nbytes: where the bytes lie in ``source``.
        key: names the storage inside its file; two tensors with equal keys share memory.
        big_endian: byte order of the elements.
        device: the device tag that the file records, e.g. ``cpu`` or ``cuda:0``.
    """

    source: ByteSource = field(repr=False, compare=False)
    offset: int
    nbytes: int
    key: str
    big_endian: bool = False
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class StoredTensor(AsArray):
    """A tensor of a file: a strided view of a storage.

    Attributes:
        dtype, shape: as PyTorch uses the words.
        strides: in elements.
        storage_offset: in elements.
        storage: None where the file holds no bytes for it (meta tensors).
        requires_grad: as recorded; None where the format has no such notion.
        is_parameter: saved as ``torch.nn.Parameter``.
        wrapper: name of a subclass or of a layout that is not strided (``sparse_coo``, ``quantized``): such tensors are
            shown and passed through, never interpreted.
    """

    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    storage: Storage | None
    requires_grad: bool | None = None
    is_parameter: bool = False
    wrapper: str | None = None

    @property
    def numel(self) -> int:
        return count_elements(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.byte_count(self.numel)

    @property
    def is_contiguous(self) -> bool:
        expected = contiguous_strides(self.shape)
        return (
            self.strides == expected
            or self.numel == 0
            or all(
                extent == 1 or stride == wanted
                for extent, stride, wanted in zip(self.shape, self.strides, expected, strict=True)
            )
        )

    @property
    def overlaps_itself(self) -> bool:
        """Whether elements may share bytes (expanded and unfolded tensors), so that it cannot be set in place."""
        reach = 0
        for stride, extent in sorted(zip(self.strides, self.shape, strict=True)):
            if extent > 1:
                if stride <= reach:
                    return True
                reach += (extent - 1) * stride
        return False

    @property
    def byte_range(self) -> tuple[int, int]:
        """First byte and the byte after the last one that the tensor touches, within its storage."""
        start = self.storage_offset * self.dtype.itemsize
        last = 0
        for extent, stride in zip(self.shape, self.strides, strict=True):
            if extent == 0:
                return start, start
            last += (extent - 1) * stride
        return start, start + (self.dtype.byte_count(last + 1) or 1)

    @property
    def place(self) -> tuple[int, int]:
        """The range of :attr:`byte_range`, counted from the start of what the storage lies in."""
        assert self.storage is not None
        start, end = self.byte_range
        return self.storage.offset + start, self.storage.offset + end

    def check_bounds(self, name: str) -> None:
        """Check shape, strides and offset against the storage, in Python's unbounded integers.

        Raises:
            CorruptFileError: the tensor would reach outside of its storage.
        """
        shape, strides = self.shape, self.strides
        if len(shape) != len(strides):
            count = f"{len(strides)} stride" + "s" * (len(strides) != 1)
            raise CorruptFileError(f"shape {describe_shape(shape)} does not go with {count}", tensor=name)
        if shape and min(shape) < 0:
            raise CorruptFileError(f"impossible shape {describe_shape(self.shape)}", tensor=name)
        if math.prod(shape) >= 1 << 63:  # torch counts them in 64 bits
            raise CorruptFileError("the number of its elements takes more than 64 bits", tensor=name)
        if (strides and min(strides) < 0) or self.storage_offset < 0:
            raise CorruptFileError("negative stride or storage offset", tensor=name)
        if self.storage is None:
            return
        _, end = self.byte_range
        if end > self.storage.nbytes:
            raise CorruptFileError(
                f"the tensor needs {end} bytes of its storage, which has {self.storage.nbytes}", tensor=name
            )

    def chunks(self) -> Iterator[bytes]:
        storage = self.storage
        if storage is None or self.wrapper is not None:
            raise NoNumbersError(f"the file holds no plain elements for it ({self.wrapper or 'uninitialised or meta'})")
        start, end = self.byte_range
        if self.is_contiguous:
            unit = (
                (end - start) // self.shape[0] if self.shape and start < end else 0
            )  # whole rows, where they are short
            if not 0 < unit <= CHUNK:
                unit = self.dtype.itemsize
            step = CHUNK // unit * unit
            for position in range(start, end, step):
                data = storage.source.read(storage.offset + position, min(step, end - position))
                yield swap_bytes(data, self.dtype.swapsize) if storage.big_endian else data
            return
        expansion = self.nbytes - (end - start)
        runs = self.numel // max(self.shape)
        if expansion > MAX_EXPANSION * self.dtype.itemsize or (expansion > 0 and runs > MAX_RUNS):
            raise UnsafeFileError(
                f"shape {describe_shape(self.shape)} expands {end - start} stored bytes to {self.nbytes}"
            )
        gathered = self._gather(storage.source.read(storage.offset + start, end - start))
        for position in range(0, len(gathered), CHUNK):
            data = bytes(gathered[position : position + CHUNK])
            yield swap_bytes(data, self.dtype.swapsize) if storage.big_endian else data

    def _gather(self, span: bytes) -> bytearray:
        """Return the elements of a strided view in C order.

        They are copied in runs along the longest dimension, so that the number of runs stays small.
        """
        item, shape, strides = self.dtype.itemsize, self.shape, self.strides
        if item > 8:  # no view has elements this wide: take each for a pair
            shape, strides, item = (*shape, item // 8), (*(stride * item // 8 for stride in strides), 1), 8
        code = cast("Literal['B']", {1: "B", 2: "H", 4: "I", 8: "Q"}[item])
        gathered = bytearray(self.nbytes)
        source, target = memoryview(span).cast(code), memoryview(gathered).cast(code)
        longest = max(range(len(shape)), key=shape.__getitem__)
        places = contiguous_strides(shape)
        extent, stride, place = shape[longest], strides[longest], places[longest]
        others = shape[:longest] + shape[longest + 1 :]
        steps = [(strides[d], places[d]) for d in range(len(shape)) if d != longest]
        for index in itertools.product(*map(range, others)):
            first = sum(number * step for number, (step, _) in zip(index, steps, strict=True))
            where = sum(number * step for number, (_, step) in zip(index, steps, strict=True))
            run = source[first : first + (extent - 1) * stride + 1 : max(stride, 1)]
            if stride == 0:
                run = memoryview(run.tobytes() * extent).cast(code)
            target[where : where + (extent - 1) * place + 1 : place] = run
        return gathered


def swap_bytes(data: Chunk, item: int) -> bytes:
    """Reverse the bytes of each element."""
    swapped = bytearray(len(data))
    for index in range(item):
        swapped[index::item] = data[item - 1 - index :: item]
    return bytes(swapped)


@dataclass(frozen=True, slots=True)
class LiteralTensor(AsArray):
    """A small tensor given by its elements, C order, little endian."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @classmethod
    def from_numbers(cls, values: Sequence[float], *, dtype: DType, shape: tuple[int, ...]) -> LiteralTensor:
        """Round each number once into ``dtype``.

        Raises:
            OverflowError: a finite value is too large for ``dtype``.
        """
        return cls(dtype, shape, encode_numbers(values, dtype))

    def chunks(self) -> Iterator[bytes]:
        yield self.data
