"""A pickle machine that builds nodes and calls nothing. Protocols 0 to 5."""

from __future__ import annotations

import ast
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bntool.checkpoints.files import ByteSource, MemorySource
from bntool.checkpoints.pickles.nodes import (
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
from bntool.errors import CorruptFileError, UnsafeFileError

MAX_OPCODES = 20_000_000  # far above any checkpoint seen (a resnet152 takes 60 thousand); bounds time and memory
INLINE_BYTES = 1 << 16  # byte strings longer than this stay in the file until they are asked for
MAX_TEXT = 1 << 26  # a longer text or integer is an attack on memory
_WINDOW = 1 << 16

_MARK = object()


@dataclass
class Pickle:
    """One pickle of a file.

    Attributes:
        root: what it holds.
        protocol: as declared by PROTO, 0 where it is not.
        start, end: where it lies in its source.
        called: globals that unpickling would call, in order of appearance.
        referenced: globals that it would only import.
        persistent_ids: in order of appearance.
    """

    root: Node
    protocol: int
    start: int
    end: int
    called: list[Global] = field(default_factory=list)
    referenced: list[Global] = field(default_factory=list)
    persistent_ids: list[PersistentId] = field(default_factory=list)


def read_pickle(source: ByteSource, *, offset: int = 0) -> Pickle:
    """Read the pickle that starts at ``offset``.

    Raises:
        CorruptFileError: truncated, an unknown opcode, or a stack that does not work out.
        UnsafeFileError: more opcodes or longer texts than any checkpoint needs.
    """
    machine = _Machine(source, offset)
    try:
        return machine.run()
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error, SyntaxError) as error:
        raise CorruptFileError(f"the pickle is malformed near byte {machine.position}") from error


class _Machine:
    def __init__(self, source: ByteSource, offset: int) -> None:
        self.source = source
        self.start = offset
        self.base = offset  # position in the source of window[0]
        self.window = b""
        self.cursor = 0  # next byte in the window
        self.stack: list[Any] = []
        self.memo: dict[int, Node] = {}
        self.protocol = 0
        self.globals: dict[tuple[str, str], Global] = {}
        self.called: dict[Global, None] = {}  # in order of appearance
        self.persistent_ids: list[PersistentId] = []

    @property
    def position(self) -> int:
        return self.base + self.cursor

    # bytes of the stream

    def take(self, count: int) -> bytes:
        end = self.cursor + count
        if end > len(self.window):
            self.refill(count)
            end = self.cursor + count
        data = self.window[self.cursor : end]
        self.cursor = end
        return data

    def refill(self, count: int) -> None:
        position = self.position
        available = self.source.size - position
        if count > available:
            raise CorruptFileError("the pickle is truncated")
        self.window = self.source.read(position, min(max(count, _WINDOW), available))
        self.base, self.cursor = position, 0

    def number(self, layout: struct.Struct) -> int:
        value: int = layout.unpack(self.take(layout.size))[0]
        return value

    def line(self) -> bytes:
        parts = bytearray()
        while True:
            byte = self.take(1)
            if byte == b"\n":
                return bytes(parts)
            parts += byte
            if len(parts) > MAX_TEXT:
                raise UnsafeFileError("a line of the pickle is too long")

    def text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise UnsafeFileError(f"a text of {length} bytes in the pickle")
        return self.take(length).decode("utf-8", "surrogatepass")

    def byte_run(self, length: int, opcode: int) -> bytes | LongBytes:
        if length <= INLINE_BYTES:
            return self.take(length)
        position = self.position
        if length > self.source.size - position:
            raise CorruptFileError("the pickle is truncated")
        self.base, self.window, self.cursor = position + length, b"", 0
        return LongBytes(self.source, offset=position, length=length, opcode=opcode)

    # the stack

    def pop_mark(self) -> list[Node]:
        """Everything above the topmost mark."""
        stack = self.stack
        index = len(stack) - 1
        while stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise CorruptFileError("the pickle is malformed: no mark")
        items = stack[index + 1 :]
        del stack[index:]
        return items

    def pop(self) -> Node:
        value = self.stack.pop()
        if value is _MARK:
            raise CorruptFileError("the pickle is malformed: a mark where a value should be")
        return value

    def top(self) -> Node:
        value = self.stack[-1]
        if value is _MARK:
            raise CorruptFileError("the pickle is malformed: a mark where a value should be")
        return value

    def push_global(self, module: str, name: str) -> None:
        key = (module, name)
        if key not in self.globals:
            self.globals[key] = Global(module, name)
        self.stack.append(self.globals[key])

    def push_instance(self, constructor: Node, arguments: Node, how: Construction, keywords: Node = None) -> None:
        if isinstance(constructor, Global):
            self.called[constructor] = None
        self.stack.append(Instance(constructor, arguments, construction=how, keywords=keywords))

    def set_items(self, pairs: list[tuple[Node, Node]]) -> None:
        target = self.top()
        if isinstance(target, Dict):
            target.pairs.extend(pairs)
        elif isinstance(target, Instance):
            target.updates.append((Update.ITEMS, pairs))
        else:
            raise CorruptFileError("the pickle sets items of something that has none")

    def append(self, values: list[Node]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Instance):
            target.updates.append((Update.APPENDS, values))
        else:
            raise CorruptFileError("the pickle appends to something that is no list")

    def add(self, values: list[Node]) -> None:
        target = self.top()
        if isinstance(target, Set):
            target.members.extend(values)
        elif isinstance(target, Instance):
            target.updates.append((Update.ADDITIONS, values))
        else:
            raise CorruptFileError("the pickle adds to something that is no set")

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if not isinstance(target, Instance):
            raise CorruptFileError("the pickle sets the state of something that has none")
        target.updates.append((Update.STATE, state))

    # the loop

    def run(self) -> Pickle:
        actions = _ACTIONS
        for _ in range(MAX_OPCODES):
            if self.cursor >= len(self.window):
                self.refill(1)
            opcode = self.window[self.cursor]
            self.cursor += 1
            if opcode == 0x2E:  # STOP
                return self.finish()
            action = actions[opcode]
            if action is None:
                raise CorruptFileError(f"byte {self.position - 1} is no pickle opcode (0x{opcode:02x})")
            action(self)
        raise UnsafeFileError(f"the pickle has more than {MAX_OPCODES} opcodes")

    def finish(self) -> Pickle:
        root = self.pop()
        referenced = [node for node in self.globals.values() if node not in self.called]
        return Pickle(
            root=root,
            protocol=self.protocol,
            start=self.start,
            end=self.position,
            called=list(self.called),
            referenced=referenced,
            persistent_ids=self.persistent_ids,
        )


_U1, _U2, _U4, _U8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_Action = Callable[[_Machine], None]
_ACTIONS: list[_Action | None] = [None] * 256


def _opcode(code: bytes) -> Callable[[_Action], _Action]:
    def register(action: _Action) -> _Action:
        _ACTIONS[code[0]] = action
        return action

    return register


def _push(code: bytes, make: Callable[[_Machine], Node]) -> None:
    _ACTIONS[code[0]] = lambda m: m.stack.append(make(m))


def _pairs(flat: list[Node]) -> list[tuple[Node, Node]]:
    if len(flat) % 2:
        raise CorruptFileError("the pickle sets a key without a value")
    return list(zip(flat[::2], flat[1::2], strict=True))


def _check_length(length: int) -> int:
    if length < 0:
        raise CorruptFileError("negative length in the pickle")
    if length > MAX_TEXT:
        raise UnsafeFileError(f"an item of {length} bytes in the pickle")
    return length


def _text_integer(line: bytes) -> int | bool:
    if line in (b"00", b"01"):  # how protocols 0 and 1 write booleans
        return line == b"01"
    if len(line) > 4300:  # the cost of decimal conversion grows with the square
        raise UnsafeFileError("a decimal integer of the pickle is too long")
    return int(line.rstrip(b"L"))


def _python2_string(line: bytes) -> ByteString:
    value = ast.literal_eval(line.decode("latin-1"))  # only literals: a quoted string with escapes
    if not isinstance(value, str):
        raise CorruptFileError("a string of the pickle is not quoted")
    return ByteString(value.encode("latin-1"))


_push(b"N", lambda m: None)
_push(b"\x88", lambda m: True)
_push(b"\x89", lambda m: False)
_push(b"(", lambda m: _MARK)
_push(b"K", lambda m: m.number(_U1))
_push(b"M", lambda m: m.number(_U2))
_push(b"J", lambda m: m.number(_I4))
_push(b"I", lambda m: _text_integer(m.line()))
_push(b"L", lambda m: _text_integer(m.line()))
_push(b"\x8a", lambda m: int.from_bytes(m.take(m.number(_U1)), "little", signed=True))
_push(b"\x8b", lambda m: int.from_bytes(m.take(_check_length(m.number(_I4))), "little", signed=True))
_push(b"F", lambda m: float(m.line()))
_push(b"G", lambda m: _F8.unpack(m.take(8))[0])
_push(b"S", lambda m: _python2_string(m.line()))
_push(b"U", lambda m: ByteString(m.take(m.number(_U1))))
_push(b"T", lambda m: _long_string(m))
_push(b"V", lambda m: m.line().decode("raw-unicode-escape"))
_push(b"X", lambda m: m.text(m.number(_U4)))
_push(b"\x8c", lambda m: m.text(m.number(_U1)))
_push(b"\x8d", lambda m: m.text(m.number(_U8)))
_push(b"C", lambda m: m.take(m.number(_U1)))
_push(b"B", lambda m: m.byte_run(m.number(_U4), 0x42))
_push(b"\x8e", lambda m: m.byte_run(m.number(_U8), 0x8E))
_push(b"\x96", lambda m: _byte_array(m))
_push(b")", lambda m: ())
_push(b"]", lambda m: [])
_push(b"}", lambda m: Dict())
_push(b"\x8f", lambda m: Set())
_push(b"l", lambda m: m.pop_mark())
_push(b"t", lambda m: tuple(m.pop_mark()))
_push(b"d", lambda m: Dict(_pairs(m.pop_mark())))
_push(b"\x91", lambda m: Set(m.pop_mark(), frozen=True))
_push(b"\x85", lambda m: (m.pop(),))
_push(b"P", lambda m: _persistent_id(m, m.line().decode("ascii")))
_push(b"Q", lambda m: _persistent_id(m, m.pop()))
_push(b"\x82", lambda m: ExtensionCode(m.number(_U1)))
_push(b"\x83", lambda m: ExtensionCode(m.number(_U2)))
_push(b"\x84", lambda m: ExtensionCode(m.number(_I4)))
_push(b"g", lambda m: m.memo[int(m.line())])
_push(b"h", lambda m: m.memo[m.number(_U1)])
_push(b"j", lambda m: m.memo[m.number(_U4)])


def _persistent_id(m: _Machine, value: Node) -> PersistentId:
    node = PersistentId(value)
    m.persistent_ids.append(node)
    return node


def _long_string(m: _Machine) -> ByteString | LongBytes:
    length = m.number(_I4)
    if length < 0:
        raise CorruptFileError("negative length in the pickle")
    data = m.byte_run(length, 0x54)
    return data if isinstance(data, LongBytes) else ByteString(data)


def _byte_array(m: _Machine) -> bytearray | LongBytes:
    data = m.byte_run(m.number(_U8), 0x96)
    return data if isinstance(data, LongBytes) else bytearray(data)


@_opcode(b"\x80")
def _proto(m: _Machine) -> None:
    m.protocol = m.number(_U1)
    if m.protocol > 5:
        raise CorruptFileError(f"pickle protocol {m.protocol} is unknown")


@_opcode(b"\x95")
def _frame(m: _Machine) -> None:
    m.take(8)  # frames only help readers that read ahead


@_opcode(b"\x86")
def _tuple2(m: _Machine) -> None:
    second = m.pop()
    m.stack.append((m.pop(), second))


@_opcode(b"\x87")
def _tuple3(m: _Machine) -> None:
    third = m.pop()
    second = m.pop()
    m.stack.append((m.pop(), second, third))


@_opcode(b"0")
def _pop(m: _Machine) -> None:
    m.stack.pop()


@_opcode(b"1")
def _pop_mark(m: _Machine) -> None:
    m.pop_mark()


@_opcode(b"2")
def _duplicate(m: _Machine) -> None:
    m.stack.append(m.top())


@_opcode(b"p")
def _put(m: _Machine) -> None:
    m.memo[int(m.line())] = m.top()


@_opcode(b"q")
def _binput(m: _Machine) -> None:
    m.memo[m.number(_U1)] = m.top()


@_opcode(b"r")
def _long_binput(m: _Machine) -> None:
    m.memo[m.number(_U4)] = m.top()  # a dict: a huge index costs nothing


@_opcode(b"\x94")
def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.top()


@_opcode(b"a")
def _append(m: _Machine) -> None:
    value = m.pop()
    m.append([value])


@_opcode(b"e")
def _appends(m: _Machine) -> None:
    m.append(m.pop_mark())


@_opcode(b"s")
def _setitem(m: _Machine) -> None:
    value = m.pop()
    key = m.pop()
    m.set_items([(key, value)])


@_opcode(b"u")
def _setitems(m: _Machine) -> None:
    m.set_items(_pairs(m.pop_mark()))


@_opcode(b"\x90")
def _additems(m: _Machine) -> None:
    m.add(m.pop_mark())


@_opcode(b"b")
def _build(m: _Machine) -> None:
    m.build()


@_opcode(b"c")
def _global(m: _Machine) -> None:
    module = m.line().decode("utf-8")
    m.push_global(module, m.line().decode("utf-8"))


@_opcode(b"\x93")
def _stack_global(m: _Machine) -> None:
    name = m.pop()
    module = m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise CorruptFileError("the pickle names a global by something that is no text")
    m.push_global(module, name)


@_opcode(b"R")
def _reduce(m: _Machine) -> None:
    arguments = m.pop()
    m.push_instance(m.pop(), arguments, Construction.REDUCE)


@_opcode(b"\x81")
def _newobj(m: _Machine) -> None:
    arguments = m.pop()
    m.push_instance(m.pop(), arguments, Construction.NEW)


@_opcode(b"\x92")
def _newobj_ex(m: _Machine) -> None:
    keywords = m.pop()
    arguments = m.pop()
    m.push_instance(m.pop(), arguments, Construction.NEW_WITH_KEYWORDS, keywords)


@_opcode(b"i")
def _inst(m: _Machine) -> None:
    module = m.line().decode("utf-8")
    m.push_global(module, m.line().decode("utf-8"))
    constructor = m.pop()
    m.push_instance(constructor, tuple(m.pop_mark()), Construction.OBJECT)


@_opcode(b"o")
def _obj(m: _Machine) -> None:
    items = m.pop_mark()
    m.push_instance(items[0], tuple(items[1:]), Construction.OBJECT)


def read_pickle_bytes(data: bytes) -> Pickle:
    """Like :func:`read_pickle`, for a pickle in memory."""
    return read_pickle(MemorySource(data))
