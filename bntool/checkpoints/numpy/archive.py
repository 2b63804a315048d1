"""``.npz``: a zip archive of arrays, as ``numpy.savez`` and ``numpy.savez_compressed`` write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, GlobalName, Loader, LoadingCode, StateDict
from bntool.checkpoints.containers.zips.reading import InflatedRecord, ZipArchive, ZipRecord, read_archive
from bntool.checkpoints.files import ByteSource, FileSlice, SourceFile, quote
from bntool.checkpoints.numpy.header import PREFIX, Header, find_length, read_header
from bntool.checkpoints.other_names import are_pytorch, translate
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import Storage, StoredTensor, contiguous_strides, count_elements
from bntool.errors import BntoolError, CorruptFileError, OtherFormatError, UnsafeFileError

_ENDING = ".npy"
MAX_ARRAYS = 1_000_000


@dataclass(frozen=True)
class ArraysContent(Content):
    """The archive, and in which of its records each array lies."""

    archive: ZipArchive
    records: Mapping[str, ZipRecord]


class NumpyArchive(Format):
    """Arrays under names of PyTorch."""

    name = "npz"
    title = "numpy (.npz)"
    has_records = False  # numpy.load gives every record of the archive as an array
    writer = "numpy.writing:write"
    loader = Loader.NUMPY
    loading = LoadingCode(
        ("import numpy", "import torch", "arrays = numpy.load({path})"),
        "{{n: torch.from_numpy(a) for n, a in arrays.items()}}",
    )

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        records = {name.removesuffix(_ENDING): one for name, one in archive.records.items() if name.endswith(_ENDING)}
        if not records:
            raise OtherFormatError("the archive holds no arrays of numpy")
        if len(records) > MAX_ARRAYS:
            raise UnsafeFileError(f"the archive holds {len(records)} arrays")
        others = {name: "a record that is no array" for name in archive.records if not name.endswith(_ENDING)}
        tensors: dict[str, StoredTensor] = {}
        entries: dict[str, Any] = {name: value for name, value in others.items() if len(name) < _LONG}
        found: list[GlobalName] = []
        for name, record in records.items():
            try:
                source = _open(archive, record)
                header = _read_start(archive, record, source)
                tensor = _make_tensor(name, header, source)
                if tensor is None:
                    found += _judge_objects(source, header.size) if header.wrapper == "objects" else ()
                    entries[name] = f"an array of {header.wrapper}"
                else:
                    tensors[name] = tensor
            except BntoolError as error:
                error.tensor = error.tensor or name
                raise
        names = list(tensors)
        content = ArraysContent(archive, records)
        if are_pytorch(names):
            state_dict = StateDict("", find_prefix(names), tensors)
            format_: Format = self
        else:
            translation = translate({name: name.split("/" if "/" in name else ".") for name in names})
            tensors = {translation.names[name]: tensor for name, tensor in tensors.items()}
            state_dict = StateDict("", "", tensors, modules=translation.modules, renamed=translation.names)
            format_ = OtherNumpyArchive()
        return Checkpoint(
            file=file,
            format=format_,
            state_dicts=(state_dict,) if tensors else (),
            entries=entries,
            globals=tuple(dict.fromkeys(found)),
            content=content,
        )

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        return ArraysContent.of(checkpoint).archive.check_records()


class OtherNumpyArchive(NumpyArchive):
    """Arrays under names of TensorFlow, Keras or JAX, which also order dimensions otherwise."""

    is_pytorch = False
    read_only = (
        "these arrays have names of TensorFlow, Keras or JAX, and the layouts of these: bntool inspects and compares "
        "them; load them into their model and save that, or give the arrays PyTorch's names and layouts"
    )

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:  # noqa: ARG002 (of all alike)
        return ("names of another framework",)


_LONG = 1000  # characters of a name


def _open(archive: ZipArchive, record: ZipRecord) -> ByteSource:
    if record.is_deflated:
        return InflatedRecord(archive, record)
    return FileSlice(archive.file, offset=record.data_offset, length=record.size)


def _read_start(archive: ZipArchive, record: ZipRecord, source: ByteSource) -> Header:
    """Return the header of an array; of a deflated one no more is inflated than that."""
    if record.size < PREFIX:
        raise CorruptFileError("it does not begin as a .npy file does")
    if not record.is_deflated:
        length = find_length(source.read(0, PREFIX))
        return read_header(source.read(0, length))
    length = find_length(archive.read_start(record, PREFIX))
    return read_header(archive.read_start(record, length))


def _make_tensor(name: str, header: Header, source: ByteSource) -> StoredTensor | None:
    """Return the array as a tensor; None for what is no number."""
    if header.dtype is None:
        return None
    shape, nbytes = header.shape, header.dtype.byte_count(count_elements(header.shape))
    strides = contiguous_strides(shape[::-1])[::-1] if header.is_fortran else contiguous_strides(shape)
    if header.wrapper is not None:
        return StoredTensor(header.dtype, shape, strides, 0, None, wrapper=header.wrapper)
    if header.size + nbytes != source.size:
        raise CorruptFileError(f"array {quote(name)} of {nbytes} bytes has {source.size - header.size} in the archive")
    storage = Storage(source, header.size, nbytes, key=name, big_endian=header.big_endian)
    return StoredTensor(header.dtype, shape, strides, 0, storage)


def _judge_objects(source: ByteSource, offset: int) -> tuple[GlobalName, ...]:
    """Find what unpickling an array of objects would use; numpy.load does that only under allow_pickle."""
    from bntool.checkpoints.containers.pickles.reading import read_pickle  # only arrays of objects need it
    from bntool.checkpoints.containers.pickles.trust import list_globals

    return list_globals(read_pickle(source, offset=offset))
