"""``.ckpt`` of MindSpore (mindspore/ccsrc/utils/checkpoint.proto): parameters by name, large ones in several pieces."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, Loader, LoadingCode, StateDict
from bntool.checkpoints.containers.protobufs.reading import Buffer, Message
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import JoinedSource, SourceFile, quote
from bntool.checkpoints.other_names import translate
from bntool.checkpoints.tensors import MAX_DIMENSIONS, Storage, StoredTensor, contiguous_strides, describe_shape
from bntool.errors import BntoolError, CorruptFileError, UnsafeFileError

_VALUE, _TAG, _TENSOR = 1, 1, 2
_DIMENSIONS, _TYPE, _CONTENT = 1, 2, 3
_TYPES = "Int8 UInt8 Int16 UInt16 Int32 UInt32 Int64 UInt64 Float16 Float32 Float64 Bool BFloat16".split()  # noqa: SIM905
_DTYPES = {name: name.lower() for name in _TYPES}
_START = re.compile(
    rb"\x0a[\x80-\xff]{0,9}[\x00-\x7f]\x0a[\x80-\xff]?[\x00-\x7f].{1,400}?\x12[\x80-\xff]{0,9}[\x00-\x7f]"
    rb"(?:\x08[\x80-\xff]{0,9}[\x00-\x7f])*\x12.(?:str|B?Float|U?Int|Bool)",
    re.DOTALL,
)
_CHECKSUM = b"crc_num"  # stands behind the message, before ten bytes with a CRC-32
_OPTIMIZER = ("moments", "moment1", "moment2", "accum", "stat", "vhat", "exp_avg", "exp_avg_sq")
_PROGRESS = {"epoch_num": "epoch", "step_num": "iteration"}
MAX_PARAMETERS = 1_000_000
CLASS = "mindspore.nn.BatchNorm"


@dataclass(frozen=True)
class Ending(Content):
    """The end of the message, and the CRC-32 of it that stands behind; None without one."""

    end: int
    crc: int | None


class Mindspore(Format):
    """Parameters of MindSpore; they are only read."""

    name = "mindspore"
    title = "MindSpore (.ckpt)"
    has_records = False
    is_pytorch = False
    loader = Loader.MINDSPORE
    loading = LoadingCode(("import mindspore", "parameters = mindspore.load_checkpoint({path})"))
    read_only = (
        "a checkpoint of MindSpore holds parameters without the graph that uses them and without eps: bntool inspects "
        "and compares it; export the model to ONNX (mindspore.export, file_format 'ONNX') and fold that"
    )

    def recognises(self, path: Location, head: bytes) -> bool:  # noqa: ARG002 (names say nothing)
        return _START.match(head) is not None

    def read(self, file: SourceFile) -> Checkpoint:
        ending = _find_end(file)
        pieces = _gather_pieces(Message(Buffer(file), 0, ending.end))
        tensors: dict[str, StoredTensor] = {}
        entries: dict[str, Any] = {}
        for name, found in pieces.items():
            try:
                tensor = _make_tensor(name, found, file)
            except BntoolError as error:
                error.tensor = error.tensor or name
                raise
            if tensor is None:
                entries[name] = "a text"
            elif name in _PROGRESS and not tensor.shape and not tensor.dtype.is_floating:
                entries[_PROGRESS[name]] = int.from_bytes(b"".join(tensor.chunks()), "little", signed=True)
            elif tensor.shape or "." in name:
                tensors[name] = tensor
            else:
                entries[name] = "a number"
        kept = {name: tensor for name, tensor in tensors.items() if not _is_of_optimizer(name, tensors)}
        if len(kept) < len(tensors):
            entries["optimizer"] = "left out"
        translation = translate({name: name.split(".") for name in kept}, kind=CLASS)
        named = {translation.names[name]: tensor for name, tensor in kept.items()}
        state_dict = StateDict("", "", named, modules=translation.modules, renamed=translation.names)
        return Checkpoint(file, self, (state_dict,) if named else (), entries=entries, content=ending)

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:  # noqa: ARG002 (of all alike)
        return ("parameters, no graph",)

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        ending = Ending.of(checkpoint)
        if ending.crc is None:
            return None
        from bntool.checkpoints.containers.zips.checksums import crc32  # listing a file does without

        crc = 0
        for chunk in checkpoint.file.chunks(0, ending.end):
            crc = crc32(chunk, crc)
        if crc != ending.crc:
            raise CorruptFileError("the checksum of the file differs: it is damaged")
        return 1


def _gather_pieces(message: Message) -> dict[str, list[Message]]:
    """Return the pieces of each parameter, which follow each other."""
    pieces: dict[str, list[Message]] = {}
    latest = ""
    for value in message.messages(_VALUE):
        tag, tensor = value.text(_TAG), value.message(_TENSOR)
        if tag != latest and tag in pieces:
            raise CorruptFileError("two parameters have this name", tensor=tag)
        if tensor is not None:  # else a map of numbers to rows
            pieces.setdefault(tag, []).append(tensor)
        latest = tag
    if len(pieces) > MAX_PARAMETERS:
        raise UnsafeFileError(f"the checkpoint holds {len(pieces)} parameters")
    return pieces


def _find_end(file: SourceFile) -> Ending:
    size = len(_CHECKSUM) + 10
    tail = file.read(file.size - size, size) if file.size > size else b""
    if not tail.startswith(_CHECKSUM):
        return Ending(file.size, None)
    return Ending(file.size - size, int.from_bytes(tail[len(_CHECKSUM) :], "big"))


def _is_of_optimizer(name: str, names: Mapping[str, StoredTensor]) -> bool:
    """Return whether it is what an optimizer keeps of a parameter: the name of that with a part before it."""
    first, _, rest = name.partition(".")
    return first in _OPTIMIZER and rest in names


def _make_tensor(name: str, pieces: Sequence[Message], file: SourceFile) -> StoredTensor | None:
    """Return a parameter; None for a text."""
    first = pieces[0]
    kind, shape = first.text(_TYPE), first.integers(_DIMENSIONS)
    if any((one.text(_TYPE), one.integers(_DIMENSIONS)) != (kind, shape) for one in pieces[1:]):
        raise CorruptFileError("the pieces of a parameter differ in shape or type")
    if kind == "str":
        return None
    if kind not in _DTYPES:
        raise CorruptFileError(f"a parameter has elements of an unknown type: {quote(kind)}")
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise CorruptFileError(f"impossible shape {describe_shape(shape)}")
    contents = [one.last(_CONTENT) for one in pieces]
    places = [(found.value_start, found.length) for found in contents if found is not None]
    source = JoinedSource(file, places)
    dtype = BY_NAME[_DTYPES[kind]]
    if shape == (0,) and source.size == dtype.itemsize:  # how MindSpore writes a number
        shape = ()
    tensor = StoredTensor(dtype, shape, contiguous_strides(shape), 0, Storage(source, 0, source.size, key=name))
    if tensor.nbytes != source.size:
        raise CorruptFileError(f"a parameter of {tensor.nbytes} bytes has {source.size} in the file")
    tensor.check_bounds(name)
    return tensor
