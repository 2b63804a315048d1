"""The state of a machine that reads pickles symbolically: it builds nodes and calls nothing."""

from __future__ import annotations

import struct
from typing import Any

from bntool.checkpoints.containers.pickles.nodes import (
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
    text_of,
)
from bntool.checkpoints.files import ByteSource
from bntool.errors import CorruptFileError, UnsafeFileError

INLINE_BYTES = 1 << 16  # byte strings longer than this stay in the file until they are asked for
MAX_TEXT = 1 << 26  # a longer text or integer is an attack on memory
MAX_DIGITS = 4300
MAX_INTEGER = 1024  # bytes of a binary one: Python writes no longer ones as text without being told to
MAX_GLOBALS = 10_000  # classes and functions by name; the largest export of fastai seen has 49
MAX_HASHED = 1 << 16  # values of a tuple that is a key, each counted as often as it occurs: Python looks at all
# functions that call what they are given: of rebuilt tensors, and of objects of old protocols
CALLING = ("_rebuild_from_type_v2", "_rebuild_from_type", "_reconstructor")
# builtins, and functions of numpy and torch, that take memory by a number; those of other modules are not known anyway
ALLOCATORS = frozenset(
    {"bytes", "bytearray", "list", "tuple", "set", "frozenset", "dict", "deque", "Counter", "OrderedDict",
     "ndarray", "_reconstruct", "Size", "L", *CALLING}
)  # fmt: skip
DTYPE = "numpy.dtype"  # whose state says what arrays hold in their bytes
_TENSORS = ("Storage", "Tensor")
_REBUILT = ("torch._utils._rebuild_", "torch._tensor._rebuild_", "torch.nn.parameter.")
_WINDOW = 1 << 16

MARK = object()


class Machine:
    """The state of a pickle machine: the stream, the stack and the memo."""

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
        # in order of appearance; whether by its name a call may take memory, and whether it makes a module
        self.called: dict[Global, tuple[bool, bool]] = {}
        self.persistent_ids: list[PersistentId] = []
        self.extensions: list[ExtensionCode] = []
        self.made_calls: list[Node] = []  # what the pickle calls that it does not name but made
        self.notable_calls: list[Instance] = []  # see Pickle
        self.extended: list[Instance] = []  # instances whose own append, extend or add it calls
        self.dropped = False  # something left the stack without a place in what is built

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

    def byte(self) -> int:
        """Return the next byte: half of what a pickle holds are numbers and lengths of one."""
        if self.cursor >= len(self.window):
            self.refill(1)
        value = self.window[self.cursor]
        self.cursor += 1
        return value

    def number(self, layout: struct.Struct) -> int:
        cursor = self.cursor
        if cursor + layout.size > len(self.window):
            self.refill(layout.size)
            cursor = 0
        self.cursor = cursor + layout.size
        value: int = layout.unpack_from(self.window, cursor)[0]
        return value

    def line(self) -> bytes:
        """Read up to the next newline, which is dropped."""
        parts = []
        while (end := self.window.find(b"\n", self.cursor)) < 0:
            parts.append(self.window[self.cursor :])
            self.cursor = len(self.window)
            if len(parts) * _WINDOW > MAX_TEXT:
                raise UnsafeFileError(f"a line of the pickle has more than {MAX_TEXT} bytes")
            self.refill(1)
        parts.append(self.window[self.cursor : end])
        self.cursor = end + 1
        return b"".join(parts)

    def decimal(self) -> int:
        """Read a line that holds a number."""
        line = self.line()
        if len(line) > MAX_DIGITS:  # the cost of decimal conversion grows with the square
            raise UnsafeFileError(f"an integer of the pickle has {len(line)} digits, above the limit of {MAX_DIGITS}")
        return int(line)

    def text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise UnsafeFileError(f"the pickle holds a text of {length} bytes, above the limit of {MAX_TEXT}")
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
        """Pop everything above the topmost mark."""
        stack = self.stack
        index = len(stack) - 1
        while stack[index] is not MARK:
            index -= 1
            if index < 0:
                raise CorruptFileError("the pickle is malformed: a mark is missing")
        items = stack[index + 1 :]
        del stack[index:]
        return items

    def pop(self) -> Node:
        value = self.stack.pop()
        if value is MARK:
            raise CorruptFileError("the pickle is malformed: a mark where a value should be")
        return value

    def top(self) -> Node:
        value = self.stack[-1]
        if value is MARK:
            raise CorruptFileError("the pickle is malformed: a mark where a value should be")
        return value

    def push_global(self, module: str, name: str) -> None:
        key = (module, name)
        if key not in self.globals:
            if len(self.globals) >= MAX_GLOBALS:
                raise UnsafeFileError(f"the pickle names more than {MAX_GLOBALS} classes and functions")
            self.globals[key] = Global(module, name)
        self.stack.append(self.globals[key])

    def push_instance(self, constructor: Node, arguments: Node, how: Construction, keywords: Node = None) -> None:
        instance = Instance(constructor, arguments, construction=how, keywords=keywords)
        self.stack.append(instance)
        called = constructor if type(constructor) is Global else find_class(constructor)
        if not isinstance(called, Global):
            self.made_calls.append(called)
            return
        if called not in self.called:
            takes_memory = called.name in ALLOCATORS or called.name.endswith(_TENSORS) or called.path == DTYPE
            self.called[called] = (takes_memory, called.module.startswith("torch.nn.modules."))
        takes_memory, makes_module = self.called[called]
        if takes_memory or (makes_module and how is Construction.REDUCE):
            self.notable_calls.append(instance)

    def set_items(self, pairs: list[tuple[Node, Node]]) -> None:
        for key, _ in pairs:
            if type(key) is tuple:
                _check_hash(key)
        target = self.top()
        if isinstance(target, Dict):
            target.pairs.extend(pairs)
        elif isinstance(target, Instance):
            if target.path.startswith(_REBUILT):  # CVE-2026-24747: it writes into memory while the file is loaded
                raise UnsafeFileError("the pickle sets elements of a tensor")
            target.updates.append((Update.ITEMS, pairs))
        else:
            raise CorruptFileError("the pickle sets items of something that has none")

    def append(self, values: list[Node]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Instance):
            self.extended.append(target)
            target.updates.append((Update.APPENDS, values))
        else:
            raise CorruptFileError("the pickle appends to something that is no list")

    def add(self, values: list[Node]) -> None:
        for value in values:
            if type(value) is tuple:
                _check_hash(value)
        target = self.top()
        if isinstance(target, Set):
            target.members.extend(values)
        elif isinstance(target, Instance):
            self.extended.append(target)
            target.updates.append((Update.ADDITIONS, values))
        else:
            raise CorruptFileError("the pickle adds to something that is no set")

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if not isinstance(target, Instance):
            raise CorruptFileError("the pickle sets the state of something that has none")
        target.updates.append((Update.STATE, state))


def _check_hash(key: tuple[Node, ...]) -> None:
    """Refuse a key whose hash takes forever: a tuple of a tuple that occurs twice, and so on.

    Raises:
        UnsafeFileError: it is one.
    """
    pending, left = [key], MAX_HASHED
    while pending:
        inside = pending.pop()
        left -= len(inside)
        if left < 0:
            raise UnsafeFileError("a key of the pickle is a nest of tuples whose hash would take forever")
        pending += [one for one in inside if type(one) is tuple]


def find_class(constructor: Node) -> Node:
    """Return the class or function that a call calls. Files of torch before 1.6 put ("module", class, file name, source
    code) outside of the pickle for the class of a module; their loader takes the second of these, whatever it is.
    """
    value = constructor.value if isinstance(constructor, PersistentId) else None
    return value[1] if isinstance(value, tuple) and len(value) > 1 and text_of(value[0]) == "module" else constructor
