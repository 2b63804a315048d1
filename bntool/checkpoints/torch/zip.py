"""The zip archives of torch.save since torch 1.6: a pickle and one record for each storage."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, GlobalName
from bntool.checkpoints.containers.pickles.nodes import as_mapping, is_mapping
from bntool.checkpoints.containers.pickles.reading import OpcodeBudget, Pickle, read_pickle_bytes
from bntool.checkpoints.containers.pickles.trust import list_globals
from bntool.checkpoints.containers.zips.reading import InflatedRecord, ZipArchive, ZipRecord, read_archive
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.records import History, parse_records
from bntool.checkpoints.tensors import Storage
from bntool.checkpoints.torch.arrays import ArrayReader
from bntool.checkpoints.torch.state_dicts import TorchContent, describe_root, find_state_dicts, read_records
from bntool.checkpoints.torch.tensors import StorageReference
from bntool.errors import CorruptFileError, OtherFormatError, UnsafeFileError

_KERAS = {"config.json", "metadata.json"}  # what Keras looks for
MAX_PICKLE = 1 << 29
_SMALL_PICKLE = 1 << 20  # nodes of larger ones are not kept


@dataclass(frozen=True, repr=False, eq=False)
class ArchiveLayout(Content):
    """The archive and the folder in it that holds everything.

    Attributes:
        record_name: where in the folder bntool leaves a record for which the pickle has no place.
    """

    archive: ZipArchive
    root: str
    big_endian: bool
    record_name: str = "bntool.json"

    def storage_record(self, key: str) -> ZipRecord | None:
        return self.archive.records.get(f"{self.root}data/{key}")


@dataclass(frozen=True, repr=False, eq=False)
class ArchiveContent(TorchContent):
    """The pickle, and the archive that it lies in."""

    layout: ArchiveLayout


class TorchZip(Format):
    """A zip archive of torch.save, as torch writes since 1.6."""

    name = "torch-zip"
    title = "torch (zip)"
    writer = "torch.zip_writing:write"

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:
        return describe_root(checkpoint)

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        layout = find_layout(archive)
        pickle, named = read_pickle_with_globals(layout)
        reader = ArrayReader(lambda reference: resolve_storage(layout, reference))
        for node in pickle.persistent_ids:  # torch reads those outside of state dicts, too
            reader.find_storage(node)
        found = find_state_dicts(pickle.root, reader)
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=found.state_dicts,
            entries=as_mapping(pickle.root) if is_mapping(pickle.root) else {},
            globals=named,
            records={**read_loose_records(layout), **read_records(found.sources)},
            not_understood=found.not_understood,
            content=ArchiveContent(pickle, reader, found.sources, layout),
        )

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        return ArchiveContent.of(checkpoint).layout.archive.check_records()


def read_main_pickle(layout: ArchiveLayout, *, budget: OpcodeBudget) -> Pickle:
    """Return the pickle that names the storages.

    Args:
        budget: of the file, which has several pickles.
    """
    return read_pickle_bytes(_read_main_record(layout), budget=budget)


def _read_main_record(layout: ArchiveLayout) -> bytes:
    record = layout.archive.records[f"{layout.root}data.pkl"]
    if record.size > MAX_PICKLE:
        raise UnsafeFileError(f"the pickle has {record.size} bytes, above the limit of {MAX_PICKLE}")
    return layout.archive.read(record)


def read_pickle_with_globals(layout: ArchiveLayout) -> tuple[Pickle, tuple[GlobalName, ...]]:
    """Return the pickle and what it names: state dicts of one model differ in their storages only."""
    data = _read_main_record(layout)
    return _read_again(data) if len(data) <= _SMALL_PICKLE else _read_with_globals(data)


def _read_with_globals(data: bytes) -> tuple[Pickle, tuple[GlobalName, ...]]:
    pickle = read_pickle_bytes(data)
    return pickle, list_globals(pickle)


_read_again = functools.lru_cache(maxsize=1)(_read_with_globals)


def read_loose_records(layout: ArchiveLayout) -> dict[str, History]:
    """Return the histories in a record of the archive, by key of the state dict."""
    record = layout.archive.records.get(f"{layout.root}{layout.record_name}")
    return parse_records(layout.archive.read(record)) if record is not None else {}


def find_layout(archive: ZipArchive) -> ArchiveLayout:
    check_case(archive.records)
    top = [name for name in archive.records if name.count("/") <= 1 and name.rpartition("/")[2].lower() == "data.pkl"]
    if not top:
        raise OtherFormatError("the archive has no data.pkl")
    if archive.records.keys() >= _KERAS:
        raise UnsafeFileError("this zip archive can be read in two ways: as one of torch.save, and as one of Keras")
    if len(top) > 1:
        raise CorruptFileError("the zip archive holds more than one data.pkl")
    root = top[0][: -len("data.pkl")]
    if top[0] != f"{root}data.pkl":
        raise CorruptFileError(f"the pickle of the archive is named {quote(top[0])} instead of data.pkl")
    if f"{root}constants.pkl" in archive.records:
        raise OtherFormatError("this is a TorchScript archive")
    return ArchiveLayout(archive, root, big_endian=is_big_endian(archive, root))


def check_case(names: Iterable[str]) -> None:
    """Refuse records whose names differ by case only: torch looks them up without regard to it, and finds either.

    Raises:
        UnsafeFileError: there are two.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(name.lower(), name)
        if other != name:
            raise UnsafeFileError(
                f"records {quote(other)} and {quote(name)} of the archive differ by case only: torch may read either"
            )


def is_big_endian(archive: ZipArchive, root: str) -> bool:
    """Return the byte order of the storages, which newer archives name."""
    record = archive.records.get(f"{root}byteorder")
    order = b"little" if record is None else archive.read(record)
    if order not in (b"little", b"big"):
        raise CorruptFileError("record 'byteorder' names neither 'little' nor 'big'")
    return order == b"big"


def resolve_storage(layout: ArchiveLayout, reference: StorageReference) -> Storage:
    record = layout.storage_record(reference.key)
    if record is None:
        raise CorruptFileError(f"the storage {quote(reference.key)} is missing from the archive")
    nbytes = reference.nbytes
    if record.size < nbytes:
        raise CorruptFileError(f"storage {quote(reference.key)} has {record.size} bytes, but {nbytes} are announced")
    return Storage(
        source=InflatedRecord(layout.archive, record) if record.is_deflated else layout.archive.file,
        offset=0 if record.is_deflated else record.data_offset,
        nbytes=nbytes,
        key=reference.key,
        big_endian=layout.big_endian,
        device=reference.device,
    )
