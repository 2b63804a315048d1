"""Checkpoints split over several files, with an index that says which file holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, GlobalName, LoadingCode, StateDict
from bntool.checkpoints.containers.json_texts import read_json
from bntool.checkpoints.containers.pickles.trust import merge_globals
from bntool.checkpoints.files import Folder, SourceFile, quote
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import Tensor
from bntool.errors import CorruptFileError, UnknownFormatError, UnsafeFileError

MAX_INDEX = 1 << 27
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class Shards(Content):
    """The parsed index and the opened shards by file name."""

    index: Mapping[str, Any]
    shards: Mapping[str, Checkpoint]
    shard_of: Mapping[str, str]


class Sharded(Format):
    """Several files of tensors with an index that says which holds what."""

    name = "sharded"
    title = "sharded"
    writer = "safetensors.sharded_writing:write"
    single_file = False
    loading = LoadingCode(
        ("from accelerate import load_checkpoint_in_model", "load_checkpoint_in_model(model, {path})")
    )

    def recognises(self, path: Location, head: bytes) -> bool:
        return path.name.endswith(".index.json") or (head.lstrip()[:1] == b"{" and b'"weight_map"' in head)

    def read(self, file: SourceFile) -> Checkpoint:
        index = _read_index(file)
        weight_map: dict[str, str] = index["weight_map"]
        shards = {name: _open_shard(file, name) for name in dict.fromkeys(weight_map.values())}
        tensors: dict[str, Tensor] = {}
        for name, shard_name in weight_map.items():
            found = shards[shard_name].state_dicts
            if len(found) != 1 or name not in found[0].tensors:
                raise CorruptFileError(f"the index places it in {quote(shard_name)}, which lacks it", tensor=name)
            tensors[name] = found[0].tensors[name]
        for shard_name, shard in shards.items():
            for name in shard.state_dicts[0].tensors:
                if weight_map.get(name) != shard_name:
                    raise CorruptFileError(f"{quote(shard_name)} holds it, but the index does not say so", tensor=name)
        versions = _merge_versions(shards)
        state_dict = StateDict("", find_prefix(list(tensors)), tensors, versions=versions)
        histories = [shard.records[key] for shard in shards.values() for key in shard.records]
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=(state_dict,),
            entries={"shards": len(shards)},
            globals=_merge_globals(shards),
            records={"": histories[0]} if histories else {},
            content=Shards(index, shards, weight_map),
        )

    def size(self, checkpoint: Checkpoint) -> int:
        content = Shards.of(checkpoint)
        return checkpoint.file.size + sum(shard.file.size for shard in content.shards.values())

    def check_unchanged(self, checkpoint: Checkpoint) -> None:
        super().check_unchanged(checkpoint)
        for shard in Shards.of(checkpoint).shards.values():
            shard.format.check_unchanged(shard)

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        counts = [s.format.verify_checksums(s) for s in Shards.of(checkpoint).shards.values()]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    def describe_losses(self, checkpoint: Checkpoint) -> Sequence[str]:
        shards = Shards.of(checkpoint).shards
        return tuple(
            f"{loss} (in {quote(name)})"
            for name, shard in shards.items()
            for loss in shard.format.describe_losses(shard)
        )

    def can_record(self, checkpoint: Checkpoint, state_dict: StateDict) -> bool:  # noqa: ARG002 (there is one)
        content = Shards.of(checkpoint)
        home = content.shards[record_home(content.shards, content.shard_of)]
        return home.format.can_record(home, home.state_dicts[0])


def _read_index(file: SourceFile) -> dict[str, Any]:
    if file.size > MAX_INDEX:
        raise UnsafeFileError(f"the index has {file.size} bytes, above the limit of {MAX_INDEX}")
    index = read_json(file.read(0, file.size), what="the index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError("the index has no weight_map")
    if all(isinstance(names, list) for names in weight_map.values()):
        raise UnknownFormatError(
            "Keras's index of weights cut into several files is not read; inspect the .weights.h5 files one by one"
        )
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptFileError("the weight_map of the index does not map to file names")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise UnsafeFileError(f"the index names more than {MAX_SHARDS} files")
    return dict(index)


def check_inside(folder: Folder, name: str, *, named_by: str = "the index") -> None:
    """Refuse a file name of an index that leads anywhere else than into the folder of the index.

    Raises:
        UnsafeFileError: it leads outside.
        CorruptFileError: no file can have this name.
    """
    if "/" in name or name in ("", ".", "..") or "\\" in name or ":" in name or "\0" in name:
        raise UnsafeFileError(f"{named_by} names {quote(name)}, which is no file of its folder")
    try:
        leads_outside = not folder.contains(name)
    except ValueError as error:  # no name that the file system can have
        raise CorruptFileError(f"{named_by} names {quote(name)}, which no file can be called") from error
    if leads_outside:
        raise UnsafeFileError(f"{named_by} names {quote(name)}, a link that leads out of its folder")


def _open_shard(index: SourceFile, name: str) -> Checkpoint:
    """Open a shard beside the index, and nowhere else."""
    from bntool.checkpoints.formats import open_file

    check_inside(index.folder, name)
    if name.endswith(".index.json"):
        raise UnsafeFileError(f"the index names {quote(name)}, another index")
    shard = open_file(index.folder.open(name, named_by=index.path))
    if isinstance(shard.format, Sharded) or len(shard.state_dicts) != 1 or shard.state_dicts[0].key:
        raise CorruptFileError("a shard must hold one bare state dict", path=shard.path)
    return shard


def _merge_versions(shards: Mapping[str, Checkpoint]) -> dict[str, int | None] | None:
    merged: dict[str, int | None] = {}
    for shard in shards.values():
        merged.update(shard.state_dicts[0].versions or {})
    return merged or None


def _merge_globals(shards: Mapping[str, Checkpoint]) -> tuple[GlobalName, ...]:
    return merge_globals(name for shard in shards.values() for name in shard.globals)


def record_home(shards: Mapping[str, Checkpoint], shard_of: Mapping[str, str]) -> str:
    """Return the shard that holds the record: the one that has it already, else the first that still has tensors."""
    left = [name for name in shards if name in set(shard_of.values())] or list(shards)
    return next((name for name in left if shards[name].records), left[0])
