"""The pieces of tensors in the files of torch.distributed.checkpoint: each is what torch.save writes for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bntool.checkpoints.containers.pickles.reading import OpcodeBudget, Pickle, read_pickle_bytes
from bntool.checkpoints.containers.zips.reading import read_archive
from bntool.checkpoints.dtypes import DType
from bntool.checkpoints.files import FileSlice, SourceFile, quote
from bntool.checkpoints.safetensors.sharded import check_inside
from bntool.checkpoints.tensors import Storage, StoredTensor, contiguous_strides, count_elements, read_bytes
from bntool.checkpoints.torch.tensors import TensorReader
from bntool.checkpoints.torch.zip import MAX_PICKLE, ArchiveLayout, find_layout, resolve_storage
from bntool.errors import BntoolError, CorruptFileError, UnsafeFileError

MAX_PIECES = 10_000  # of one tensor
_SMALL_PICKLE, _KEPT = 1024, 1024  # bytes of a pickle that is kept, and how many are
MAX_GRID = 512  # pieces that are cut along other dimensions than the first


@dataclass(frozen=True, slots=True)
class Item:
    """The place of a tensor's piece or an object: a run of bytes in a file of the folder.

    Attributes:
        is_transformed: compressed or otherwise changed by an extension.
    """

    file: str
    offset: int
    length: int
    is_transformed: bool = False


class FolderReader:
    """Opens the files of a folder when they are needed, one at a time: there is one for each process that saved."""

    def __init__(self, metadata: SourceFile) -> None:
        self._metadata = metadata
        self._name = ""
        self._file: SourceFile | None = None
        self._first: dict[str, SourceFile] = {}  # as each was when it was opened first; closed again
        self._sizes: dict[str, int] = {}
        self._objects = OpcodeBudget()
        self._latest: tuple[Item, tuple[ArchiveLayout, Pickle]] | None = None  # a tensor is read a chunk at a time
        self._pickles: dict[bytes, Pickle] = {}  # of tensors: those of one shape and dtype are the same

    def check(self, item: Item) -> None:
        """Refuse a run of bytes that lies outside of its file, or in no file of the folder.

        Raises:
            UnsafeFileError, CorruptFileError, UnreadableFileError
        """
        if item.file not in self._sizes:
            self._sizes[item.file] = self._open(item.file).size
        if item.offset < 0 or item.length < 0 or item.offset + item.length > self._sizes[item.file]:
            raise CorruptFileError(f"{quote(item.file)} is shorter than the metadata says: it is truncated")

    def open(self, item: Item, budget: OpcodeBudget | None = None) -> tuple[ArchiveLayout, Pickle]:
        """Return the archive of an item and its pickle.

        Args:
            item: a tensor or an object.
            budget: what objects may cost together; None for a tensor.
        """
        if self._latest is not None and self._latest[0] == item:
            return self._latest[1]
        archive = read_archive(FileSlice(self._open(item.file), offset=item.offset, length=item.length))
        layout = find_layout(archive)
        record = archive.records[f"{layout.root}data.pkl"]
        if record.size > MAX_PICKLE:
            raise UnsafeFileError(
                f"a pickle in {quote(item.file)} has {record.size} bytes, above the limit of {MAX_PICKLE}"
            )
        data = archive.read(record)
        pickle = self._pickles.get(data) if budget is None else None
        if pickle is None:
            pickle = read_pickle_bytes(data, budget=budget)
            if len(data) <= _SMALL_PICKLE and len(self._pickles) < _KEPT:
                self._pickles[data] = pickle
        self._latest = item, (layout, pickle)
        return self._latest[1]

    def read_object(self, item: Item) -> Pickle:
        """Return the pickle of an object."""
        self.check(item)
        return self.open(item, self._objects)[1]

    def _open(self, name: str) -> SourceFile:
        if self._file is None or self._name != name:
            check_inside(self._metadata.folder, name, named_by="the metadata")
            self._latest = None
            if self._file is not None:
                self._file.check_unchanged()
                self._file.close()
            self._file, self._name = self._metadata.folder.open(name, named_by=self._metadata.path), name
            self._file.check_same(self._first.setdefault(name, self._file))
        return self._file

    def check_unchanged(self) -> None:
        """Make sure that no file was changed since it was read.

        Raises:
            UnreadableFileError: one was changed.
        """
        for name in list(self._first):
            self._open(name).check_unchanged()


class Piece:
    """A rectangular part of a tensor; its place in the file is looked up when it is read.

    Attributes:
        offsets, sizes: of the part in the whole tensor.
    """

    def __init__(
        self, folder: FolderReader, item: Item, dtype: DType, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> None:
        self._folder = folder
        self.item = item
        self._dtype = dtype
        self.offsets = offsets
        self.sizes = sizes

    @property
    def size(self) -> int:
        return self._dtype.byte_count(count_elements(self.sizes))

    def check(self) -> None:
        self._folder.check(self.item)
        if self.size > self.item.length and not self.item.is_transformed:
            raise CorruptFileError(f"{self.item.length} bytes of {quote(self.item.file)} cannot hold {self.size}")

    def read(self, offset: int, length: int) -> bytes:
        tensor = self._find()
        storage = tensor.storage
        if storage is not None and tensor.is_contiguous and not storage.big_endian:
            return storage.source.read(storage.offset + tensor.byte_range[0] + offset, length)
        return read_bytes(tensor)[offset : offset + length]

    def _find(self) -> StoredTensor:
        layout, pickle = self._folder.open(self.item)
        tensor = TensorReader(lambda reference: resolve_storage(layout, reference)).read(pickle.root)
        if tensor is None or tensor.wrapper or tensor.dtype is not self._dtype or tensor.shape != self.sizes:
            raise CorruptFileError(f"{quote(self.item.file)} holds something else than the metadata says")
        return tensor


class _Rows:
    """Pieces one after the other along the first dimension."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self.size = sum(piece.size for piece in pieces)

    def read(self, offset: int, length: int) -> bytes:
        parts, start = [], 0
        for piece in self._pieces:
            first, end = max(offset, start), min(offset + length, start + piece.size)
            if first < end:
                parts.append(piece.read(first - start, end - first))
            start += piece.size
        return b"".join(parts)


class _Grid:
    """Pieces cut along any dimensions; put together in memory when they are read."""

    def __init__(self, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: DType) -> None:
        self._pieces = pieces
        self._shape = shape
        self._item = dtype.itemsize
        self.size = dtype.byte_count(count_elements(shape))

    def read(self, offset: int, length: int) -> bytes:
        whole = bytearray(self.size)
        strides = contiguous_strides(self._shape)
        for piece in self._pieces:
            data, row = piece.read(0, piece.size), piece.sizes[-1] * self._item
            for number in range(len(data) // row if row else 0):
                place, rest = 0, number
                for extent, start, stride in zip(
                    piece.sizes[-2::-1], piece.offsets[-2::-1], strides[-2::-1], strict=True
                ):
                    rest, index = divmod(rest, extent)
                    place += (start + index) * stride
                at = (place + piece.offsets[-1]) * self._item
                whole[at : at + row] = data[number * row : (number + 1) * row]
        return bytes(whole[offset : offset + length])


def assemble(name: str, dtype: DType, shape: tuple[int, ...], pieces: Sequence[Piece]) -> StoredTensor:
    """Return the tensor that the pieces cover exactly.

    Raises:
        CorruptFileError: they overlap, leave a hole or reach outside.
        UnsafeFileError: there are absurdly many.
    """
    strides = contiguous_strides(shape)
    if any(piece.item.is_transformed for piece in pieces) or dtype.bits % 8:
        return StoredTensor(dtype, shape, strides, 0, None, wrapper="compressed")
    try:
        for piece in pieces:
            piece.check()
        source = _join(dtype, shape, sorted(pieces, key=lambda piece: piece.offsets))
    except BntoolError as error:
        error.tensor = error.tensor or name
        raise
    return StoredTensor(dtype, shape, strides, 0, Storage(source, 0, source.size, name))


def _join(dtype: DType, shape: tuple[int, ...], pieces: Sequence[Piece]) -> _Rows | _Grid:
    if len(pieces) > MAX_PIECES:
        raise UnsafeFileError(f"the tensor is cut into {len(pieces)} pieces, above the limit of {MAX_PIECES}")
    within = all(o + s <= e for p in pieces for o, s, e in zip(p.offsets, p.sizes, shape, strict=True))
    if not within or sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
        raise CorruptFileError("the pieces of this tensor do not cover it")
    filled = [piece for piece in pieces if math.prod(piece.sizes)]
    if all(piece.sizes[1:] == shape[1:] for piece in filled):
        end = 0
        for piece in filled if shape else ():
            if piece.offsets[0] != end:
                raise CorruptFileError("the pieces of this tensor overlap")
            end += piece.sizes[0]
        return _Rows(filled)
    if len(filled) > MAX_GRID:
        raise UnsafeFileError(
            f"the tensor is cut into {len(filled)} pieces along several dimensions, above the limit of {MAX_GRID}"
        )
    for index, piece in enumerate(filled):
        if any(_overlap(piece, other) for other in filled[:index]):
            raise CorruptFileError("the pieces of this tensor overlap")
    return _Grid(filled, shape, dtype)


def _overlap(one: Piece, other: Piece) -> bool:
    return all(
        a < b + other_size and b < a + size
        for a, size, b, other_size in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
