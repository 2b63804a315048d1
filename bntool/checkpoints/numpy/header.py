"""The header of a ``.npy`` file (numpy/lib/format.py): dtype, order and shape of the array behind it."""

from __future__ import annotations

import ast
import functools
from typing import NamedTuple

from bntool.checkpoints.dtypes import BY_NAME, NUMPY_CODES, DType, NumberKind
from bntool.checkpoints.tensors import MAX_DIMENSIONS, count_elements
from bntool.errors import CorruptFileError, UnsafeFileError

MAGIC = b"\x93NUMPY"
MAX_HEADER = 1 << 16  # numpy itself reads no more than 10000 characters of a file that is not trusted
_LONGEST = 10  # characters of a type
PREFIX = 12  # bytes before the header, at most
CODE_OF = {name: code for code, name in NUMPY_CODES.items()}


class Header(NamedTuple):
    """The fields of a header.

    Attributes:
        dtype: None for what is no number.
        shape: of the array.
        is_fortran: the first index changes fastest.
        big_endian: byte order of the elements.
        wrapper: what elements are that are not numbers of a known type; None where they are.
        size: bytes from the start to the elements.
    """

    dtype: DType | None
    shape: tuple[int, ...]
    is_fortran: bool
    big_endian: bool
    wrapper: str | None
    size: int


def find_length(start: bytes) -> int:
    """Return bytes of the prefix and the header, by the first 12 of the file.

    Raises:
        CorruptFileError: it does not begin as such files do.
        UnsafeFileError: the header is absurdly long.
    """
    if not start.startswith(MAGIC) or len(start) < PREFIX or not 1 <= start[6] <= 3:
        raise CorruptFileError("it does not begin as a .npy file does")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(start[8 : 8 + width], "little")
    if length > MAX_HEADER:
        raise UnsafeFileError(f"the header of an array claims {length} bytes")
    return 8 + width + length


def read_header(data: bytes) -> Header:
    """Return the header of a file, given all bytes up to its end.

    Raises:
        CorruptFileError: it is malformed.
    """
    start = 10 if data[6] == 1 else 12
    try:
        found = ast.literal_eval(data[start:].decode("latin-1" if data[6] < 3 else "utf-8").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, UnicodeDecodeError) as error:
        raise CorruptFileError("the header of the array is malformed") from error
    if not isinstance(found, dict) or found.keys() != {"descr", "fortran_order", "shape"}:
        raise CorruptFileError("the header of the array is malformed")
    shape, is_fortran = found["shape"], found["fortran_order"]
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS or not isinstance(is_fortran, bool):
        raise CorruptFileError("the header of the array is malformed")
    if not all(type(extent) is int and extent >= 0 for extent in shape) or count_elements(shape) >= 1 << 63:
        raise CorruptFileError("the header of the array has an impossible shape")
    dtype, big_endian, wrapper = _read_dtype(found["descr"])
    return Header(dtype, shape, is_fortran, big_endian, wrapper, len(data))


def _read_dtype(description: object) -> tuple[DType | None, bool, str | None]:
    if not isinstance(description, str):
        return None, False, "records"
    order, code = (description[:1], description[1:]) if description[:1] in "<>|=" else ("", description)
    name = NUMPY_CODES.get(code)
    if name is not None:
        return BY_NAME[name], order == ">", None
    if code[:1] == "O":
        return None, False, "objects"
    size = int(code[1:]) if code[1:].isascii() and code[1:].isdecimal() and len(code) < _LONGEST else 0
    if code[:1] != "V" or not size:
        return None, False, "texts or dates"
    return _make_opaque(f"numpy {code}", size * 8), False, f"numpy {code}"  # bfloat16 is saved as V2


@functools.cache
def _make_opaque(name: str, bits: int) -> DType:
    """Return the type of elements that are shown and passed through: the same each time, since types are told by
    identity.
    """
    return DType(name, bits, NumberKind.OPAQUE)


def write_header(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """Write a header of version 1.0, as numpy does: the elements begin at a multiple of 64 bytes."""
    order = "<" if dtype.kind is not NumberKind.BOOL and dtype.itemsize > 1 else "|"
    text = f"{{'descr': '{order}{CODE_OF[dtype.name]}', 'fortran_order': False, 'shape': {shape!r}, }}".encode(
        "latin-1"
    )
    padding = -(len(text) + 11) % 64
    return MAGIC + b"\x01\x00" + (len(text) + padding + 1).to_bytes(2, "little") + text + b" " * padding + b"\n"
