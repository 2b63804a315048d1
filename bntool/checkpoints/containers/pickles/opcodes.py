"""The opcodes of protocols 0 to 5, and how each changes the machine."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from bntool.checkpoints.containers.pickles.machine import MARK, MAX_DIGITS, MAX_INTEGER, Machine
from bntool.checkpoints.containers.pickles.nodes import (
    ByteString,
    Construction,
    Dict,
    ExtensionCode,
    LongBytes,
    Node,
    PersistentId,
    Set,
)
from bntool.errors import CorruptFileError, UnsafeFileError

_U2, _U4, _U8 = (struct.Struct(code) for code in ("<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
Action = Callable[[Machine], None]
ACTIONS: list[Action | None] = [None] * 256
STOP = 0x2E  # ends the loop, so it needs no action


def _opcode(code: bytes) -> Callable[[Action], Action]:
    def register(action: Action) -> Action:
        ACTIONS[code[0]] = action
        return action

    return register


def _push(code: bytes, make: Callable[[Machine], Node]) -> None:
    ACTIONS[code[0]] = lambda m: m.stack.append(make(m))


def _pairs(flat: list[Node]) -> list[tuple[Node, Node]]:
    if len(flat) % 2:
        raise CorruptFileError("the pickle sets a key without a value")
    return list(zip(flat[::2], flat[1::2], strict=True))


def _check_length(length: int, most: int) -> int:
    if length < 0:
        raise CorruptFileError("a length in the pickle is negative")
    if length > most:
        raise UnsafeFileError(f"the pickle holds an item of {length} bytes, above the limit of {most}")
    return length


def _text_integer(line: bytes) -> int | bool:
    if line in (b"00", b"01"):  # how protocols 0 and 1 write booleans
        return line == b"01"
    if len(line) > MAX_DIGITS:
        raise UnsafeFileError(f"an integer of the pickle has {len(line)} digits, above the limit of {MAX_DIGITS}")
    return int(line.rstrip(b"L"))


_ESCAPE = rb"(?s)\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.|\Z)"
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}


def _python2_string(line: bytes) -> ByteString:
    """Parse what Python 2 wrote as ``repr``: quoted, with backslash escapes."""
    if len(line) < 2 or line[:1] not in b"'\"" or line[-1:] != line[:1]:
        raise CorruptFileError("a string of the pickle is not quoted")
    return ByteString(re.sub(_ESCAPE, _unescape, line[1:-1]))


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if code[:1] == b"x" and len(code) == 3:
        return bytes([int(code[1:], 16)])
    if code[:1].isdigit() and code < b"8":
        return bytes([int(code, 8) & 0xFF])
    if code in (b"\\", b"'", b'"'):
        return code
    return _ESCAPED.get(code, match[0])


_push(b"N", lambda _: None)
_push(b"\x88", lambda _: True)
_push(b"\x89", lambda _: False)
_push(b"(", lambda _: MARK)
_push(b"K", lambda m: m.byte())
_push(b"M", lambda m: m.number(_U2))
_push(b"J", lambda m: m.number(_I4))
_push(b"I", lambda m: _text_integer(m.line()))
_push(b"L", lambda m: _text_integer(m.line()))
_push(b"\x8a", lambda m: int.from_bytes(m.take(m.byte()), "little", signed=True))
_push(b"\x8b", lambda m: int.from_bytes(m.take(_check_length(m.number(_I4), MAX_INTEGER)), "little", signed=True))
_push(b"F", lambda m: float(m.line()))
_push(b"G", lambda m: _F8.unpack(m.take(8))[0])
_push(b"S", lambda m: _python2_string(m.line()))
_push(b"U", lambda m: ByteString(m.take(m.byte())))
_push(b"V", lambda m: m.line().decode("raw-unicode-escape"))
_push(b"X", lambda m: m.text(m.number(_U4)))
_push(b"\x8c", lambda m: m.text(m.byte()))
_push(b"\x8d", lambda m: m.text(m.number(_U8)))
_push(b"C", lambda m: m.take(m.byte()))
_push(b"B", lambda m: m.byte_run(m.number(_U4), 0x42))
_push(b"\x8e", lambda m: m.byte_run(m.number(_U8), 0x8E))
_push(b")", lambda _: ())
_push(b"]", lambda _: [])
_push(b"}", lambda _: Dict())
_push(b"\x8f", lambda _: Set())
_push(b"l", lambda m: m.pop_mark())
_push(b"d", lambda m: Dict(_pairs(m.pop_mark())))
_push(b"\x91", lambda m: Set(m.pop_mark(), frozen=True))
_push(b"\x85", lambda m: (m.pop(),))
_push(b"P", lambda m: _persistent_id(m, m.line().decode("ascii")))
_push(b"Q", lambda m: _persistent_id(m, m.pop()))
_push(b"\x82", lambda m: _extension(m, m.byte()))
_push(b"\x83", lambda m: _extension(m, m.number(_U2)))
_push(b"\x84", lambda m: _extension(m, m.number(_I4)))
_push(b"g", lambda m: m.memo[m.decimal()])
_push(b"h", lambda m: m.memo[m.byte()])
_push(b"j", lambda m: m.memo[m.number(_U4)])


def _extension(m: Machine, code: int) -> ExtensionCode:
    node = ExtensionCode(code)
    m.extensions.append(node)
    return node


def _persistent_id(m: Machine, value: Node) -> PersistentId:
    node = PersistentId(value)
    m.persistent_ids.append(node)
    return node


def _long_string(m: Machine) -> ByteString | LongBytes:
    length = m.number(_I4)
    if length < 0:
        raise CorruptFileError("a length in the pickle is negative")
    data = m.byte_run(length, 0x54)
    return data if isinstance(data, LongBytes) else ByteString(data)


def _byte_array(m: Machine) -> bytearray | LongBytes:
    data = m.byte_run(m.number(_U8), 0x96)
    return data if isinstance(data, LongBytes) else bytearray(data)


_push(b"T", _long_string)
_push(b"\x96", _byte_array)


@_opcode(b"\x80")
def _proto(m: Machine) -> None:
    m.protocol = m.byte()
    if m.protocol > 5:
        raise CorruptFileError(f"pickle protocol {m.protocol} is unknown")


@_opcode(b"\x95")
def _frame(m: Machine) -> None:
    m.take(8)  # frames only help readers that read ahead


@_opcode(b"t")
def _tuple(m: Machine) -> None:
    m.stack.append(tuple(m.pop_mark()))


@_opcode(b"\x86")
def _tuple2(m: Machine) -> None:
    second = m.pop()
    m.stack.append((m.pop(), second))


@_opcode(b"\x87")
def _tuple3(m: Machine) -> None:
    third = m.pop()
    second = m.pop()
    m.stack.append((m.pop(), second, third))


@_opcode(b"0")
def _pop(m: Machine) -> None:
    m.stack.pop()
    m.dropped = True


@_opcode(b"1")
def _pop_mark(m: Machine) -> None:
    m.pop_mark()
    m.dropped = True


@_opcode(b"2")
def _duplicate(m: Machine) -> None:
    m.stack.append(m.top())


@_opcode(b"p")
def _put(m: Machine) -> None:
    m.memo[m.decimal()] = m.top()


@_opcode(b"q")
def _binput(m: Machine) -> None:
    m.memo[m.byte()] = m.top()


@_opcode(b"r")
def _long_binput(m: Machine) -> None:
    m.memo[m.number(_U4)] = m.top()  # a dict: a huge index costs nothing


@_opcode(b"\x94")
def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.top()


@_opcode(b"a")
def _append(m: Machine) -> None:
    value = m.pop()
    m.append([value])


@_opcode(b"e")
def _appends(m: Machine) -> None:
    m.append(m.pop_mark())


@_opcode(b"s")
def _setitem(m: Machine) -> None:
    value = m.pop()
    key = m.pop()
    m.set_items([(key, value)])


@_opcode(b"u")
def _setitems(m: Machine) -> None:
    m.set_items(_pairs(m.pop_mark()))


@_opcode(b"\x90")
def _additems(m: Machine) -> None:
    m.add(m.pop_mark())


@_opcode(b"b")
def _build(m: Machine) -> None:
    m.build()


@_opcode(b"c")
def _global(m: Machine) -> None:
    module = m.line().decode("utf-8")
    m.push_global(module, m.line().decode("utf-8"))


@_opcode(b"\x93")
def _stack_global(m: Machine) -> None:
    name = m.pop()
    module = m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise CorruptFileError("the pickle names a global by something that is no text")
    m.push_global(module, name)


@_opcode(b"R")
def _reduce(m: Machine) -> None:
    arguments = m.pop()
    m.push_instance(m.pop(), arguments, Construction.REDUCE)


@_opcode(b"\x81")
def _newobj(m: Machine) -> None:
    arguments = m.pop()
    m.push_instance(m.pop(), arguments, Construction.NEW)


@_opcode(b"\x92")
def _newobj_ex(m: Machine) -> None:
    keywords = m.pop()
    arguments = m.pop()
    m.push_instance(m.pop(), arguments, Construction.NEW_WITH_KEYWORDS, keywords)


@_opcode(b"i")
def _inst(m: Machine) -> None:
    module = m.line().decode("utf-8")
    m.push_global(module, m.line().decode("utf-8"))
    constructor = m.pop()
    m.push_instance(constructor, tuple(m.pop_mark()), Construction.OBJECT)


@_opcode(b"o")
def _obj(m: Machine) -> None:
    items = m.pop_mark()
    m.push_instance(items[0], tuple(items[1:]), Construction.OBJECT)
