"""Reading the code of classes that are not torch's: the names in their forward and in all that this calls."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn

_COMPARISONS = ("COMPARE_OP", "CONTAINS_OP", "IS_OP")
_BETWEEN = ("EXTENDED_ARG", "COPY", "DUP_TOP", "NOP", "TO_BOOL")  # which change neither names nor constants
_READS = ("LOAD_ATTR", "LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_DEREF")
_TRUTH_TESTS = re.compile(r"UNARY_NOT|\w*JUMP\w*_IF_(TRUE|FALSE)\w*|JUMP_IF\w+")  # by version of Python
_LONGEST_TEXT = 32  # characters; longer ones are messages


def is_torchs(kind: type[nn.Module]) -> bool:
    """Return whether a class of modules is one of torch's."""
    return kind.__module__.partition(".")[0] == "torch"


def find_names_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names and texts in the code of a class's forward, and of what that calls of the class's own."""
    return frozenset(name for code in _find_codes(cast("Any", kind)) for name in _names_in(code))


def find_compared(kind: type[nn.Module]) -> Mapping[str, frozenset[Any]]:
    """Return the numbers and texts that this code compares attributes and arguments with, by their names.

    What is only asked whether it is true is compared with 0.
    """
    return _find_compared(cast("Any", kind))


def find_texts_beside(kind: type[nn.Module], name: str) -> frozenset[str]:
    """Return the words in functions of this code that read a name: a text of that name may be compared with them."""
    codes = [code for code in _find_codes(cast("Any", kind)) if name in _names_in(code) or name in code.co_varnames]
    constants = (one for code in codes for value in code.co_consts for one in _flatten(value))
    words = {one for one in constants if isinstance(one, str) and one.isprintable() and " " not in one}
    return frozenset(one for one in words if len(one) <= _LONGEST_TEXT and one != name)


@cache
def _find_codes(kind: Any) -> tuple[CodeType, ...]:
    waiting, seen, codes = ["forward"], set[str](), list[CodeType]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for owner in kind.__mro__:
            if is_torchs(owner):
                break
            for code in _codes_of(vars(owner).get(name)):
                codes.append(code)
                waiting += _names_in(code) - seen
    return tuple(codes)


def _names_in(code: CodeType) -> set[str]:
    return set(code.co_names) | {one for one in code.co_consts if isinstance(one, str)}


def _codes_of(member: object) -> Iterator[CodeType]:
    """Yield the code of a method or property, with that of the functions written inside it."""
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, classmethod | staticmethod):
        member = member.__func__
    while hasattr(member, "__wrapped__"):
        member = member.__wrapped__
    waiting = [member.__code__] if isinstance(member, FunctionType) else []
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [one for one in code.co_consts if isinstance(one, CodeType)]


@cache
def _find_compared(kind: Any) -> Mapping[str, frozenset[Any]]:
    found: dict[str, set[Any]] = {}
    for code in _find_codes(kind):
        steps = [step for step in dis.get_instructions(code) if step.opname not in _BETWEEN]
        for index, step in enumerate(steps):
            if step.opname in _READS and isinstance(step.argval, str):
                found.setdefault(step.argval, set()).update(_compared_at(steps, index))
    return {name: frozenset(values) for name, values in found.items() if values}


def _compared_at(steps: list[dis.Instruction], index: int) -> Iterator[Any]:
    """Yield the constants that the value loaded by one step is compared with, on either side of the comparison."""
    following = steps[index + 1 : index + 3]
    if following and _TRUTH_TESTS.fullmatch(following[0].opname):
        yield 0
    sides = []
    if len(following) == 2 and following[1].opname in _COMPARISONS:
        sides.append(following[0])
    if following and following[0].opname in _COMPARISONS:  # an attribute is read of an object that is loaded before
        sides += steps[index - 2 : index - 1] if steps[index].opname == "LOAD_ATTR" else steps[index - 1 : index]
    for side in sides:
        if side.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            yield from _flatten(side.argval)


def _flatten(constant: Any) -> Iterable[Any]:
    return constant if isinstance(constant, tuple | frozenset) else (constant,)
