"""Reading a pickle into nodes. Protocols 0 to 5."""

from __future__ import annotations

import contextlib
import gc
import struct
from collections.abc import Iterator
from typing import NamedTuple

from bntool.checkpoints.containers.pickles.machine import MARK, Machine
from bntool.checkpoints.containers.pickles.nodes import (
    Construction,
    ExtensionCode,
    Global,
    Instance,
    Node,
    PersistentId,
)
from bntool.checkpoints.containers.pickles.opcodes import ACTIONS, STOP
from bntool.checkpoints.files import ByteSource, MemorySource
from bntool.errors import CorruptFileError, UnknownFormatError, UnsafeFileError

# far above any checkpoint seen: a resnet152 takes 60 thousand opcodes, a sampler's list of all of ImageNet a million
MAX_OPCODES = 10_000_000
_UNCOUNTED = 1_000_000  # the first opcodes cannot take much memory, and counting takes time
MAX_OBJECTS = 2_000_000  # made by the opcodes after these: containers, instances, texts, entries of the memo
_JOBLIB = ("joblib.numpy_pickle", "NumpyArrayWrapper")
_LONG_BINPUT, _BINGET, _BININT1, _MARK, _TUPLE, _BININT2 = b"rhK(tM"
_EMPTY_TUPLE, _TUPLE1, _NEWFALSE, _BINPUT, _BINUNICODE, _REDUCE = b")\x85\x89qXR"
_LONGEST_OPERAND = 4  # of these
_U4 = struct.Struct("<I")
_OBJECT_OPCODES = frozenset(b"]}ltd\x85\x86\x87\x8f\x91R\x81\x92ioQPpqr\x94CBU\x8c\x8d\x8e\x96STVX\x8a\x8bLI")


class OpcodeBudget:
    """The number of opcodes that may still be read of a file: shared by its pickles, where it has several."""

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
        notable_calls: of named classes and functions that may take memory by a number, and types of arrays.
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
        UnknownFormatError: joblib wrote the elements of arrays between the opcodes.
        UnsafeFileError: more opcodes or longer texts than any checkpoint needs.
    """
    machine = Machine(source, offset)
    try:
        with _no_garbage_collection():
            return _run(machine, budget or OpcodeBudget())
    except CorruptFileError as error:
        _check_joblib(machine, error)
        raise
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        _check_joblib(machine, error)
        raise CorruptFileError(f"the pickle is malformed near byte {machine.position}") from error


def _check_joblib(machine: Machine, error: Exception) -> None:
    """Name what is no pickle as the others are, where it only seems to be damaged."""
    if _JOBLIB in machine.globals:
        raise UnknownFormatError(
            "this is a file of joblib, which writes elements of arrays between the opcodes of a pickle, and is not "
            "read; load it by joblib, and save its arrays with numpy.savez or torch.save"
        ) from error


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch garbage collection off while a pickle is read: nothing is dropped then, and looking for garbage takes five
    times as long as reading.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_pickle_bytes(data: bytes, *, budget: OpcodeBudget | None = None) -> Pickle:
    """Read a pickle in memory; see :func:`read_pickle`."""
    return read_pickle(MemorySource(data), budget=budget)


def _run(machine: Machine, budget: OpcodeBudget) -> Pickle:
    for run, counted in ((_run_fast, False), (_run_counting, True)):
        allowed = budget.opcodes if counted else min(budget.uncounted, budget.opcodes)
        used = run(machine, allowed, budget)
        budget.spend(allowed if used is None else used, counted=counted)
        if used is not None:
            return _finish(machine)
    raise UnsafeFileError(f"the pickle has more than {MAX_OPCODES} opcodes")


def _run_fast(machine: Machine, allowed: int, _: OpcodeBudget) -> int | None:  # noqa: C901, PLR0912, PLR0915
    """Carry out opcodes up to STOP; how many these were, None where that are more than allowed.

    Those that a file of torch has most of are written out: a call takes longer than what they do.
    """
    stack, memo, top = machine.stack, machine.memo, machine.top
    push = stack.append
    number = 0
    while number < allowed:
        if machine.cursor >= len(machine.window):
            machine.refill(1)
        window, cursor = machine.window, machine.cursor
        # as far as this, operands of a fixed length are at hand; what is written out moves no further than its own
        safe = min(len(window) - _LONGEST_OPERAND, cursor + allowed - number)
        while cursor < safe:
            opcode = window[cursor]
            cursor += 1
            number += 1
            if opcode == _LONG_BINPUT:
                if (value := stack[-1]) is MARK:
                    value = top()  # says what is wrong
                memo[_U4.unpack_from(window, cursor)[0]] = value
                cursor += 4
            elif opcode == _BINGET:
                push(memo[window[cursor]])
                cursor += 1
            elif opcode == _BININT1:
                push(window[cursor])
                cursor += 1
            elif opcode == _MARK:
                push(MARK)
            elif opcode == _BINUNICODE and (end := cursor + 4 + _U4.unpack_from(window, cursor)[0]) <= len(window):
                push(window[cursor + 4 : end].decode("utf-8", "surrogatepass"))
                cursor = end
            elif opcode == _TUPLE:
                push(tuple(machine.pop_mark()))
            elif opcode == _REDUCE:
                arguments = machine.pop()
                machine.push_instance(machine.pop(), arguments, Construction.REDUCE)
            elif opcode == _BININT2:
                push(window[cursor] | window[cursor + 1] << 8)
                cursor += 2
            elif opcode == _EMPTY_TUPLE:
                push(())
            elif opcode == _TUPLE1:
                stack[-1] = (top(),)
            elif opcode == _NEWFALSE:
                push(False)
            elif opcode == _BINPUT:
                memo[window[cursor]] = top()
                cursor += 1
            elif opcode == STOP:
                machine.cursor = cursor
                return number
            else:
                machine.cursor = cursor
                _act(machine, opcode)
                if machine.window is not window:
                    break
                cursor = machine.cursor
        else:
            machine.cursor = cursor
            if number < allowed and _step(machine):
                return number + 1
            number += 1
    return None


def _run_counting(machine: Machine, allowed: int, budget: OpcodeBudget) -> int | None:
    """Run the pickle one opcode at a time, counting what takes memory.

    Raises:
        UnsafeFileError: that is more than the budget allows.
    """
    for number in range(allowed):
        if machine.cursor >= len(machine.window):
            machine.refill(1)
        makes_object = machine.window[machine.cursor] in _OBJECT_OPCODES
        if _step(machine):
            return number + 1
        if makes_object:
            budget.objects -= 1
            if budget.objects < 0:
                raise UnsafeFileError(f"the pickle makes more than {MAX_OBJECTS} objects")
    return None


def _step(machine: Machine) -> bool:
    """Carry out the next opcode; whether it was STOP."""
    opcode = machine.byte()
    if opcode != STOP:
        _act(machine, opcode)
    return opcode == STOP


def _act(machine: Machine, opcode: int) -> None:
    action = ACTIONS[opcode]
    if action is None:
        raise CorruptFileError(f"byte {machine.position - 1} of the pickle is no opcode (0x{opcode:02x})")
    action(machine)


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
