"""Listing HDF5 files with h5py, without letting a file reach beyond itself.

h5py (libhdf5) reads the structure; elements that lie in one run are read by position like those of any other format.
The library gets the bytes through :class:`ByteStream` and never a path, so that it has nothing to open other files
by, and whatever names another file (external links, external storage, virtual datasets) is refused before it is used.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.containers.limits import limited_memory
from bntool.checkpoints.dtypes import BFLOAT16, BY_NAME, DType, NumberKind
from bntool.checkpoints.files import ByteSource, quote
from bntool.checkpoints.tensors import MAX_DIMENSIONS, Storage, StoredTensor, contiguous_strides, count_elements
from bntool.errors import BntoolError, CorruptFileError, MissingExtraError, UnsafeFileError

if TYPE_CHECKING:
    import h5py
    from typing_extensions import Buffer

MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_OBJECTS = 200_000
MAX_DEPTH = 64
MAX_ATTRIBUTES = 1000  # of one object
MAX_TEXT = 1 << 28  # of one attribute
MAX_TEXTS = 100_000
MAX_REFERENCES = 4096  # texts of any length in one attribute: what fits in the 64 KiB that Keras keeps to
_ROOM = 1 << 26  # bytes, beside those of the file, that reading such an attribute may take
MAX_DECODED = 1 << 28  # a compressed dataset that becomes larger is taken for a bomb
MAX_RATIO = 1100  # deflate cannot do better
_FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}  # built into h5py: no plugin is loaded
_HEAP = b"GCOL"
_ORDER_BIG = 1  # H5T_ORDER_BE

Attribute = str | tuple[str, ...]


@dataclass(frozen=True)
class Hdf5Contents:
    """The contents of a file.

    Attributes:
        groups: texts among the attributes of each group, by path; "" is the root.
        datasets: by path, in the order of the file's index.
        file: keeps it open as long as compressed datasets may be read.
    """

    groups: Mapping[str, Mapping[str, Attribute]]
    datasets: Mapping[str, StoredTensor]
    file: Any = field(default=None, repr=False, compare=False)

    def text(self, group: str, name: str) -> str | None:
        """Return a text attribute of a group; None where there is none."""
        value = self.groups.get(group, {}).get(name)
        return value if isinstance(value, str) else None

    def texts(self, group: str, name: str) -> tuple[str, ...] | None:
        """Return a list of texts, which Keras cuts into ``name0``, ``name1``, ... where it is long; None without
        one.
        """
        attributes = self.groups.get(group, {})
        whole = attributes.get(name)
        if isinstance(whole, tuple):
            return whole
        pieces: list[str] = []
        number = 0
        while isinstance(piece := attributes.get(f"{name}{number}"), tuple):
            pieces += piece
            number += 1
        return tuple(pieces) if number else None


class ByteStream(io.RawIOBase):
    """Bytes that are read by position, as the file object that h5py asks for."""

    def __init__(self, source: ByteSource) -> None:
        super().__init__()
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def _check_heap(self, offset: int) -> None:
        """Check a heap of texts against its size: where it does not add up, the library would never come to its end."""
        size = int.from_bytes(self._source.read(offset + 8, 8), "little")
        if not 4096 <= size <= self._source.size - offset:
            raise CorruptFileError(f"a heap of {size} bytes does not fit into this HDF5 file")
        data = self._source.read(offset, size)
        position = 16
        while position + 16 <= size:
            index, length = struct.unpack_from("<H6xQ", data, position)
            step = length if index == 0 else 16 + length + -length % 8
            if step < 16 or step > size - position:
                raise CorruptFileError("the objects of a heap in this HDF5 file do not add up to its size")
            position += step

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), max(self._source.size - self._position, 0))
        view[:length] = self._source.read(self._position, length) if length else b""
        if view[:4] == _HEAP:
            self._check_heap(self._position)
        view[length:] = bytes(len(view) - length)  # the library believes that it got all that it asked for
        self._position += length
        return length


def import_h5py() -> Any:
    """Return the library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError('reading HDF5 needs h5py: pip install "bntool[keras]"') from error
    return h5py


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Turn every exception that h5py raises on damaged bytes into one error of bntool.

    Raises:
        CorruptFileError
    """
    try:
        yield
    except (BntoolError, MemoryError):
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise CorruptFileError(f"this HDF5 file is damaged: {what}") from error


def read_hdf5(source: ByteSource) -> Hdf5Contents:
    """List the groups and datasets of a file, and the texts among the attributes of its groups.

    Raises:
        MissingExtraError: h5py is not installed.
        CorruptFileError: the library cannot make sense of it.
        UnsafeFileError: it names other files, goes in circles, or is built to exhaust memory.
    """
    library = import_h5py()
    if source.read(0, min(len(MAGIC), source.size)) != MAGIC:
        raise CorruptFileError("it does not begin as HDF5 files do")
    with named_errors():
        file = library.File(ByteStream(source), "r")
        return _Listing(source, file, library).contents()


class _Listing:
    def __init__(self, source: ByteSource, file: h5py.File, library: Any) -> None:
        self.source, self.file, self.h5py = source, file, library
        self.groups: dict[str, Mapping[str, Attribute]] = {}
        self.datasets: dict[str, StoredTensor] = {}
        self.addresses: set[int] = set()

    def contents(self) -> Hdf5Contents:
        self._list(self.file["/"], "", 0)
        self._check_overlaps()
        return Hdf5Contents(self.groups, self.datasets, self.file)

    def _check_overlaps(self) -> None:
        """Refuse datasets that lie over each other: who writes to one changes the other."""
        places = sorted(
            (tensor.storage.offset, tensor.storage.offset + tensor.storage.nbytes, path)
            for path, tensor in self.datasets.items()
            if tensor.storage is not None and tensor.storage.nbytes and tensor.storage.source is self.source
        )
        for (_, end, one), (start, _, other) in pairwise(places):
            if start < end:
                raise CorruptFileError(f"its elements lie where those of {quote(one)} are", tensor=other)

    def _list(self, group: h5py.Group, path: str, depth: int) -> None:
        self._visit(group, path, depth)
        self.groups[path] = self._read_attributes(group.id, path)
        h5py = self.h5py
        for name in group:
            where = f"{path}/{name}" if path else name
            if group.id.links.get_info(name.encode("utf-8")).type != h5py.h5l.TYPE_HARD:
                raise UnsafeFileError(
                    "the file holds a link to somewhere else, which neither Keras nor Caffe writes", tensor=where
                )
            one = group[name]
            if isinstance(one, h5py.Group):
                self._list(one, where, depth + 1)
            elif isinstance(one, h5py.Dataset):
                self._visit(one, where, depth)
                self.datasets[where] = self._read_dataset(one, where)

    def _visit(self, one: Any, path: str, depth: int) -> None:
        address = self.h5py.h5o.get_info(one.id).addr
        if address in self.addresses:
            raise UnsafeFileError("an object of the file has two names or holds itself", tensor=path)
        self.addresses.add(address)
        if len(self.addresses) > MAX_OBJECTS or depth > MAX_DEPTH:
            raise UnsafeFileError(f"the file has more than {MAX_OBJECTS} objects or {MAX_DEPTH} levels of groups")

    def _read_attributes(self, one: Any, path: str) -> dict[str, Attribute]:
        h5py = self.h5py
        count = h5py.h5a.get_num_attrs(one)
        if count > MAX_ATTRIBUTES:
            raise UnsafeFileError(f"an object of the file has {count} attributes", tensor=path)
        found: dict[str, Attribute] = {}
        for index in range(count):
            attribute = h5py.h5a.open(one, index=index)
            value = self._read_text(attribute)
            if value is not None:
                found[attribute.name.decode("utf-8", "replace")] = value
        return found

    def _read_text(self, attribute: Any) -> Attribute | None:
        """Return a text, or a list of texts; None for anything else, which is not read."""
        h5py = self.h5py
        kind, shape = attribute.get_type(), attribute.shape
        if kind.get_class() != h5py.h5t.STRING or len(shape) > 1:
            return None
        count = count_elements(shape)
        if count > MAX_TEXTS or attribute.get_storage_size() > min(MAX_TEXT, self.source.size):
            raise UnsafeFileError(f"an attribute claims {count} texts of {attribute.get_storage_size()} bytes")
        if kind.is_variable_str() and count > MAX_REFERENCES:
            raise UnsafeFileError(f"an attribute refers to {count} texts")
        if attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL:
            return () if shape else None
        import numpy as np

        value = np.empty(shape, dtype=kind.dtype)
        if kind.is_variable_str():
            with limited_memory(_ROOM + self.source.size):
                attribute.read(value)
        else:
            attribute.read(value, mtype=kind)
        texts = [_decode(item) for item in value.ravel().tolist()]
        return tuple(texts) if shape else texts[0]

    def _read_dataset(self, dataset: h5py.Dataset, path: str) -> StoredTensor:
        h5py = self.h5py
        plan = dataset.id.get_create_plist()
        layout = plan.get_layout()
        if plan.get_external_count() or layout not in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
            raise UnsafeFileError("the elements of this dataset lie in another file", tensor=path)
        shape = dataset.shape
        if shape is None or len(shape) > MAX_DIMENSIONS:
            raise CorruptFileError("a dataset without a shape", tensor=path)
        dtype, wrapper, big_endian = self._read_dtype(dataset, path)
        tensor = StoredTensor(dtype, shape, contiguous_strides(shape), 0, None, wrapper=wrapper)
        nbytes = dtype.byte_count(tensor.numel)
        if wrapper:
            return tensor
        if layout == h5py.h5d.CONTIGUOUS and (nbytes == 0 or dataset.id.get_storage_size()):
            if nbytes and (kept := dataset.id.get_storage_size()) != nbytes:
                raise CorruptFileError(f"{kept} bytes are kept for elements of {nbytes}", tensor=path)
            offset = dataset.id.get_offset() if nbytes else 0
            if offset is None or offset + nbytes > self.source.size:
                raise CorruptFileError("the elements lie beyond the end of the file: it is truncated", tensor=path)
            storage = Storage(self.source, offset, nbytes, key=path, big_endian=big_endian)
        else:
            unknown = [number for i in range(plan.get_nfilters()) if (number := plan.get_filter(i)[0]) not in _FILTERS]
            if unknown:
                wrapper = f"HDF5 filter {unknown[0]}"
                return StoredTensor(dtype, shape, tensor.strides, 0, None, wrapper=wrapper)
            stored = dataset.id.get_storage_size()
            if nbytes > MAX_DECODED or nbytes > MAX_RATIO * max(stored, 1024):
                raise UnsafeFileError(f"{stored} bytes claim to hold {nbytes}", tensor=path)
            storage = Storage(_Decoded(dataset, nbytes), 0, nbytes, key=path, big_endian=big_endian)
        return StoredTensor(dtype, shape, tensor.strides, 0, storage)

    def _read_dtype(self, dataset: h5py.Dataset, path: str) -> tuple[DType, str | None, bool]:
        """Return the element type, why elements cannot be read, and the byte order."""
        h5py = self.h5py
        kind = dataset.id.get_type()
        size, number = kind.get_size(), kind.get_class()
        big_endian = number in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) and kind.get_order() == _ORDER_BIG
        name = ""
        if number == h5py.h5t.OPAQUE and size == BFLOAT16.itemsize:  # numpy has no bfloat16: Keras says so beside it
            name = str(self._read_attributes(dataset.id, path).get("dtype", ""))
        elif number in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM):
            name = dataset.dtype.name
            if (exact := kind.dtype) is not None and exact.itemsize != size:
                name = ""
        dtype = BY_NAME.get(name)
        if dtype is None or dtype.itemsize != size:
            return _make_opaque(number, size), f"HDF5 class {number}", False
        return dtype, None, big_endian


@functools.cache
def _make_opaque(number: int, size: int) -> DType:
    """Return the type of elements that are shown and passed through: the same each time, since types are told by
    identity.
    """
    return DType(f"HDF5 class {number}", 8 * size, NumberKind.OPAQUE)


class _Decoded:
    """The elements of a dataset that is compressed, or kept with its header, decoded by h5py when they are read."""

    def __init__(self, dataset: h5py.Dataset, nbytes: int) -> None:
        self._dataset = dataset
        self.size = nbytes

    def read(self, offset: int, length: int) -> bytes:
        with named_errors():
            data = self._dataset[()].tobytes()
        if len(data) != self.size:
            raise CorruptFileError("a dataset holds another number of bytes than it says")
        part: bytes = data[offset : offset + length]
        return part


def _decode(item: object) -> str:
    data = item if isinstance(item, bytes) else str(item).encode("utf-8", "replace")
    return data.decode("utf-8", "replace")
