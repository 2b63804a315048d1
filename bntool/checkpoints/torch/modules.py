"""Reading pickled modules: their tensors in the order of state_dict(), and the attributes of each submodule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bntool.batchnorm import STATISTICS
from bntool.checkpoints.checkpoint import ModuleInfo, StateDict
from bntool.checkpoints.containers.pickles.nodes import (
    Dict,
    Global,
    Instance,
    Node,
    PersistentId,
    Set,
    as_mapping,
    text_of,
)
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import Tensor
from bntool.checkpoints.torch.tensors import TensorReader
from bntool.errors import UnsafeFileError

_NORM = r"[Nn]orm|BN|_bn|\bbn"  # in the name of a class
MAX_DEPTH = 100  # of nested modules, and of the mappings that are searched for models
MAX_PATH = 10_000  # characters
MAX_EFFORT = 1_000_000  # attributes looked at: a module tree with sharing can pretend to be exponentially large


@dataclass(repr=False, eq=False)
class StateDictSource:
    """The place of a state dict in the pickle.

    Attributes:
        node: the mapping or module node.
        tensor_nodes: the node of each tensor, by full name.
        module_nodes: the node of each module, by full path, for pickled modules.
        not_understood: names of what lies where a tensor should, and is none that is known.
    """

    node: Node
    tensor_nodes: dict[str, Node] = field(default_factory=dict)
    module_nodes: dict[str, Instance] = field(default_factory=dict)
    not_understood: list[str] = field(default_factory=list)


def is_module(node: Node) -> bool:
    """Return whether unpickling the node would give a torch.nn.Module."""
    if not isinstance(node, Instance) or not node.updates:
        return False
    state = node.state
    return isinstance(state, Dict) and {"_parameters", "_modules"} <= as_mapping(state).keys()


class ModuleReader:
    """Reads the pickled modules of one file, with a bound on the effort for all of them together."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._effort = 0

    def read(self, key: str, root: Instance) -> tuple[StateDict, StateDictSource]:
        """Return one pickled module with all below it, and where it lies in the pickle.

        Raises:
            CorruptFileError: a malformed tensor.
            UnsafeFileError: more modules, or deeper ones, than any model has.
        """
        source = StateDictSource(root)
        tensors: dict[str, Tensor] = {}
        modules: dict[str, ModuleInfo] = {}
        pending: list[tuple[str, Instance, frozenset[int]]] = [("", root, frozenset())]
        while pending:
            path, node, ancestors = pending.pop()
            if id(node) in ancestors:
                continue
            if len(ancestors) > MAX_DEPTH or len(path) > MAX_PATH:
                raise UnsafeFileError(f"the pickled model has more than {MAX_DEPTH} levels, or absurdly long names")
            state = as_mapping(node.state)
            self._spend(1 + len(state))
            source.module_nodes[path] = node
            modules[path] = ModuleInfo(_class_path(node), plain_attributes(state))
            dotted = f"{path}." if path else ""
            self._read_own_tensors(dotted, state, source, tensors, class_path=modules[path].class_path)
            below = ancestors | {id(node)}
            table = as_mapping(state.get("_modules"))
            self._spend(len(table))
            submodules = [(name, value) for name, value in table.items() if is_module(value)]
            pending.extend((dotted + name, value, below) for name, value in reversed(submodules))
        prefix = find_prefix(list(tensors))
        return StateDict(key, prefix, tensors, modules=modules, is_module=True), source

    def _read_own_tensors(
        self,
        dotted: str,
        state: Mapping[str, Node],
        source: StateDictSource,
        tensors: dict[str, Tensor],
        *,
        class_path: str,
    ) -> None:
        may_normalise = re.search(_NORM, class_path) is not None
        hidden = _names_in_set(state.get("_non_persistent_buffers_set"))
        for table in (as_mapping(state.get("_parameters")), as_mapping(state.get("_buffers"))):
            self._spend(len(table))
            for name, value in table.items():
                tensor = self._reader.read_named(dotted + name, value)
                if tensor is not None and name not in hidden:
                    tensors[dotted + name] = tensor
                    source.tensor_nodes[dotted + name] = value
                elif tensor is None and value is not None and (may_normalise or name in STATISTICS):
                    source.not_understood.append(dotted + name)

    def _spend(self, items: int) -> None:
        self._effort += items
        if self._effort > MAX_EFFORT:
            raise UnsafeFileError(f"the pickled modules have more than {MAX_EFFORT} attributes")


def _names_in_set(node: Node) -> set[str | None]:
    """Return the texts in a set; before protocol 4 a set is pickled as a call of ``set`` with a list."""
    if isinstance(node, Instance) and isinstance(node.arguments, tuple) and len(node.arguments) == 1:
        node = node.arguments[0]
    members = node.members if isinstance(node, Set) else node
    return set(map(text_of, members)) if isinstance(members, list) else set()


# helpers whose first argument is the class: those of pickle, and the one of frozen modules
_NAMING_THEIR_CLASS = (
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "copyreg.__newobj__",
    "bntool.freezing.held_modules.rebuild_held",
)


def _class_path(node: Instance) -> str:
    """Return the class of a pickled module: copyreg's helper names it in its arguments, the legacy format keeps its
    source.
    """
    constructor = node.constructor
    if isinstance(constructor, PersistentId):  # ("module", class, file name, source code)
        facts = constructor.value
        known = isinstance(facts, tuple) and len(facts) > 1 and isinstance(facts[1], Global)
        return facts[1].path if known else ""
    if node.path in _NAMING_THEIR_CLASS:
        first = node.arguments[0] if isinstance(node.arguments, tuple) and node.arguments else None
        return first.path if isinstance(first, Global) else ""
    return node.path


def plain_attributes(state: Mapping[str, Node]) -> dict[str, Any]:
    """Return the attributes of a module that are plain numbers, texts, or tuples of them."""
    return {name: value for name, value in state.items() if not name.startswith("_") and _is_plain(value)}


def _is_plain(value: Node) -> bool:
    if isinstance(value, tuple):
        return len(value) <= 8 and all(isinstance(item, bool | int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
