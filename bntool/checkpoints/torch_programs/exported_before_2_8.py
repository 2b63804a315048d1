"""The .pt2 archives of torch.export.save before torch 2.8: a zip of JSON and, as records, of files of torch.save."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, GlobalName, LoadingCode, ModuleInfo, StateDict
from bntool.checkpoints.containers.pickles.reading import OpcodeBudget, Pickle
from bntool.checkpoints.containers.pickles.trust import list_globals
from bntool.checkpoints.containers.zips.reading import InflatedRecord, ZipArchive, ZipRecord, read_archive
from bntool.checkpoints.files import FileSlice, FileView, SourceFile, quote
from bntool.checkpoints.torch.state_dicts import find_state_dicts
from bntool.checkpoints.torch.tensors import TensorReader
from bntool.checkpoints.torch.zip import (
    ArchiveLayout,
    check_case,
    find_layout,
    read_loose_records,
    read_main_pickle,
    resolve_storage,
)
from bntool.checkpoints.torch_programs.exported import read_json_record
from bntool.checkpoints.torch_programs.exported_graph import read_batchnorms
from bntool.errors import CorruptFileError, OtherFormatError

_PROGRAM = "serialized_exported_program.json"
# in torch 2.1 and 2.2 the names end in .json, but the records are no JSON
_STATE_DICT = ("serialized_state_dict.pt", "serialized_state_dict.json")
_OTHERS = ("serialized_constants.pt", "serialized_constants.json", "serialized_example_inputs.pt")
_RECORD_NAME = "extra_files/bntool.json"  # where torch.export.save puts its extra_files


@dataclass(frozen=True)
class ExportLayout(Content):
    """The archive, and the archive in it that holds the state dict.

    Attributes:
        outer: the file.
        inner: None where the program has no tensors.
        record: where ``inner`` lies in ``outer``.
    """

    outer: ArchiveLayout
    inner: ArchiveLayout | None
    record: ZipRecord | None


class LegacyExport(Format):
    """An archive of torch.export.save before torch 2.8; only elements of its tensors change."""

    name = "exported-program-legacy"
    title = "torch.export (.pt2, before 2.8)"
    only_values = True
    writer = "torch_programs.exported_writing:write_before_2_8"
    holds_code = True
    loading = LoadingCode(
        (
            "import torch  # of the version that wrote the file: others may refuse it",
            "model = torch.export.load({path}).module()  # runs code of the file",
        )
    )

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        if _PROGRAM not in archive.records:
            raise OtherFormatError(f"the archive has no {_PROGRAM}")
        check_case(archive.records)
        outer, budget = ArchiveLayout(archive, "", big_endian=False, record_name=_RECORD_NAME), OpcodeBudget()
        found = [archive.records[name] for name in _STATE_DICT if name in archive.records]
        if len(found) > 1:
            raise CorruptFileError("the .pt2 archive holds two state dicts of one program")
        record = found[0] if found else None
        inner, pickle = _open_nested(archive, record, budget)
        state_dicts: tuple[StateDict, ...] = ()
        if inner is not None and pickle is not None:
            reader = TensorReader(lambda reference: resolve_storage(inner, reference))
            state_dicts = find_state_dicts(pickle.root, reader).state_dicts
        layers = read_batchnorms(read_json_record(archive, archive.records[_PROGRAM], allow_nan=True))
        modules = {layer: ModuleInfo(class_path, facts) for layer, (class_path, facts) in layers.items()}
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=tuple(s if s.key else dataclasses.replace(s, modules=modules) for s in state_dicts),
            entries={"models": 1},
            globals=tuple(_list_globals(archive, pickle, budget)),
            records=read_loose_records(outer),
            content=ExportLayout(outer, inner, record),
        )

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        layout = ExportLayout.of(checkpoint)
        archives = [one.archive for one in (layout.outer, layout.inner) if one is not None]
        counts = [count for archive in archives if (count := archive.check_records()) is not None]
        return sum(counts) if counts else None


def _open_nested(
    archive: ZipArchive, record: ZipRecord | None, budget: OpcodeBudget
) -> tuple[ArchiveLayout, Pickle] | tuple[None, None]:
    """Return the file of torch.save that a record is, and its pickle; nothing where there was nothing to save.

    Raises:
        CorruptFileError: the record is something else.
    """
    if record is None or record.size == 0:
        return None, None
    if record.is_deflated:
        file: SourceFile = FileView(InflatedRecord(archive, record), like=archive.file)
    else:
        file = FileSlice(archive.file, offset=record.data_offset, length=record.size)
    try:
        layout = find_layout(read_archive(file))
    except OtherFormatError as error:
        raise CorruptFileError(f"record {quote(record.name)} is no file of torch.save") from error
    return layout, read_main_pickle(layout, budget=budget)


def _list_globals(archive: ZipArchive, pickle: Pickle | None, budget: OpcodeBudget) -> Iterator[GlobalName]:
    """Yield what loading the program would import or call: torch unpickles constants and example inputs too."""
    others = (_open_nested(archive, archive.records.get(name), budget)[1] for name in _OTHERS)
    seen = set()
    for one in (pickle, *others):
        for name in list_globals(one) if one is not None else ():
            if (name.path, name.called) not in seen:
                seen.add((name.path, name.called))
                yield name
