"""The .pt2 archives of torch.export.save: raw storages beside JSON that describes tensors and the graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bntool.checkpoints.checkpoint import (
    Checkpoint,
    Format,
    GlobalName,
    GlobalTrust,
    LoadingCode,
    ModuleInfo,
    StateDict,
)
from bntool.checkpoints.containers.json_texts import read_json
from bntool.checkpoints.containers.pickles.reading import OpcodeBudget
from bntool.checkpoints.containers.pickles.trust import merge_globals
from bntool.checkpoints.containers.zips.reading import InflatedRecord, ZipArchive, ZipRecord, read_archive
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import FileSlice, FileView, SourceFile, quote
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import MAX_DIMENSIONS, Storage, StoredTensor, Tensor
from bntool.checkpoints.torch.nested import list_nested_globals
from bntool.checkpoints.torch.zip import ArchiveLayout, check_case, is_big_endian, read_loose_records
from bntool.checkpoints.torch_programs.exported_graph import read_batchnorms
from bntool.checkpoints.torch_programs.torchscript import RECORD_NAME, find_root
from bntool.errors import CorruptFileError, OtherFormatError, UnsafeFileError

MAX_JSON = 1 << 28
_CONFIG = "_weights_config.json"
_STRIDED = 7  # torch._export.serde.schema.Layout
# torch._export.serde.schema.ScalarType
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip


class ExportedProgram(Format):
    """An archive of torch.export.save since torch 2.8; only elements of its tensors change."""

    name = "exported-program"
    title = "torch.export (.pt2)"
    only_values = True
    writer = "torch_programs.exported_writing:write"
    holds_code = True
    loading = LoadingCode(("import torch", "model = torch.export.load({path}).module()  # runs code of the file"))

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        root = _find_root(archive)
        check_case(archive.records)
        layout = ArchiveLayout(archive, root, is_big_endian(archive, root), RECORD_NAME)
        start = f"{root}data/weights/"
        names = [n[len(start) : -len(_CONFIG)] for n in archive.records if n.startswith(start) and n.endswith(_CONFIG)]
        state_dicts = tuple(_read_model(layout, name, only=len(names) == 1) for name in names)
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=tuple(state_dict for state_dict in state_dicts if state_dict.tensors),
            entries={"models": len(names)},
            globals=_list_globals(archive, root),
            records=read_loose_records(layout),
            content=layout,
        )

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        return ArchiveLayout.of(checkpoint).archive.check_records()


def _list_globals(archive: ZipArchive, root: str) -> tuple[GlobalName, ...]:
    """Find what loading the programs would import or call: torch unpickles constants, example inputs and some
    weights.
    """
    budget = OpcodeBudget()
    found: list[GlobalName] = []
    for name, record in archive.records.items():
        folder = name.removeprefix(f"{root}data/").partition("/")[0]
        if not name.startswith(f"{root}data/") or record.size < 4 or name.endswith(".json"):
            continue
        if record.is_deflated:
            file: SourceFile = FileView(InflatedRecord(archive, record), like=archive.file)
        else:
            file = FileSlice(archive.file, offset=record.data_offset, length=record.size)
        head = file.read(0, 4)
        if head == b"PK\3\4" or (head[0] == 0x80 and head[1] <= 5):
            try:
                found += list_nested_globals(file, budget)
            except (CorruptFileError, OtherFormatError, UnsafeFileError):
                if folder != "weights":  # whose elements may begin like a pickle
                    found.append(GlobalName(f"{name} (not understood)", called=True, trust=GlobalTrust.UNKNOWN))
    return merge_globals(found)


def _find_root(archive: ZipArchive) -> str:
    root = find_root(archive, "archive_format")
    if root is not None:
        record = archive.records[f"{root}archive_format"]
        if record.size < 100 and archive.read(record).strip() == b"pt2":
            return root
    raise OtherFormatError("no archive_format says pt2")


def read_json_record(archive: ZipArchive, record: ZipRecord, *, allow_nan: bool = False) -> Any:
    """Parse a record as JSON.

    Raises:
        CorruptFileError, UnsafeFileError
    """
    if record.size > MAX_JSON:
        raise UnsafeFileError(f"record {quote(record.name)} has {record.size} bytes")
    return read_json(archive.read(record), what=f"record {quote(record.name)}", allow_nan=allow_nan)


def _read_model(layout: ArchiveLayout, name: str, *, only: bool) -> StateDict:
    archive, root = layout.archive, layout.root
    config = read_json_record(archive, archive.records[f"{root}data/weights/{name}{_CONFIG}"])
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise CorruptFileError(f"the list of weights of model {quote(name)} is malformed")
    tensors: dict[str, Tensor] = {key: _read_tensor(layout, key, entry) for key, entry in entries.items()}
    graph = archive.records.get(f"{root}models/{name}.json")
    found = read_batchnorms(read_json_record(archive, graph)) if graph is not None else {}
    modules = {layer: ModuleInfo(class_path, facts) for layer, (class_path, facts) in found.items()}
    key = "" if only else name
    return StateDict(key, find_prefix(list(tensors)), tensors, modules=modules)


@dataclass(frozen=True)
class _Meta:
    """The checked facts of one tensor."""

    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    layout: int


def _read_tensor(layout: ArchiveLayout, name: str, entry: Any) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    meta = _read_meta(name, fields.get("tensor_meta"))
    dtype = BY_NAME.get(_DTYPES.get(meta.dtype, ""))
    record = layout.archive.records.get(f"{layout.root}data/weights/{fields.get('path_name')}")
    if dtype is None or record is None:
        what = "a dtype that is not known" if dtype is None else "no elements"
        raise CorruptFileError(f"the archive has {what} for this tensor", tensor=name)
    tensor = StoredTensor(
        dtype=dtype,
        shape=meta.shape,
        strides=meta.strides,
        storage_offset=meta.storage_offset,
        storage=None,
        requires_grad=bool(fields["tensor_meta"].get("requires_grad")),
        is_parameter=bool(fields.get("is_param")),
    )
    if fields.get("use_pickle") or meta.layout != _STRIDED:
        return dataclasses.replace(tensor, wrapper="pickled" if fields.get("use_pickle") else "sparse")
    storage = Storage(
        source=InflatedRecord(layout.archive, record) if record.is_deflated else layout.archive.file,
        offset=0 if record.is_deflated else record.data_offset,
        nbytes=record.size,
        key=record.name,
        big_endian=layout.big_endian,
    )
    tensor = dataclasses.replace(tensor, storage=storage)
    tensor.check_bounds(name)
    return tensor


def _read_meta(name: str, meta: Any) -> _Meta:
    fields = meta if isinstance(meta, dict) else {}
    shape, strides = _integers(fields.get("sizes")), _integers(fields.get("strides"))
    offset = _integers([fields.get("storage_offset")])
    dtype, layout = fields.get("dtype"), fields.get("layout")
    if shape is None or strides is None or offset is None or type(dtype) is not int or type(layout) is not int:
        raise CorruptFileError("dtype, size, stride or offset are malformed", tensor=name)
    return _Meta(dtype, shape, strides, offset[0], layout)


def _integers(values: Any) -> tuple[int, ...] | None:
    """Read sizes, which are written as ``{"as_int": 4}``; None for symbolic ones, which have no place in weights."""
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return None
    numbers = [value.get("as_int") if isinstance(value, dict) else None for value in values]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        return None
    return tuple(number for number in numbers if number is not None)
