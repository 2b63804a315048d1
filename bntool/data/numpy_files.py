"""Arrays in .npy and .npz files, mapped rather than read, and never unpickled."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from bntool.checkpoints.files import describe_failure
from bntool.data.rows import ArrayRows, Rows, UnusableRows
from bntool.errors import CorruptFileError, UnreadableFileError, UsageError

Array: TypeAlias = "np.ndarray[Any, Any]"

_BROKEN = (ValueError, TypeError, zipfile.BadZipFile, EOFError, KeyError, OverflowError, struct.error)


def open_numpy(path: Path) -> Mapping[str, Rows]:
    """Return the arrays of a file by name; the one of a .npy file is called ``images``.

    Arrays of an .npz that are not compressed are mapped; compressed ones are unpacked into memory. Arrays of anything
    but plain numbers (text, Python objects) cannot be read.

    Raises:
        UnreadableFileError, CorruptFileError: the system does not give the file, or numpy cannot read it.
        UsageError: no array holds plain numbers.
    """
    try:
        found = {"images": _map_file(path)} if path.suffix.lower() == ".npy" else _open_archive(path)
    except OSError as error:
        raise UnreadableFileError(describe_failure(error), path=path) from error
    except MemoryError as error:
        raise UnreadableFileError("there is not enough memory to unpack it", path=path) from error
    except _BROKEN as error:
        raise CorruptFileError(f"numpy cannot read it: {' '.join(str(error).split())}", path=path) from error
    arrays = {key: _take_rows(array) for key, array in found.items()}
    if found and all(isinstance(rows, UnusableRows) for rows in arrays.values()):
        key, rows = next(iter(arrays.items()))
        assert isinstance(rows, UnusableRows)
        raise UsageError(rows.explain(key), path=path)
    return arrays


def _take_rows(array: Array) -> Rows:
    if _holds_numbers(array.dtype):
        return ArrayRows(array)
    what = "Python objects, which are not read: that would run code" if array.dtype.hasobject else f"{array.dtype}"
    return UnusableRows(array.shape, what)


def read_array(content: bytes) -> Array:
    """Return the array of a .npy file that is in memory.

    Raises:
        ValueError: it is none, is cut off, or holds something else than plain numbers.
    """
    length = 2 if content[6:7] == b"\1" else 4  # bytes of the number that says how long the header is
    start = 8 + length + int.from_bytes(content[8 : 8 + length], "little")
    # of many small arrays parsing the header would take longer than all else
    shape, fortran_order, dtype = _parse_header(content[:start])
    if not _holds_numbers(dtype):
        raise ValueError(f"it holds {dtype}; plain numbers are needed")
    array: Array = np.ndarray(shape, dtype, content, start, order="F" if fortran_order else "C")
    return array


@functools.lru_cache(maxsize=256)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        return _read_header(io.BytesIO(header))
    except _BROKEN as error:
        raise ValueError(f"numpy cannot read it: {' '.join(str(error).split())}") from error


def _holds_numbers(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fiub" and dtype.itemsize <= 8


def _map_file(path: Path) -> Array:
    with path.open("rb") as stream:
        return _map(path, stream)


def _open_archive(path: Path) -> dict[str, Array]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            if info.compress_type == zipfile.ZIP_STORED:
                with path.open("rb") as stream:
                    stream.seek(info.header_offset + 26)
                    name_length, extra_length = struct.unpack("<HH", stream.read(4))
                    stream.seek(name_length + extra_length, 1)
                    array = _map(path, stream)
            else:
                with archive.open(info) as member:
                    array = _unpack(member)
            arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def _map(path: Path, stream: Any) -> Array:
    """Return the array whose header the stream is at, mapped."""
    shape, fortran_order, dtype = _read_header(stream)
    if dtype.hasobject or 0 in shape:
        return np.empty(shape if 0 in shape else (0,), dtype)
    order: Literal["C", "F"] = "F" if fortran_order else "C"
    mapped: Array = np.memmap(path, dtype=dtype, mode="r", offset=stream.tell(), shape=shape, order=order)
    return mapped


def _unpack(stream: Any) -> Array:
    shape, fortran_order, dtype = _read_header(stream)
    if dtype.hasobject:
        return np.empty((0,), dtype)
    data = stream.read()
    order: Literal["C", "F"] = "F" if fortran_order else "C"
    array: Array = np.ndarray(shape, dtype, bytearray(data), order=order)
    return array


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"version {version[0]}.{version[1]} of the format is not known")
