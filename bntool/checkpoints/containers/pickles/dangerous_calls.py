"""Calls of a pickle that do harm although all that it names builds data: of what it made itself, or for much memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from operator import itemgetter

from bntool.checkpoints.containers.pickles.lookups import GETATTR
from bntool.checkpoints.containers.pickles.machine import ALLOCATORS, CALLING
from bntool.checkpoints.containers.pickles.nodes import (
    ExtensionCode,
    Global,
    Instance,
    Node,
    Update,
    as_mapping,
    text_of,
)
from bntool.checkpoints.containers.pickles.reading import Pickle

MAX_ALLOCATED = 1 << 28  # elements that calls may make by numbers alone; arrays of numpy are made empty and then filled
_ITERATING = {"list", "tuple", "set", "frozenset", "dict", "deque", "Counter", "OrderedDict", "Size", "L"}
_RANGES = ("builtins.range", "builtins.xrange", "__builtin__.range", "__builtin__.xrange")
_METHODS = {"append", "extend", "add"}
_TEXT_DTYPE = re.compile(r"[<>|=]?[SUVa](\d{1,18})")


def name_dangers(pickle: Pickle) -> Iterator[str]:
    """What a pickle does with what it names that no data needs."""
    for constructor in pickle.made_calls:  # extensions and what getattr finds are judged by name
        is_named = isinstance(constructor, Instance) and constructor.path
        if not isinstance(constructor, ExtensionCode) and not (is_named and constructor.path in GETATTR):
            yield f"{constructor.path}(...)()" if is_named else "a call of what the pickle made"
    for instance in pickle.extended:
        if not _METHODS.isdisjoint(_attributes(instance)):
            yield f"{instance.path or 'something made'} with a method of its own"
    amounts = [(instance.path, _count_allocated(instance)) for instance in pickle.notable_calls]
    if sum(amount for _, amount in amounts) > MAX_ALLOCATED:
        path, amount = max(amounts, key=itemgetter(1))
        yield f"{path} for {amount} elements"


def _count_allocated(instance: Instance) -> int:
    """About how many elements a call makes beyond those that the pickle holds, by the numbers that it is given."""
    name, arguments = instance.constructor.name, _as_tuple(instance.arguments)
    if name in CALLING:  # (function, class, arguments, state), or (class, base, what it is made of)
        called = arguments[1 if name == "_reconstructor" else 0] if len(arguments) > 2 else None
        name = called.name if isinstance(called, Global) else ""
        if name not in ALLOCATORS:
            return 0
        arguments = _as_tuple(arguments[2])
    if name in _ITERATING:
        return sum(_count_range(argument) for argument in arguments)
    sizes = [_measure(argument) for argument in (*arguments, instance.keywords)]
    return math.prod(size for size in sizes if size is not None) if any(size is not None for size in sizes) else 0


def _attributes(instance: Instance) -> Iterator[str]:
    """The names of what a pickle gives an object beside what its class has."""
    states = [payload for update, payload in instance.updates if update is Update.STATE]
    for node in (instance.keywords, *states, *(part for state in states if isinstance(state, tuple) for part in state)):
        yield from as_mapping(node)


def _as_tuple(node: Node) -> tuple[Node, ...]:
    return node if isinstance(node, tuple) else (node,)


def _measure(argument: Node) -> int | None:
    """The elements that a number, a shape or the width of a text dtype stands for; None for anything else."""
    if type(argument) is int:
        return abs(argument)
    if isinstance(argument, tuple | list):
        return math.prod(abs(one) for one in argument) if all(type(one) is int for one in argument) else None
    if isinstance(argument, Instance) and argument.path == "numpy.dtype":
        argument = _as_tuple(argument.arguments)[:1]
        argument = argument[0] if argument else None
    width = _TEXT_DTYPE.fullmatch(text_of(argument) or "")
    if width is not None:
        return int(width[1])
    return _count_range(argument) or None


def _count_range(node: Node) -> int:
    """How many numbers a range holds."""
    if not isinstance(node, Instance) or node.path not in _RANGES:
        return 0
    numbers = [one for one in _as_tuple(node.arguments) if type(one) is int]
    return len(range(*numbers[:3])) if 0 < len(numbers) <= 3 and numbers[2:] != [0] else 0
