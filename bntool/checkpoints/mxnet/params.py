"""``.params`` of MXNet (src/ndarray/ndarray.cc): arrays one after the other, and then their names."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Format, Loader, LoadingCode, StateDict
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.other_names import translate
from bntool.checkpoints.tensors import MAX_DIMENSIONS, Storage, StoredTensor, contiguous_strides
from bntool.errors import CorruptFileError, UnsafeFileError

MAGIC = struct.pack("<QQ", 0x112, 0)
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # of an array; older ones begin with their number of dimensions
_DTYPES = {
    0: "float32", 1: "float64", 2: "float16", 3: "uint8", 4: "int32", 5: "int8", 6: "int64", 7: "bool", 8: "int16",
    9: "uint16", 10: "uint32", 11: "uint64", 12: "bfloat16",
}  # fmt: skip
MAX_ARRAYS = 1_000_000
_MAX_NAME = 1000
_SPLIT = re.compile(r"(.+?)[._](gamma|beta|(?:moving|running)_(?:mean|var)|weight|bias)")
CLASS = "mxnet.gluon.nn.BatchNorm"


class Mxnet(Format):
    """Arrays of MXNet; they are only read."""

    name = "mxnet"
    title = "MXNet (.params)"
    has_records = False
    is_pytorch = False
    loader = Loader.MXNET
    loading = LoadingCode(("import mxnet", "arrays = mxnet.nd.load({path})"))
    read_only = (
        "a file of MXNet holds arrays alone: eps, and whether gamma counts (fix_gamma), stand in the -symbol.json or "
        "in code, which are not read: bntool inspects and compares it; export the model to ONNX and fold that"
    )

    def recognises(self, path: Location, head: bytes) -> bool:  # noqa: ARG002 (names say nothing)
        return head.startswith(MAGIC)

    def read(self, file: SourceFile) -> Checkpoint:
        reader = _Reader(file, len(MAGIC))
        count = reader.take_count("arrays")
        arrays = [reader.read_array() for _ in range(count)]
        names = [reader.take_name() for _ in range(reader.take_count("names"))]
        if reader.position != file.size:
            raise CorruptFileError(f"{file.size - reader.position} bytes stand behind the arrays")
        if names and len(names) != count:
            raise CorruptFileError(f"the file holds {count} arrays and {len(names)} names")
        names = names or [str(number) for number in range(count)]
        if len(set(names)) < count:
            raise CorruptFileError("two arrays of the file have one name")
        found = {name: tensor for name, tensor in zip(names, arrays, strict=True) if tensor is not None}
        plain = {name: name.removeprefix("arg:").removeprefix("aux:") for name in found}
        translation = translate({name: _split(text) for name, text in plain.items()}, kind=CLASS)
        tensors = {translation.names[name]: tensor for name, tensor in found.items()}
        state_dict = StateDict("", "", tensors, modules=translation.modules, renamed=translation.names)
        return Checkpoint(file, self, (state_dict,) if tensors else ())

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:  # noqa: ARG002 (of all alike)
        return ("arrays without their symbol",)


def _split(name: str) -> tuple[str, ...]:
    """Return the layer and the role: Gluon joins them by a dot, symbols by an underscore."""
    found = _SPLIT.fullmatch(name)
    return (found[1], found[2]) if found is not None else (name,)


class _Reader:
    def __init__(self, file: SourceFile, position: int) -> None:
        self._file = file
        self.position = position

    def _take(self, layout: str) -> tuple[int, ...]:
        size = struct.calcsize(layout)
        values = struct.unpack(layout, self._file.read(self.position, size))
        self.position += size
        return values

    def take_count(self, what: str) -> int:
        (count,) = self._take("<Q")
        if count > MAX_ARRAYS:
            raise UnsafeFileError(f"the file claims to hold {count} {what}")
        return count

    def take_name(self) -> str:
        (length,) = self._take("<Q")
        if length > _MAX_NAME:
            raise UnsafeFileError(f"the name of an array has {length} bytes")
        data = self._file.read(self.position, length)
        self.position += length
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFileError("the name of an array is no UTF-8") from error

    def read_array(self) -> StoredTensor | None:
        """Return one array; None for one that was never given a value."""
        (magic,) = self._take("<I")
        if magic in (_V2, _V3):
            (storage_type,) = self._take("<i")
            if storage_type != 0:
                raise CorruptFileError("a sparse array of MXNet is not read", remedy="save it dense")
        shape = self._take_shape(magic)
        if shape is None:
            return None
        _, _, kind = self._take("<iii")  # the device comes first
        name = _DTYPES.get(kind)
        if name is None:
            raise CorruptFileError(f"an array of MXNet has elements of an unknown type: {kind}")
        dtype = BY_NAME[name]
        tensor = StoredTensor(dtype, shape, contiguous_strides(shape), 0, None)
        storage = Storage(self._file, self.position, tensor.nbytes, key=str(self.position))
        if self.position + tensor.nbytes > self._file.size:
            raise CorruptFileError(f"an array of MXNet needs {tensor.nbytes} bytes beyond the end of the file")
        self.position += tensor.nbytes
        tensor = StoredTensor(dtype, shape, tensor.strides, 0, storage)
        tensor.check_bounds("")
        return tensor

    def _take_shape(self, magic: int) -> tuple[int, ...] | None:
        (count,) = (magic,) if magic not in (_V1, _V2, _V3) else self._take("<i" if magic == _V3 else "<I")
        if count < 0 or (count == 0 and magic != _V3):
            return None
        if count > MAX_DIMENSIONS:
            raise CorruptFileError(f"an array of MXNet claims {count} dimensions")
        shape = self._take(f"<{count}{'I' if magic not in (_V1, _V2, _V3) else 'q'}")
        if min(shape, default=0) < 0:
            raise CorruptFileError("an array of MXNet has an impossible shape")
        return shape
