"""Reading a pickle into nodes. Protocols 0 to 5."""

from __future__ import annotations

import contextlib
import gc
import struct
from collections.abc import Iterator
from typing import NamedTuple

from bntool.checkpoints.containers.pickles.machine import MARK, Machine
from bntool.checkpoints.containers.pickles.nodes import ExtensionCode, Global, Instance, Node, PersistentId
from bntool.checkpoints.containers.pickles.opcodes import ACTIONS, STOP
from bntool.checkpoints.files import ByteSource, MemorySource
from bntool.errors import CorruptFileError, UnsafeFileError

# far above any checkpoint seen: a resnet152 takes 60 thousand opcodes, a sampler's list of all of ImageNet a million
MAX_OPCODES = 10_000_000
_UNCOUNTED = 1_000_000  # the first opcodes cannot take much memory, and counting takes time
MAX_OBJECTS = 2_000_000  # made by the opcodes after these: containers, instances, texts, entries of the memo
_LONG_BINPUT, _BINGET, _BININT1, _MARK = b"rhK("
_U4 = struct.Struct("<I")
_OBJECT_OPCODES = frozenset(b"]}ltd\x85\x86\x87\x8f\x91R\x81\x92ioQPpqr\x94CBU\x8c\x8d\x8e\x96STVX\x8a\x8bLI")


class OpcodeBudget:
    """What may still be read of a file: shared by its pickles, where it has several."""

    def __init__(self) -> None:
        self.opcodes = MAX_OPCODES
        self.uncounted = _UNCOUNTED
        self.objects = MAX_OBJECTS

    def spend(self, opcodes: int, *, counted: bool) -> None:
        self.opcodes -= opcodes
        if not counted:
            self.uncounted -= opcodes


class Pickle(NamedTuple):
    """One pickle of a file.

    Attributes:
        root: what it holds.
        protocol: as declared by PROTO, 0 where it is not.
        start, end: where it lies in its source.
        called: globals that unpickling would call, in order of appearance.
        referenced: globals that it would only import.
        persistent_ids: in order of appearance.
        extensions: what it names by number.
        made_calls: what it calls without a name, because it made it.
        notable_calls: of named classes and functions that may take memory by a number.
        extended: instances that values are appended or added to, by methods that they may have got from the pickle.
        complete: all that it makes is part of ``root``.
    """

    root: Node
    protocol: int
    start: int
    end: int
    called: list[Global]
    referenced: list[Global]
    persistent_ids: list[PersistentId]
    extensions: list[ExtensionCode]
    made_calls: list[Node]
    notable_calls: list[Instance]
    extended: list[Instance]
    complete: bool


def read_pickle(source: ByteSource, *, offset: int = 0, budget: OpcodeBudget | None = None) -> Pickle:
    """Read the pickle that starts at ``offset``.

    Args:
        budget: of the file, where it has several pickles.

    Raises:
        CorruptFileError: truncated, an unknown opcode, or a stack that does not work out.
        UnsafeFileError: more opcodes or longer texts than any checkpoint needs.
    """
    machine = Machine(source, offset)
    try:
        with _no_garbage_collection():
            return _run(machine, budget or OpcodeBudget())
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise CorruptFileError(f"the pickle is malformed near byte {machine.position}") from error


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """While a pickle is read: nothing is dropped, and looking for what could be takes five times as long as reading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_pickle_bytes(data: bytes, *, budget: OpcodeBudget | None = None) -> Pickle:
    """Like :func:`read_pickle`, for a pickle in memory."""
    return read_pickle(MemorySource(data), budget=budget)


def _run(machine: Machine, budget: OpcodeBudget) -> Pickle:  # noqa: C901
    stack, memo = machine.stack, machine.memo
    for counted in (False, True):
        allowed = budget.opcodes if counted else min(budget.uncounted, budget.opcodes)
        for number in range(allowed):
            if machine.cursor >= len(machine.window):
                machine.refill(1)
            window, cursor = machine.window, machine.cursor
            opcode = window[cursor]
            machine.cursor = cursor + 1
            # those that a file of torch has most of are written out, where their operand is at hand: calls take longer
            if opcode == _LONG_BINPUT and cursor + 5 <= len(window):
                machine.cursor = cursor + 5
                memo[_U4.unpack_from(window, cursor + 1)[0]] = machine.top()
            elif opcode == _BINGET and cursor + 2 <= len(window):
                machine.cursor = cursor + 2
                stack.append(memo[window[cursor + 1]])
            elif opcode == _BININT1 and cursor + 2 <= len(window):
                machine.cursor = cursor + 2
                stack.append(window[cursor + 1])
            elif opcode == _MARK:
                stack.append(MARK)
            elif opcode == STOP:
                budget.spend(number + 1, counted=counted)
                return _finish(machine)
            else:
                action = ACTIONS[opcode]
                if action is None:
                    raise CorruptFileError(f"byte {machine.position - 1} of the pickle is no opcode (0x{opcode:02x})")
                action(machine)
            if counted and opcode in _OBJECT_OPCODES:
                budget.objects -= 1
                if budget.objects < 0:
                    raise UnsafeFileError(f"the pickle makes more than {MAX_OBJECTS} objects")
        budget.spend(allowed, counted=counted)
    raise UnsafeFileError(f"the pickle has more than {MAX_OPCODES} opcodes")


def _finish(machine: Machine) -> Pickle:
    root = machine.pop()
    return Pickle(
        root=root,
        protocol=machine.protocol,
        start=machine.start,
        end=machine.position,
        called=list(machine.called),
        referenced=[node for node in machine.globals.values() if node not in machine.called],
        persistent_ids=machine.persistent_ids,
        extensions=machine.extensions,
        made_calls=machine.made_calls,
        notable_calls=machine.notable_calls,
        extended=machine.extended,
        complete=not machine.dropped and not machine.stack,
    )
