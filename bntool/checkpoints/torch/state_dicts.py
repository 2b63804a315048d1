"""Finding state dicts in the nodes of a pickle that torch wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from bntool.batchnorm import STATISTICS, find_class_kind
from bntool.checkpoints.checkpoint import Checkpoint, Content, NotUnderstood, StateDict
from bntool.checkpoints.containers.pickles.nodes import (
    Dict,
    Instance,
    Node,
    Update,
    as_mapping,
    is_mapping,
    iterate_pairs,
    text_of,
)
from bntool.checkpoints.containers.pickles.reading import Pickle
from bntool.checkpoints.records import RECORD_KEY, History, parse_record
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import StoredTensor
from bntool.checkpoints.torch.modules import MAX_DEPTH, ModuleReader, StateDictSource, is_module
from bntool.checkpoints.torch.tensors import TensorReader
from bntool.errors import UnsafeFileError

MAX_STATE_DICTS = 1000
MAX_NAME = 1000  # characters; longer keys are data too, and keys of keys of them exhaust memory
MAX_LIST = 1000  # longer lists are data, not models
MAX_NUMBERS = 256  # mappings from more numbers are data too: results by image, statistics by class


# leaf names by which a mapping of tensors is known as a state dict, besides dotted names
_LEAVES = {
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "weight_g",
    "weight_v",
    "scale",
    "shift",
}


@dataclass(frozen=True, repr=False, eq=False)
class TorchContent(Content):
    """The pickle of a file, and what was found in it.

    Attributes:
        pickle: the main pickle.
        reader: knows the tensors already read.
        sources: where each state dict lies in the pickle, by its key.
    """

    pickle: Pickle
    reader: TensorReader
    sources: Mapping[str, StateDictSource]


class FoundStateDicts(NamedTuple):
    """The state dicts of a pickle, and where each lies in it, by its key."""

    state_dicts: tuple[StateDict, ...]
    sources: dict[str, StateDictSource]
    others: tuple[tuple[str, StateDictSource], ...] = ()  # mappings without a tensor that could be read

    @property
    def not_understood(self) -> tuple[NotUnderstood, ...]:
        """The things that lie where the tensors of a layer should, and are none that is known."""
        places = (*self.sources.items(), *self.others)
        found = ((key, name) for key, source in places for name in source.not_understood)
        return tuple(
            NotUnderstood(f"{key}.{name}" if key else name, "it is no tensor in a form that is known", left_out=True)
            for key, name in found
        )


def find_state_dicts(root: Node, reader: TensorReader) -> FoundStateDicts:
    """Return all state dicts and pickled modules under ``root``, in the order of the file.

    A mapping is a state dict if it holds a tensor under a dotted name or under a name like ``weight``; where nothing
    in the file does, any mapping with a floating tensor counts. A numpy array among torch's tensors is known by a
    dotted name only: as ``weight`` or ``scale`` it is often data. Optimizer states (mappings with ``state`` and
    ``param_groups``) are passed over. Where two would have the same key, the later ones get a number: ``model#2``.

    Raises:
        CorruptFileError, UnsafeFileError
    """
    found: list[_Found] = []
    weak: list[_Found] = []
    others: list[_Other] = []
    modules = ModuleReader(reader)
    versions: dict[int, dict[str, int | None] | None] = {}  # several state dicts can share one _metadata
    for path, node in _walk(root):
        key, access = ".".join(step.name for step in path), "".join(step.access for step in path)
        if is_module(node):
            state_dict, source = modules.read(key, node)
            found.append((dataclasses.replace(state_dict, access=access), source))
        elif is_mapping(node):
            source = StateDictSource(node)
            tensors = _read_tensors(source, reader)
            if not tensors:
                if source.not_understood:
                    others.append((key, source))
                continue
            metadata = metadata_node(node)
            if id(metadata) not in versions:
                versions[id(metadata)] = _versions(metadata)
            looks_right = any("." in n or (n in _LEAVES and not reader.is_array(t)) for n, t in tensors.items())
            state_dict = StateDict(
                key,
                find_prefix(list(tensors)),
                tensors,
                versions=versions[id(metadata)],
                access=access,
                holds_arrays=any(map(reader.is_array, tensors.values())),
            )
            (found if looks_right else weak).append((state_dict, source))
        if len(found) > MAX_STATE_DICTS:
            raise UnsafeFileError(f"the file holds more than {MAX_STATE_DICTS} state dicts")
    if any(state_dict.tensors for state_dict, _ in found):
        found = [one for one in found if not _is_function(one[0])]
    floating = [one for one in weak if any(tensor.dtype.is_floating for tensor in one[0].stored.values())]
    return _with_unique_keys(found or floating)._replace(others=tuple(others))


def _is_function(state_dict: StateDict) -> bool:
    """Return whether it is a module without tensors and normalisation, such as a loss beside the model."""
    classes = (module.class_path.rpartition(".")[2] for module in state_dict.modules.values())
    return not state_dict.tensors and not any(map(find_class_kind, classes))


_Found: TypeAlias = tuple[StateDict, StateDictSource]
_Other: TypeAlias = tuple[str, StateDictSource]


def _with_unique_keys(found: list[_Found]) -> FoundStateDicts:
    used: dict[str, int] = {}
    unique = []
    sources = {}
    for state_dict, source in found:
        count = used[state_dict.key] = used.get(state_dict.key, 0) + 1
        key = f"{state_dict.key}#{count}" if count > 1 else state_dict.key
        unique.append(dataclasses.replace(state_dict, key=key))
        sources[key] = source
    return FoundStateDicts(tuple(unique), sources)


class _Step(NamedTuple):
    """One step from a container into it: its name in keys, and in Python."""

    name: str
    access: str


def _walk(root: Node) -> Iterator[tuple[tuple[_Step, ...], Node]]:
    """Walk over every mapping and module that can be reached by names and numbers, with its path, each once.

    Modules are not entered.
    """
    pending: list[tuple[tuple[_Step, ...], Node]] = [((), root)]
    seen: set[int] = set()
    while pending:
        path, node = pending.pop()
        if id(node) in seen or len(path) > MAX_DEPTH:
            continue
        seen.add(id(node))
        inside: list[tuple[_Step, Node]] = []
        if is_module(node):
            yield path, node
        elif isinstance(node, list | tuple):
            inside = _numbered(node)
        elif is_mapping(node):
            entries = as_mapping(node)
            if "param_groups" in entries and "state" in entries:
                continue
            yield path, node
            inside = _entries(node)
        elif isinstance(node, Instance):
            inside = _numbered(_members(node))
            if is_mapping(node.state) and id(node.state) not in seen:
                seen.add(id(node.state))
                inside += [(_attribute(step), value) for step, value in _entries(node.state)]
        pending.extend(((*path, step), value) for step, value in reversed(inside))


def _numbered(nodes: Sequence[Node]) -> list[tuple[_Step, Node]]:
    """Return the containers in a list by their places; none of a long one."""
    if len(nodes) > MAX_LIST:
        return []
    return [(_Step(str(i), f"[{i}]"), node) for i, node in enumerate(nodes) if _may_hold(node)]


def _may_hold(node: Node) -> bool:
    """Return whether something may lie in a node; an instance that was given nothing, such as a tensor, holds
    nothing.
    """
    return bool(node.updates) if isinstance(node, Instance) else isinstance(node, list | tuple | Dict)


def _attribute(step: _Step) -> _Step:
    """Return the step to what an object holds; a name that is none must not become code."""
    return _Step(step.name, f".{step.name}" if step.name.isidentifier() else f".__dict__{step.access}")


def _members(node: Instance) -> list[Node]:
    """Return what was appended to an object: a deque, or a list of a class of its own."""
    return [value for update, payload in node.updates if update is Update.APPENDS for value in payload]


def _entries(node: Node) -> list[tuple[_Step, Node]]:
    """Return the containers in a mapping, by texts and by numbers, in order; without the numbers where they are
    many.
    """
    found: dict[str | float | None, Node] = {}
    for key, value in iterate_pairs(node):
        name = text_of(key)
        found[key if name is None and isinstance(key, int | float) else name] = value
    found.pop(None, None)
    if len(found) - len(as_mapping(node)) > MAX_NUMBERS:
        found = {key: value for key, value in found.items() if isinstance(key, str)}
    containers = [(key, value) for key, value in found.items() if _may_hold(value)]
    return [(_Step(str(key), f"[{key!r}]"), value) for key, value in containers if len(str(key)) <= MAX_NAME]


def _read_tensors(source: StateDictSource, reader: TensorReader) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for key, value in iterate_pairs(source.node):
        name = text_of(key)
        tensor = reader.read_named(name, value) if name is not None else None
        if name is not None and tensor is not None:
            tensors[name] = tensor
            source.tensor_nodes[name] = value
            continue
        shown = _show_bytes(key) if name is None else name
        is_known = shown is not None and shown.rpartition(".")[2] in STATISTICS
        if shown is not None and is_known and isinstance(value, Instance | list | tuple):
            source.not_understood.append(shown)
    return tensors


def _show_bytes(key: Node) -> str | None:
    """Show a key of bytes as text: protocol 2, which has no bytes, writes a call that encodes a text."""
    if isinstance(key, bytes):
        return key.decode("latin-1")
    if isinstance(key, Instance) and key.path == "_codecs.encode" and isinstance(key.arguments, tuple):
        return text_of(key.arguments[0]) if key.arguments else None
    return None


def metadata_node(node: Node) -> Node:
    """Return the ``_metadata`` of a state dict: an attribute of the OrderedDict, or None."""
    if isinstance(node, Instance) and is_mapping(node.state):
        return as_mapping(node.state).get("_metadata")
    return None


def shares_metadata(metadata: Node, other: Node) -> bool:
    """Return whether two ``_metadata`` are one, or have an entry in common."""
    if not (is_mapping(metadata) and is_mapping(other)):
        return False
    entries = {id(entry) for entry in as_mapping(metadata).values() if is_mapping(entry)}
    return metadata is other or any(id(entry) in entries for entry in as_mapping(other).values())


def describe_root(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the library whose object a pickle is as a whole, where a model is a part of that."""
    root = TorchContent.of(checkpoint).pickle.root
    is_learner = isinstance(root, Instance) and root.path.startswith("fastai.") and root.path.endswith("Learner")
    return ("fastai Learner",) if is_learner else ()


def _versions(metadata: Node) -> dict[str, int | None] | None:
    if not is_mapping(metadata):
        return None
    versions = {}
    for name, entry in as_mapping(metadata).items():
        version = as_mapping(entry).get("version")
        versions[name] = version if type(version) is int else None
    return versions


def read_records(sources: Mapping[str, StateDictSource]) -> dict[str, History]:
    """Read what bntool recorded in the ``_metadata`` of each state dict, by its key."""
    parsed: dict[int, History] = {}
    records = {}
    for key, source in sources.items():
        node = as_mapping(as_mapping(metadata_node(source.node)).get("")).get(RECORD_KEY)
        if id(node) not in parsed:
            parsed[id(node)] = parse_record(text_of(node))
        if parsed[id(node)]:
            records[key] = parsed[id(node)]
    return records
