"""Writing checkpoints split over several files: each shard as its own format does, and the index."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.checkpoints.renaming import rename_versions
from bntool.checkpoints.safetensors.sharded import Shards, record_home
from bntool.checkpoints.saving import write_checked
from bntool.checkpoints.tensors import Tensor, count_elements
from bntool.errors import RefusedError, VerificationError
from bntool.plan import Record


def write(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write the shards that still hold tensors, and the index.

    Raises:
        RefusedError: the name of the output is none of an index, or the format of the shards cannot hold an edit.
    """
    content = Shards.of(checkpoint)
    if not path.name.endswith(".index.json"):
        raise RefusedError(
            "a sharded checkpoint is written as an index and its shards: name an output like "
            f"FOLDER/{checkpoint.path.name}"
        )
    (state_dict,) = checkpoint.state_dicts
    renamed = state_dict.renamed
    known = {renamed.get(name, name): shard for name, shard in content.shard_of.items()}
    shard_of = _assign_shards(state_dict, known)
    for name, shard in content.shards.items():
        target = path.parent / name
        check_output_differs(shard.file, target)
        if name not in shard_of.values():  # no tensor is left
            continue
        write_checked(_edited_shard(shard, name, checkpoint, shard_of), target, output)
    index = {**content.index, "weight_map": shard_of}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        total = sum(t.dtype.byte_count(count_elements(t.shape)) for t in state_dict.tensors.values())
        index["metadata"] = {**index["metadata"], "total_size": total}
    output.open(path).write(json.dumps(index, indent=2).encode() + b"\n")
    output.flush()
    if json.loads(output.temporary(path).read_bytes())["weight_map"] != shard_of:
        raise VerificationError("the written index names other shards than it should", path=path)


def _assign_shards(state_dict: StateDict, known: Mapping[str, str]) -> dict[str, str]:
    """Assign each tensor to its shard; a new one goes where the tensor before it is."""
    assigned: dict[str, str] = {}
    current = next(iter(known.values()))
    for name in state_dict.tensors:
        current = known.get(name, current)
        assigned[name] = current
    return assigned


def _edited_shard(shard: Checkpoint, name: str, whole: Checkpoint, shard_of: Mapping[str, str]) -> Checkpoint:
    """Return one shard with the edits of the whole checkpoint that concern it."""
    (edited,) = whole.state_dicts
    tensors = {key: tensor for key, tensor in edited.tensors.items() if shard_of[key] == name}
    keeps_record = name == record_home(Shards.of(whole).shards, shard_of)
    (own,) = shard.state_dicts
    renamed = {old: new for old, new in edited.renamed.items() if old in own.tensors}
    order = [renamed.get(old, old) for old in own.tensors]
    own = dataclasses.replace(own, tensors=_in_own_order(order, tensors), renamed=renamed)
    if renamed and own.versions is not None:
        own = dataclasses.replace(own, versions=rename_versions(own.versions, renamed, own.stored))
    return dataclasses.replace(
        shard,
        state_dicts=(own,),
        records=whole.records if keeps_record else shard.records,
        edits=tuple(e for e in whole.edits if not isinstance(e.step, Record) or keeps_record),
    )


def _in_own_order(own: Sequence[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the shard's own key order; new keys after the one that they follow in the whole."""
    ordered: dict[str, Tensor] = {}
    names = list(tensors)
    followers: dict[str | None, list[str]] = {}
    previous: str | None = None
    for name in names:
        if name in own:
            previous = name
        else:
            followers.setdefault(previous, []).append(name)
    for place in [None, *own]:
        if place is not None and place in tensors:
            ordered[place] = tensors[place]
        for follower in followers.get(place, ()):
            ordered[follower] = tensors[follower]
    return ordered
