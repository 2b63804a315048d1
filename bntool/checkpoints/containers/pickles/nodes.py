"""The contents of a pickle, as symbolic nodes.

None, bool, int, float, str, bytes, bytearray, tuple and list stand for themselves. Everything else is one of the
classes below. Nothing named in a pickle is imported or called; identity is kept, so shared objects stay shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, TypeAlias

from bntool.checkpoints.files import ByteSource

Node: TypeAlias = Any  # an honest Any: a pickle can hold anything


class Construction(Enum):
    """The opcode family that made an instance."""

    REDUCE = "reduce"
    NEW = "new"
    NEW_WITH_KEYWORDS = "new with keywords"
    OBJECT = "object"  # OBJ and INST of protocols 0 and 1


class Update(Enum):
    """A change that a pickle made to an instance after it was made."""

    ITEMS = "items"  # payload: list of (key, value)
    APPENDS = "appends"  # payload: list of values
    ADDITIONS = "additions"  # payload: list of values
    STATE = "state"  # payload: the state


class Global:
    """A class or function by name."""

    __slots__ = ("module", "name", "path")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name
        self.path = f"{module}.{name}"

    def __repr__(self) -> str:
        return f"Global({self.path})"


class PersistentId:
    """A reference to something outside of the pickle; for torch, a storage.

    Attributes:
        reference: what torch's reader made of ``value``, kept for the next file that has this pickle.
    """

    __slots__ = ("reference", "value")

    def __init__(self, value: Node) -> None:
        self.value = value
        self.reference: tuple[object, ...] | None = None


class ExtensionCode:
    """A class by its number in copyreg's extension registry."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class ByteString(bytes):
    """A ``str`` of Python 2: bytes that were usually text."""

    @property
    def text(self) -> str:
        return self.decode("latin-1")


class LongBytes:
    """Bytes too long to read before somebody asks for them.

    Attributes:
        opcode: the opcode that announced them, to write them back alike.
    """

    __slots__ = ("length", "offset", "opcode", "source")

    def __init__(self, source: ByteSource, *, offset: int, length: int, opcode: int) -> None:
        self.source = source
        self.offset = offset
        self.length = length
        self.opcode = opcode


class Dict:
    """A dict as the pairs that the pickle sets, in order."""

    __slots__ = ("by_name", "pairs")

    def __init__(self, pairs: list[tuple[Node, Node]] | None = None) -> None:
        self.pairs = [] if pairs is None else pairs
        self.by_name: dict[str, Node] | None = None  # see as_mapping


class Set:
    """A set or frozenset."""

    __slots__ = ("frozen", "members")

    def __init__(self, members: list[Node] | None = None, *, frozen: bool = False) -> None:
        self.members = [] if members is None else members
        self.frozen = frozen


class Instance:
    """The result of a call or construction that was never made.

    Attributes:
        constructor: what would be called: a :class:`Global`, or any other node in a hostile file.
        arguments: a tuple, or any other node in a hostile file.
        keywords: for :attr:`Construction.NEW_WITH_KEYWORDS`, else None.
        updates: what followed, in order.
    """

    __slots__ = ("arguments", "by_name", "construction", "constructor", "keywords", "updates")

    def __init__(
        self, constructor: Node, arguments: Node, *, construction: Construction, keywords: Node = None
    ) -> None:
        self.constructor = constructor
        self.arguments = arguments
        self.construction = construction
        self.keywords = keywords
        self.updates: list[tuple[Update, Node]] = []
        self.by_name: dict[str, Node] | None = None  # see as_mapping

    @property
    def path(self) -> str:
        """Dotted name of the class or function, or "" where the constructor is no global."""
        return self.constructor.path if isinstance(self.constructor, Global) else ""

    @property
    def state(self) -> Node:
        """The last state given by BUILD, or None."""
        states = [payload for update, payload in self.updates if update is Update.STATE]
        return states[-1] if states else None

    def __repr__(self) -> str:
        return f"Instance({self.path or type(self.constructor).__name__})"


def text_of(node: Node) -> str | None:
    """Return the node as text where it is a string of Python 2 or 3, else None."""
    if isinstance(node, str):
        return node
    return node.text if isinstance(node, ByteString) else None


def iterate_pairs(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield the items of a dict or of an instance that was given items (OrderedDict, defaultdict, subclasses of
    dict).
    """
    if isinstance(node, Dict):
        yield from node.pairs
    elif isinstance(node, Instance):
        for update, payload in node.updates:
            if update is Update.ITEMS:
                yield from payload


def is_mapping(node: Node) -> bool:
    """Return whether the node holds items by key, or is a mapping that stayed empty."""
    if isinstance(node, Dict):
        return True
    if not isinstance(node, Instance):
        return False
    return node.path.endswith(("OrderedDict", "defaultdict", "Counter")) or any(
        update is Update.ITEMS for update, _ in node.updates
    )


def as_mapping(node: Node) -> Mapping[str, Node]:
    """Return the items whose keys are text; the last one wins, as it would in Python.

    Kept with the node once the file is read: a hostile file can let a million objects share one large mapping.
    """
    if not isinstance(node, Dict | Instance):
        return {}
    if node.by_name is None:
        node.by_name = {}
        for key, value in iterate_pairs(node):
            name = text_of(key)
            if name is not None:
                node.by_name[name] = value
    return node.by_name


def children(node: Node) -> Iterable[Node]:
    """Return the nodes directly inside a node."""
    if isinstance(node, _SEQUENCES):
        return node
    if isinstance(node, Dict):
        return [part for pair in node.pairs for part in pair]
    if isinstance(node, Set):
        return node.members
    if isinstance(node, PersistentId):
        return (node.value,)
    if isinstance(node, Instance):
        inside = [node.constructor, node.arguments, node.keywords]
        for update, payload in node.updates:
            if update is Update.ITEMS:
                inside += [part for pair in payload for part in pair]
            elif update is Update.STATE:
                inside.append(payload)
            else:
                inside += payload
        return inside
    return ()


def walk_nodes(root: Node, replacements: Mapping[int, Node] | None = None) -> Iterator[Node]:
    """Yield every node below ``root`` that has others inside, each once; some, by their id, replaced by others."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if replacements:
            node = replacements.get(id(node), node)
        if type(node) in _CONTAINERS and id(node) not in seen:
            seen.add(id(node))
            yield node
            pending += [child for child in children(node) if type(child) in _CONTAINERS]


# a union in their place would be made anew for each of a million nodes
_SEQUENCES = (tuple, list)
_CONTAINERS = frozenset((tuple, list, Dict, Instance, PersistentId, Set))  # no class is derived from them
