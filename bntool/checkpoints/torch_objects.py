"""Finding state dicts and modules in the nodes of a pickle that torch wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bntool.checkpoints.checkpoint import ModuleInfo, StateDict, find_prefix
from bntool.checkpoints.pickles.nodes import (
    Dict,
    Global,
    Instance,
    Node,
    as_mapping,
    children,
    is_mapping,
    iterate_pairs,
    text_of,
)
from bntool.checkpoints.pickles.reading import Pickle
from bntool.checkpoints.tensors import StoredTensor, Tensor
from bntool.checkpoints.torch_tensors import TensorReader
from bntool.errors import BntoolError, UnsafeFileError

RECORD_KEY = "bntool"
MAX_MODULES = 200_000  # a pickled module tree with sharing can pretend to be exponentially large
MAX_DEPTH = 100  # of nested modules, and of the mappings that are searched for models

# leaf names by which a mapping of tensors is known as a state dict, besides dotted names
_LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "weight_g", "weight_v", "scale", "shift"}


@dataclass
class StateDictSource:
    """Where a state dict lies in the pickle.

    Attributes:
        node: the mapping or module node.
        tensor_nodes: the node of each tensor, by full name.
        module_nodes: the node of each module, by full path, for pickled modules.
    """

    node: Node
    tensor_nodes: dict[str, Node] = field(default_factory=dict)
    module_nodes: dict[str, Instance] = field(default_factory=dict)


@dataclass
class TorchContent:
    """What the torch formats need to write a file back.

    Attributes:
        pickle: the main pickle.
        reader: knows the tensors already read.
        container: the archive or the layout of the legacy file.
    """

    pickle: Pickle
    reader: TensorReader
    container: Any


def find_state_dicts(root: Node, reader: TensorReader) -> tuple[StateDict, ...]:
    """All state dicts and pickled modules under ``root``, in the order of the file.

    A mapping is a state dict if it holds a tensor under a dotted name or under a name like ``weight``; where nothing
    in the file does, any mapping with a floating tensor counts. Optimizer states (mappings with ``state`` and
    ``param_groups``) are passed over.
    """
    found, weak = [], []
    for path, node in _walk(root):
        key = ".".join(path)
        if _is_module(node):
            found.append(_read_module(key, node, reader))
        elif is_mapping(node):
            source = StateDictSource(node)
            tensors = _read_tensors(source, reader)
            if not tensors:
                continue
            state_dict = _make(key, tensors, source, versions=_versions(node))
            looks_right = any("." in name or name in _LEAVES for name in tensors)
            (found if looks_right else weak).append(state_dict)
    floating = [s for s in weak if any(tensor.dtype.is_floating for tensor in s.tensors.values())]
    return tuple(found or floating)


def _walk(root: Node) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Every mapping and module that can be reached by names, each once, with its path; modules are not entered."""
    pending: list[tuple[tuple[str, ...], Node]] = [((), root)]
    seen: set[int] = set()
    while pending:
        path, node = pending.pop()
        if id(node) in seen or len(path) > MAX_DEPTH:
            continue
        seen.add(id(node))
        inside: list[tuple[str, Node]] = []
        if _is_module(node):
            yield path, node
        elif isinstance(node, list | tuple):
            if len(node) <= 1000:  # longer ones are data, not models
                inside = [(str(index), value) for index, value in enumerate(node)]
        elif is_mapping(node):
            entries = as_mapping(node)
            if "param_groups" in entries and "state" in entries:
                continue
            yield path, node
            inside = list(entries.items())
        elif isinstance(node, Instance) and is_mapping(node.state):
            inside = list(as_mapping(node.state).items())
        containers = [(name, value) for name, value in inside if isinstance(value, list | tuple | Dict | Instance)]
        pending.extend(((*path, name), value) for name, value in reversed(containers))


def _read_tensors(source: StateDictSource, reader: TensorReader) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in iterate_pairs(source.node):
        name = text_of(key)
        tensor = _read_named(name, value, reader) if name is not None else None
        if name is not None and tensor is not None:
            tensors[name] = tensor
            source.tensor_nodes[name] = value
    return tensors


def _read_named(name: str, node: Node, reader: TensorReader) -> StoredTensor | None:
    try:
        return reader.read(node)
    except BntoolError as error:
        error.tensor = error.tensor or name
        raise


def _make(key: str, tensors: Mapping[str, Tensor], source: StateDictSource, **facts: Any) -> StateDict:
    return StateDict(key=key, prefix=find_prefix(list(tensors)), tensors=tensors, source=source, **facts)


def metadata_node(node: Node) -> Node:
    """The ``_metadata`` of a state dict: an attribute of the OrderedDict, or None."""
    if isinstance(node, Instance) and is_mapping(node.state):
        return as_mapping(node.state).get("_metadata")
    return None


def _versions(node: Node) -> dict[str, int | None] | None:
    metadata = metadata_node(node)
    if not is_mapping(metadata):
        return None
    versions = {}
    for name, entry in as_mapping(metadata).items():
        version = as_mapping(entry).get("version")
        versions[name] = version if type(version) is int else None
    return versions


def read_record(node: Node) -> tuple[Mapping[str, Any], ...]:
    """What bntool recorded in the ``_metadata`` of a state dict."""
    text = text_of(as_mapping(as_mapping(metadata_node(node)).get("")).get(RECORD_KEY))
    return parse_record(text)


def parse_record(text: str | bytes | None) -> tuple[Mapping[str, Any], ...]:
    """A recorded history: a JSON array of objects; anything else counts as none."""
    try:
        history = json.loads(text) if text else []
    except (ValueError, RecursionError):
        return ()
    if not isinstance(history, list):
        return ()
    return tuple(entry for entry in history if isinstance(entry, dict))


# whole modules


def _is_module(node: Node) -> bool:
    if not isinstance(node, Instance) or not node.updates:
        return False
    state = node.state
    return isinstance(state, Dict) and {"_parameters", "_modules"} <= as_mapping(state).keys()


def _read_module(key: str, root: Instance, reader: TensorReader) -> StateDict:
    """The tensors of a pickled module in the order of its state_dict(), and the attributes of its submodules."""
    source = StateDictSource(root)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, ModuleInfo] = {}
    pending: list[tuple[str, Instance, frozenset[int]]] = [("", root, frozenset())]
    while pending:
        path, node, ancestors = pending.pop()
        if len(modules) >= MAX_MODULES or len(ancestors) > MAX_DEPTH:
            raise UnsafeFileError(f"a pickled model of more than {MAX_MODULES} modules, or {MAX_DEPTH} levels")
        if id(node) in ancestors:
            continue
        state = as_mapping(node.state)
        source.module_nodes[path] = node
        modules[path] = ModuleInfo(_class_path(node), _plain_attributes(state))
        dotted = f"{path}." if path else ""
        transient = state.get("_non_persistent_buffers_set")
        hidden = set(map(text_of, children(transient))) if transient is not None else set()
        for table in ("_parameters", "_buffers"):
            for name, value in as_mapping(state.get(table)).items():
                tensor = _read_named(dotted + name, value, reader)
                if tensor is not None and name not in hidden:
                    tensors[dotted + name] = tensor
                    source.tensor_nodes[dotted + name] = value
        below = ancestors | {id(node)}
        submodules = [(n, v) for n, v in as_mapping(state.get("_modules")).items() if _is_module(v)]
        pending.extend((dotted + name, value, below) for name, value in reversed(submodules))
    return _make(key, tensors, source, modules=modules, is_module=True)


def _class_path(node: Instance) -> str:
    """The class of a pickled module: copyreg's helper names it in its arguments."""
    if node.path in ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"):
        first = node.arguments[0] if isinstance(node.arguments, tuple) and node.arguments else None
        return first.path if isinstance(first, Global) else ""
    return node.path


def _plain_attributes(state: Mapping[str, Node]) -> dict[str, Any]:
    """The attributes of a module that are plain numbers, texts, or tuples of them."""
    return {name: value for name, value in state.items() if not name.startswith("_") and _is_plain(value)}


def _is_plain(value: Node) -> bool:
    if isinstance(value, tuple):
        return len(value) <= 8 and all(isinstance(item, bool | int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
