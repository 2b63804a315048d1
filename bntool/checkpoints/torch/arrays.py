"""Recognising numpy arrays in the nodes of a pickle, alone or among the tensors that torch wrote."""

from __future__ import annotations

from bntool.checkpoints.containers.pickles.nodes import (
    Global,
    Instance,
    LongBytes,
    Node,
    text_of,
)
from bntool.checkpoints.dtypes import BY_NAME, NUMPY_CODES, DType
from bntool.checkpoints.files import ByteSource, MemorySource, quote
from bntool.checkpoints.tensors import (
    MAX_DIMENSIONS,
    Storage,
    StoredTensor,
    contiguous_strides,
    count_elements,
)
from bntool.checkpoints.torch.tensors import StorageReference, TensorReader
from bntool.errors import CorruptFileError

RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
_TUPLES = ("builtins.tuple", "__builtin__.tuple")
_ARRAY_KEY = "array "  # what the keys of the storages of arrays begin with; torch's own are numbers


class ArrayReader(TensorReader):
    """Turns the nodes of numpy arrays into tensors too; their elements stay where they are."""

    def _rebuild(self, node: Instance) -> StoredTensor | None:
        path = node.path
        if path in RECONSTRUCT:
            state = node.state
            if not _is_class_of_numpy(node.arguments[0]):
                return None  # classes of others have states of their own
            if not isinstance(state, tuple) or len(state) != 5 or not isinstance(node.arguments, tuple):
                raise CorruptFileError("a numpy array of the pickle is malformed")
            _, shape, dtype, is_fortran, data = state
            return self._array(node, shape, dtype, data, is_fortran=bool(is_fortran))
        if path in FROM_BUFFER and isinstance(node.arguments, tuple):
            data, dtype, shape, order = node.arguments
            return self._array(node, shape, dtype, data, is_fortran=order == "F")
        if path in _TUPLES and isinstance(node.arguments, tuple) and len(node.arguments) == 1:
            pair = node.arguments[0]  # (name, array), as Paddle saves a tensor outside of a state dict
            if isinstance(pair, tuple) and len(pair) == 2 and text_of(pair[0]) is not None:
                return self.read(pair[1])
            return None
        return super()._rebuild(node)

    def _storage(self, reference: StorageReference) -> Storage:
        if reference.key.startswith(_ARRAY_KEY):
            raise CorruptFileError(f"no storage of torch is named {quote(reference.key)}")
        return super()._storage(reference)

    def _array(
        self, node: Instance, shape: Node, dtype_node: Node, data: Node, *, is_fortran: bool
    ) -> StoredTensor | None:
        found = _read_dtype(dtype_node)
        if found is None:
            return None  # texts, records, objects
        dtype, big_endian = found
        if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS or not all(map(_is_extent, shape)):
            raise CorruptFileError("a numpy array of the pickle is malformed: shape")
        source, offset, length = _locate(data)
        if length != dtype.byte_count(count_elements(shape)):
            raise CorruptFileError(f"a numpy array of {dtype} has {length} bytes, which do not fit its shape")
        key = f"{_ARRAY_KEY}{len(self.array_nodes)}"
        self.array_nodes[key] = node
        strides = contiguous_strides(shape[::-1])[::-1] if is_fortran else contiguous_strides(shape)
        storage = Storage(source, offset, length, key, big_endian=big_endian)
        return StoredTensor(dtype, shape, strides, 0, storage)


def _is_class_of_numpy(node: Node) -> bool:
    return isinstance(node, Global) and node.path.startswith("numpy.")


def _is_extent(value: Node) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _read_dtype(node: Node) -> tuple[DType, bool] | None:
    """Return the element type and whether it is big endian; None for what is no number."""
    if not isinstance(node, Instance) or node.path != "numpy.dtype" or not isinstance(node.arguments, tuple):
        return None
    code = text_of(node.arguments[0]) if node.arguments else None
    name = NUMPY_CODES.get(code or "")
    if name is None:
        return None
    state = node.state
    order = text_of(state[1]) if isinstance(state, tuple) and len(state) > 1 else None
    return BY_NAME[name], order == ">"


class _EncodedText:
    """Bytes that a pickle holds as a text, one character for each; many arrays can share one, so none is made early."""

    def __init__(self, text: str) -> None:
        self._text = text

    @property
    def size(self) -> int:
        return len(self._text)

    def read(self, offset: int, length: int) -> bytes:
        try:
            return self._text[offset : offset + length].encode("latin-1")
        except UnicodeEncodeError as error:
            raise CorruptFileError("the bytes of a numpy array are malformed") from error


def _locate(data: Node) -> tuple[ByteSource, int, int]:
    """Find where the bytes of an array lie."""
    if isinstance(data, LongBytes):
        return data.source, data.offset, data.length
    if isinstance(data, bytes | bytearray):
        return MemorySource(data), 0, len(data)
    if isinstance(data, Instance) and data.path == "_codecs.encode" and isinstance(data.arguments, tuple):
        text, encoding = data.arguments  # how Python 3 writes bytes with protocols 0 to 2
        if text_of(encoding) in ("latin1", "latin-1") and isinstance(text, str):
            return _EncodedText(text), 0, len(text)
    if isinstance(data, Instance) and data.path in ("builtins.bytes", "__builtin__.bytes") and data.arguments == ():
        return MemorySource(b""), 0, 0
    raise CorruptFileError("the bytes of a numpy array are malformed")
