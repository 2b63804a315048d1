"""The changes that an edited checkpoint makes to a torch file: bytes of storages, nodes of the pickle, new storages."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.pickles.nodes import (
    Construction,
    Dict,
    Global,
    Instance,
    Node,
    PersistentId,
    Update,
    as_mapping,
    is_mapping,
    iterate_pairs,
    text_of,
    walk_nodes,
)
from bntool.checkpoints.records import RECORD_KEY
from bntool.checkpoints.renaming import rename_paths
from bntool.checkpoints.tensors import StoredTensor, Tensor, contiguous_strides, count_elements
from bntool.checkpoints.ties import elements_of
from bntool.checkpoints.torch.array_writing import can_hold, make_array, replace_data
from bntool.checkpoints.torch.modules import StateDictSource
from bntool.checkpoints.torch.shared_memory import SharedMemory
from bntool.checkpoints.torch.state_dicts import TorchContent, metadata_node, shares_metadata
from bntool.checkpoints.torch.tensors import read_storage_reference
from bntool.errors import RefusedError
from bntool.plan import AddTensor, Record, RemoveEntry, RenameTensor, SetAttribute


@dataclass
class TorchChanges:
    """The differences between the source and the file to write.

    Attributes:
        patches: by key of the storage, the tensors to put over it.
        replacements: from ``id(node)`` of the pickle to the node in its place.
        new_storages: by new key, the contiguous tensor that it holds.
        dropped: keys of the storages that nothing refers to any more.
        loose_record: JSON text to leave beside the pickle, where no state dict has a place for it.
    """

    patches: dict[str, list[tuple[StoredTensor, Tensor]]] = field(default_factory=dict)
    replacements: dict[int, Node] = field(default_factory=dict)
    new_storages: dict[str, Tensor] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    loose_record: str | None = None

    @property
    def changes_pickle(self) -> bool:
        return bool(self.replacements)


def collect_changes(checkpoint: Checkpoint) -> TorchChanges:
    """Compare a checkpoint with the file it came from.

    Raises:
        RefusedError: tensors would have to be added to or removed from a pickled module, or a dtype has no storage.
    """
    return _ChangeCollector(checkpoint).collect()


class _ChangeCollector:
    """Collects the changes of one checkpoint; see :func:`collect_changes`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        content = TorchContent.of(checkpoint)
        self.root, self.reader, self.sources = content.pickle.root, content.reader, content.sources
        self.changes = TorchChanges()
        self.used_keys = {
            reference.key
            for reference in map(read_storage_reference, content.pickle.persistent_ids)
            if reference is not None
        }
        self.fresh_keys = itertools.count(_first_fresh_key(self.used_keys))
        # the legacy format has one field more, for views of storages
        self.has_view_field = any(
            isinstance(node.value, tuple) and len(node.value) == 6 for node in content.pickle.persistent_ids
        )
        self.users: SharedMemory | None = None
        self.own_metadata: dict[str, Node] = {}  # of state dicts that shared theirs

    def collect(self) -> TorchChanges:
        for state_dict in self.checkpoint.state_dicts:
            self.change_tensors(state_dict)
            if state_dict.renamed:
                self.rename_metadata(state_dict)
            self.set_versions(state_dict)
        for edit in self.checkpoint.edits:
            if isinstance(edit.step, SetAttribute):
                self.set_attribute(self.checkpoint.state_dict(edit.state_dict), edit.step)
            elif isinstance(edit.step, RemoveEntry):
                self.remove_entry(edit.step.path)
        noted = {e.state_dict for e in self.checkpoint.edits if isinstance(e.step, Record | RenameTensor)}
        for state_dict in self.checkpoint.state_dicts:
            if state_dict.key in noted:
                self.record(state_dict)
        if self.changes.replacements:
            self.find_dropped_storages()
        self.replace_arrays()
        return self.changes

    def replace_arrays(self) -> None:
        """Replace the bytes in the nodes of changed arrays, which have no storages that could be patched."""
        patches = self.changes.patches
        for key in [key for key in patches if key in self.reader.array_nodes]:
            (stored, new), *_ = patches.pop(key)
            node = self.reader.array_nodes[key]
            self.changes.replacements[id(node)] = replace_data(node, stored, new)

    # nodes are never changed: an edited copy takes their place when the pickle is written

    def editable(self, node: Node) -> Node:
        """Return the copy that takes the place of a dict or an instance."""
        replacement = self.changes.replacements.get(id(node))
        if replacement is None:
            replacement = _copy(node)
            self.changes.replacements[id(node)] = replacement
        return replacement

    def current(self, node: Node) -> Node:
        """Return the copy that replaces a node; the node itself where it does not change."""
        return self.changes.replacements.get(id(node), node)

    # tensors

    def change_tensors(self, state_dict: StateDict) -> None:
        source, renamed = self.sources[state_dict.key], state_dict.renamed
        if renamed:
            nodes = {renamed.get(name, name): node for name, node in source.tensor_nodes.items()}
            source = dataclasses.replace(source, tensor_nodes=nodes)
        original = {name: self.reader.read(node) for name, node in source.tensor_nodes.items()}
        changed = {n: t for n, t in state_dict.tensors.items() if n in original and t is not original[n]}
        added = [name for name in state_dict.tensors if name not in original]
        removed = [name for name in original if name not in state_dict.tensors]
        new_nodes: dict[str, Node] = {}
        neighbours: dict[Any, dict[str, Tensor]] = {}  # the changed tensors of each storage
        for name, tensor in changed.items():
            neighbours.setdefault(_storage_key(original[name]), {})[name] = tensor
        for name, tensor in changed.items():
            stored = original[name]
            assert stored is not None
            fits = stored.storage is not None and tensor.dtype is stored.dtype
            if not fits or self.is_shared(source, name, neighbours[_storage_key(stored)]):
                new_nodes[name] = self.new_tensor(tensor, like=stored)
            else:
                assert stored.storage is not None
                self.changes.patches.setdefault(stored.storage.key, []).append((stored, tensor))
        if not (added or removed or new_nodes or renamed):
            return
        if state_dict.is_module:
            raise RefusedError(
                "the file pickles whole modules; tensors in it can change, but not come or go, be renamed, nor part "
                "from others that share their memory. Save model.state_dict() and use that, or --layout same-keys",
                tensor=next(iter([*added, *removed, *new_nodes, *renamed])),
            )
        neighbour = next(tensor for tensor in original.values() if tensor is not None)
        steps = [edit.step for edit in self.checkpoint.edits if edit.state_dict == state_dict.key]
        buffers = {state_dict.prefix + s.name for s in steps if isinstance(s, AddTensor) and not s.is_parameter}
        for name in added:
            like = dataclasses.replace(neighbour, is_parameter=False) if name in buffers else neighbour
            new_nodes[name] = self.new_tensor(state_dict.tensors[name], like=like)
        self.change_pairs(source.node, state_dict, set(removed), new_nodes)

    def change_pairs(self, node: Node, state_dict: StateDict, removed: set[str], new_nodes: Mapping[str, Node]) -> None:
        renamed = state_dict.renamed
        followers: dict[str | None, list[str]] = {}
        previous: str | None = None
        existing = {_renamed(text_of(key), renamed) for key, _ in iterate_pairs(node)}
        for name in state_dict.tensors:
            if name in existing:
                previous = name
            else:
                followers.setdefault(previous, []).append(name)
        pairs: list[tuple[Node, Node]] = [(name, new_nodes[name]) for name in followers.get(None, ())]
        for key, value in iterate_pairs(node):
            text = _renamed(text_of(key), renamed)
            if text is None or text not in removed:
                key = text if text_of(key) in renamed else key  # noqa: PLW2901
                pairs.append((key, new_nodes.get(text, value) if text is not None else value))
            if text is not None:
                pairs.extend((name, new_nodes[name]) for name in followers.pop(text, ()))
        _set_pairs(self.editable(node), pairs)

    def is_shared(self, source: StateDictSource, name: str, changed: Mapping[str, Tensor]) -> bool:
        """Return whether bytes of a tensor belong to another tensor too, one that does not get the same new elements.

        Args:
            source: where the tensor lies.
            name: of the tensor.
            changed: the tensors of its storage that get new elements.
        """
        if self.users is None:
            self.users = SharedMemory(self.root, self.reader, self.sources.values())
        stored = self.reader.read(source.tensor_nodes[name])
        assert stored is not None
        twins: Counter[int] = Counter()
        for other, tensor in changed.items():
            node = source.tensor_nodes[other]
            if tensor == changed[name] and elements_of(self.reader.read(node)) == elements_of(stored):
                twins[id(node)] += 1
        return stored.overlaps_itself or self.users.has_other_user(stored, twins)

    def new_tensor(self, tensor: Tensor, *, like: StoredTensor) -> Node:
        """Make a node for a tensor that needs a storage of its own, or for an array where its neighbour is one."""
        array = self.reader.array_nodes.get(_storage_key(like) or "")
        if array is not None:
            if not can_hold(tensor.dtype):
                raise RefusedError(f"a new tensor of dtype {tensor.dtype} cannot be written to this format")
            return make_array(tensor, like=array)
        storage_name = tensor.dtype.storage
        if storage_name is None:
            raise RefusedError(f"a new tensor of dtype {tensor.dtype} cannot be written to this format")
        key = str(next(self.fresh_keys))
        self.used_keys.add(key)
        self.changes.new_storages[key] = tensor
        device = like.storage.device if like.storage is not None else "cpu"
        count = count_elements(tensor.shape)
        facts: tuple[Node, ...] = ("storage", Global("torch", storage_name), key, device, count)
        reference = PersistentId((*facts, None) if self.has_view_field else facts)
        hooks = Instance(Global("collections", "OrderedDict"), (), construction=Construction.REDUCE)
        arguments = (reference, 0, tensor.shape, contiguous_strides(tensor.shape), False, hooks)
        rebuilt = Instance(Global("torch._utils", "_rebuild_tensor_v2"), arguments, construction=Construction.REDUCE)
        if not like.is_parameter:
            return rebuilt
        return Instance(
            Global("torch._utils", "_rebuild_parameter"),
            (rebuilt, bool(like.requires_grad), hooks),
            construction=Construction.REDUCE,
        )

    # the rest

    def set_attribute(self, state_dict: StateDict, step: SetAttribute) -> None:
        source = self.sources[state_dict.key]
        if step.module not in source.module_nodes:
            raise RefusedError("the file holds no such module, only tensors", tensor=step.module)
        owner, _, attribute = step.attribute.rpartition(".")
        if attribute == "requires_grad" and owner:
            name = f"{step.module}.{owner}" if step.module else owner
            tensor = state_dict.tensors.get(name)
            if not isinstance(tensor, StoredTensor) or not tensor.is_parameter:
                raise RefusedError("the file holds no such parameter", tensor=name)
            copy = self.editable(source.tensor_nodes[name])
            if isinstance(copy.state, tuple) and copy.state:  # torch 0.1 to 0.3
                state = (bool(step.value), *copy.state[1:])
                copy.updates = [(u, state if u is Update.STATE else payload) for u, payload in copy.updates]
            else:
                copy.arguments = (copy.arguments[0], bool(step.value), *copy.arguments[2:])
            return
        state = self.editable(source.module_nodes[step.module].state)
        _set_pairs(state, _with_item(iterate_pairs(state), step.attribute, step.value))

    def metadata_of(self, state_dict: StateDict) -> Node:
        """Return the ``_metadata`` of a state dict; one of its own where another shares it, as after ``copy.copy``."""
        node = self.sources[state_dict.key].node
        metadata = metadata_node(node)
        others = (source.node for source in self.sources.values() if source.node is not node)
        if state_dict.key not in self.own_metadata and any(shares_metadata(metadata, metadata_node(o)) for o in others):
            metadata = self.own_metadata[state_dict.key] = _copy(metadata)
            _set_pairs(metadata, [(key, _copy(v) if is_mapping(v) else v) for key, v in iterate_pairs(metadata)])
            copy = self.editable(node)
            state = _copy(copy.state)
            _set_pairs(state, _with_item(iterate_pairs(state), "_metadata", metadata))
            copy.updates = [(u, state if u is Update.STATE else payload) for u, payload in copy.updates]
        return self.own_metadata.get(state_dict.key, metadata)

    def rename_metadata(self, state_dict: StateDict) -> None:
        """Move the entries of ``_metadata`` to the new paths of their modules; a record stays with the root."""
        metadata = self.metadata_of(state_dict)
        if not is_mapping(metadata):
            return
        before = self.sources[state_dict.key].tensor_nodes
        entries = as_mapping(metadata)
        places = rename_paths(entries, state_dict.renamed, before)
        pairs: list[tuple[Node, Node]] = []
        for old, new in places.items():
            if new is None:
                continue
            entry = entries[old]
            if not old and new and is_mapping(entry):
                entry = _copy(entry)
                _set_pairs(entry, [(key, value) for key, value in iterate_pairs(entry) if text_of(key) != RECORD_KEY])
            pairs.append((new, entry))
        if "" in entries and "" not in places.values():
            pairs.insert(0, ("", Dict()))
        _set_pairs(self.editable(metadata), pairs)

    def set_versions(self, state_dict: StateDict) -> None:
        """Set the versions of modules that differ from those in ``_metadata``."""
        found = as_mapping(self.current(metadata_node(self.sources[state_dict.key].node)))
        for path, version in (state_dict.versions or {}).items():
            if version is not None and as_mapping(found.get(path)).get("version") != version:
                entry = as_mapping(self.current(self.metadata_of(state_dict))).get(path)
                if is_mapping(entry):
                    copy = self.editable(entry)
                    _set_pairs(copy, _with_item(iterate_pairs(copy), "version", version))

    def remove_entry(self, path: tuple[str, ...]) -> None:
        node = self.root
        for key in path[:-1]:
            node = as_mapping(node).get(key)
        if path[-1] not in as_mapping(node):
            raise RefusedError(f"the file holds no entry {'.'.join(path)!r}")
        copy = self.editable(node)
        _set_pairs(copy, [(key, value) for key, value in iterate_pairs(copy) if text_of(key) != path[-1]])

    def record(self, state_dict: StateDict) -> None:
        records = self.checkpoint.records
        metadata = self.metadata_of(state_dict)
        if state_dict.key not in records:
            return
        if not is_mapping(metadata):
            homeless = [key for key, source in self.sources.items() if not is_mapping(metadata_node(source.node))]
            histories = {key: records[key] for key in homeless if key in records}
            self.changes.loose_record = json.dumps(histories, separators=(",", ":"))
            return
        text = json.dumps(records[state_dict.key], separators=(",", ":"))
        entry = as_mapping(self.current(metadata)).get("")
        if not is_mapping(entry):
            entry = Dict()
            copy = self.editable(metadata)
            _set_pairs(copy, _with_item(iterate_pairs(copy), "", entry))
        copy = self.editable(entry)
        _set_pairs(copy, _with_item(iterate_pairs(copy), RECORD_KEY, text))

    def find_dropped_storages(self) -> None:
        kept = set()
        for node in walk_nodes(self.root, self.changes.replacements):
            reference = read_storage_reference(node)
            if reference is not None:
                kept.add(reference.key)
        self.changes.dropped = self.used_keys - kept - self.changes.new_storages.keys()


def _renamed(text: str | None, renamed: Mapping[str, str]) -> str | None:
    return text if text is None else renamed.get(text, text)


def _storage_key(tensor: StoredTensor | None) -> str | None:
    return tensor.storage.key if tensor is not None and tensor.storage is not None else None


def _first_fresh_key(used: set[str]) -> int:
    """Return the first key after the largest: keys are numbers, as torch counts storages."""
    return max((int(key) for key in used if key.isdecimal() and len(key) < 19), default=-1) + 1


def _copy(node: Node) -> Node:
    if isinstance(node, Dict):
        return Dict(list(node.pairs))
    if isinstance(node, Instance):
        copy = Instance(node.constructor, node.arguments, construction=node.construction, keywords=node.keywords)
        copy.updates = list(node.updates)
        return copy
    raise RefusedError("the file holds something unexpected where a mapping should be")


def _set_pairs(node: Node, pairs: list[tuple[Node, Node]]) -> None:
    if isinstance(node, Dict):
        node.pairs = pairs
        return
    others = [(update, payload) for update, payload in node.updates if update is not Update.ITEMS]
    node.updates = [(Update.ITEMS, pairs), *others] if pairs else others


def _with_item(pairs: Iterator[tuple[Node, Node]], key: str, value: Node) -> list[tuple[Node, Node]]:
    kept = list(pairs)
    for index, (name, _) in enumerate(kept):
        if text_of(name) == key:
            kept[index] = (name, value)
            return kept
    return [*kept, (key, value)]
