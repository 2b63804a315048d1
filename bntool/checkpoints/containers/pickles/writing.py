"""Writing nodes back as a pickle, without importing what they name.

Opcodes are chosen as CPython's pickler chooses them for the same protocol; shared nodes are memoised, cycles work.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping

from bntool.checkpoints.containers.pickles.nodes import (
    ByteString,
    Construction,
    Dict,
    ExtensionCode,
    Global,
    Instance,
    LongBytes,
    Node,
    PersistentId,
    Set,
    Update,
)
from bntool.checkpoints.files import CHUNK
from bntool.errors import RefusedError

_BATCH = 1000  # items between a mark and SETITEMS, APPENDS or ADDITEMS, as in CPython


def write_pickle(
    write: Callable[[bytes], object], root: Node, *, protocol: int, replacements: Mapping[int, Node] | None = None
) -> None:
    """Write ``root`` as one pickle.

    Args:
        write: receives the bytes, a piece at a time.
        root: what to write.
        protocol: 2 to 5; 0 and 1 are raised to 2.
        replacements: from ``id(node)`` to the node to write in its place, wherever it occurs.

    Raises:
        RefusedError: an instance is an argument of its own construction, which no pickle opcode order can express.
    """
    _Writer(write, max(protocol, 2), replacements or {}).dump(root)


class _Writer:
    def __init__(self, write: Callable[[bytes], object], protocol: int, replacements: Mapping[int, Node]) -> None:
        self.write = write
        self.protocol = protocol
        self.replacements = replacements
        self.memo: dict[int, int] = {}
        self.under_construction: set[int] = set()

    def dump(self, root: Node) -> None:
        self.write(b"\x80" + bytes([self.protocol]))
        pending: list[Iterator[Node]] = [iter((root,))]
        while pending:  # a stack of generators instead of recursion: nesting is bounded by memory only
            for child in pending[-1]:
                node = self.replacements.get(id(child), child)
                if not self.save_leaf(node):
                    pending.append(self.save_compound(node))
                    break
            else:
                pending.pop()
        self.write(b".")

    # memo

    def put(self, node: Node) -> None:
        index = len(self.memo)
        self.memo[id(node)] = index
        if self.protocol >= 4:
            self.write(b"\x94")
        elif index < 256:
            self.write(b"q" + bytes([index]))
        else:
            self.write(struct.pack("<cI", b"r", index))

    def get(self, node: Node) -> None:
        index = self.memo[id(node)]
        self.write(b"h" + bytes([index]) if index < 256 else struct.pack("<cI", b"j", index))

    # nodes without children

    def save_leaf(self, node: Node) -> bool:  # noqa: C901 (one branch for each kind of node)
        """Write the node if it has no nodes inside; False if it has."""
        if node is None:
            self.write(b"N")
        elif node is True or node is False:
            self.write(b"\x88" if node else b"\x89")
        elif type(node) is int:
            self.save_integer(node)
        elif type(node) is float:
            self.write(b"G" + struct.pack(">d", node))
        elif type(node) is tuple and not node:
            self.write(b")")
        elif id(node) in self.memo:
            self.get(node)
        elif isinstance(node, str):
            self.save_text(node)
            self.put(node)
        elif isinstance(node, bytes | bytearray):
            self.save_bytes(node)
            self.put(node)
        elif isinstance(node, LongBytes):
            self.save_long_bytes(node)
            self.put(node)
        elif isinstance(node, Global):
            self.save_global(node)
            self.put(node)
        elif isinstance(node, ExtensionCode):
            self.write(b"\x84" + struct.pack("<i", node.code))
        else:
            return False
        return True

    def save_integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.write(b"K" + bytes([value]))
        elif 0 <= value < 1 << 16:
            self.write(b"M" + struct.pack("<H", value))
        elif -(1 << 31) <= value < 1 << 31:
            self.write(b"J" + struct.pack("<i", value))
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            head = b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))
            self.write(head + data)

    def save_text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        if self.protocol >= 4 and len(data) < 256:
            self.write(b"\x8c" + bytes([len(data)]) + data)
        elif len(data) < 1 << 32:
            self.write(b"X" + struct.pack("<I", len(data)) + data)
        else:
            self.write(b"\x8d" + struct.pack("<Q", len(data)) + data)

    def save_bytes(self, data: bytes | bytearray) -> None:
        if isinstance(data, bytearray):
            head = b"\x96" + struct.pack("<Q", len(data))
        elif len(data) < 256:
            head = (b"U" if isinstance(data, ByteString) else b"C") + bytes([len(data)])
        else:
            head = (b"T" if isinstance(data, ByteString) else b"B") + struct.pack("<I", len(data))
        self.write(head + bytes(data))

    def save_long_bytes(self, node: LongBytes) -> None:
        layout = {0x42: "<I", 0x54: "<i"}.get(node.opcode, "<Q")
        self.write(bytes([node.opcode]) + struct.pack(layout, node.length))
        for start in range(0, node.length, CHUNK):
            self.write(node.source.read(node.offset + start, min(CHUNK, node.length - start)))

    def save_global(self, node: Global) -> None:
        # a hostile name with a line break must not become opcodes of the older form
        if self.protocol >= 4 or not f"{node.module}{node.name}".isprintable():
            for text in (node.module, node.name):
                if id(text) in self.memo:
                    self.get(text)
                else:
                    self.save_text(text)
                    self.put(text)
            self.write(b"\x93")
        else:
            self.write(b"c" + f"{node.module}\n{node.name}\n".encode())

    # nodes with children: each generator yields what must be on the stack before it goes on

    def save_compound(self, node: Node) -> Iterator[Node]:
        if isinstance(node, tuple):
            return self.save_tuple(node)
        if isinstance(node, list):
            return self.save_list(node)
        if isinstance(node, Dict):
            return self.save_dict(node)
        if isinstance(node, Set):
            return self.save_set(node)
        if isinstance(node, PersistentId):
            return self.save_persistent_id(node)
        if isinstance(node, Instance):
            return self.save_instance(node)
        raise TypeError(f"{type(node).__name__} is no node of a pickle")

    def save_tuple(self, node: tuple[Node, ...]) -> Iterator[Node]:
        short = len(node) <= 3
        if not short:
            self.write(b"(")
        yield from node
        if id(node) in self.memo:  # it was saved as part of itself
            self.write(b"0" * len(node) if short else b"1")
            self.get(node)
            return
        self.write({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(node), b"t"))
        self.put(node)

    def save_list(self, node: list[Node]) -> Iterator[Node]:
        self.write(b"]")
        self.put(node)
        yield from self.save_batches(node, single=b"a", many=b"e")

    def save_dict(self, node: Dict) -> Iterator[Node]:
        self.write(b"}")
        self.put(node)
        yield from self.save_pairs(node.pairs)

    def save_set(self, node: Set) -> Iterator[Node]:
        if node.frozen:
            self.write(b"(")
            yield from node.members
            if id(node) in self.memo:
                self.write(b"1")
                self.get(node)
                return
            self.write(b"\x91")
            self.put(node)
            return
        self.write(b"\x8f")
        self.put(node)
        yield from self.save_batches(node.members, single=None, many=b"\x90")

    def save_persistent_id(self, node: PersistentId) -> Iterator[Node]:
        yield node.value
        self.write(b"Q")

    def save_instance(self, node: Instance) -> Iterator[Node]:
        if id(node) in self.under_construction:
            raise RefusedError(f"an instance of {node.path or 'something'} is an argument of its own construction")
        self.under_construction.add(id(node))
        if node.construction is Construction.OBJECT:
            self.write(b"(")
            yield node.constructor
            yield from node.arguments
            self.write(b"o")
        else:
            yield node.constructor
            yield node.arguments
            if node.construction is Construction.REDUCE:
                self.write(b"R")
            elif node.construction is Construction.NEW:
                self.write(b"\x81")
            else:
                yield node.keywords
                self.write(b"\x92")
        self.under_construction.discard(id(node))
        self.put(node)
        for update, payload in node.updates:
            if update is Update.ITEMS:
                yield from self.save_pairs(payload)
            elif update is Update.APPENDS:
                yield from self.save_batches(payload, single=b"a", many=b"e")
            elif update is Update.ADDITIONS:
                yield from self.save_batches(payload, single=None, many=b"\x90")
            else:
                yield payload
                self.write(b"b")

    def save_batches(self, values: list[Node], *, single: bytes | None, many: bytes) -> Iterator[Node]:
        for start in range(0, len(values), _BATCH):
            batch = values[start : start + _BATCH]
            if single is not None and len(batch) == 1:
                yield batch[0]
                self.write(single)
            else:
                self.write(b"(")
                yield from batch
                self.write(many)

    def save_pairs(self, pairs: list[tuple[Node, Node]]) -> Iterator[Node]:
        for start in range(0, len(pairs), _BATCH):
            batch = pairs[start : start + _BATCH]
            if len(batch) > 1:
                self.write(b"(")
            for key, value in batch:
                yield key
                yield value
            self.write(b"u" if len(batch) > 1 else b"s")
