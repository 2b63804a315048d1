"""Calls of a pickle that do harm although all that it names builds data: of what it made itself, or for much memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from operator import itemgetter

from bntool.checkpoints.containers.pickles.lookups import GETATTR
from bntool.checkpoints.containers.pickles.machine import ALLOCATORS, CALLING, DTYPE, find_class
from bntool.checkpoints.containers.pickles.nodes import (
    Dict,
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
_FLAGS = 7  # in the state of a numpy.dtype; its lowest bit: there are references to objects
_PARTS = (2, 4)  # of that state: what a subarray is of, and the fields
_DEPTH = 32
_OBJECTS = {"object", "ObjectDType", "StringDType"}
_OBJECT_TEXT = r"[<>|=]?(?:O[48]?|object_?0?)"  # compiled where there is such a text
_ITERATING = {"list", "tuple", "set", "frozenset", "dict", "deque", "Counter", "OrderedDict", "Size", "L"}
_RANGES = ("builtins.range", "builtins.xrange", "__builtin__.range", "__builtin__.xrange")
_METHODS = {"append", "extend", "add"}
_TEXT_DTYPE = r"[<>|=]?[SUVa](\d{1,18})"


def name_dangers(pickle: Pickle) -> Iterator[str]:
    """Yield what a pickle does with the names it uses, where no data needs that."""
    for constructor in pickle.made_calls:  # extensions and what getattr finds are judged by name
        is_named = isinstance(constructor, Instance) and constructor.path
        if not isinstance(constructor, ExtensionCode) and not (is_named and constructor.path in GETATTR):
            yield f"{constructor.path}(...)()" if is_named else "a call of what the pickle made"
    for instance in pickle.extended:
        if not _METHODS.isdisjoint(_attributes(instance)):
            yield f"{instance.path or 'something made'} with a method of its own"
    for instance in pickle.notable_calls:
        if _lies_about_objects(instance):
            yield f"{DTYPE} of objects that says it holds none"
        elif _is_array_over_memory(instance):
            yield "numpy.ndarray(...) over memory of the pickle's own"
    amounts = [(_find_called(instance)[0], _count_allocated(instance)) for instance in pickle.notable_calls]
    if sum(amount for _, amount in amounts) > MAX_ALLOCATED:
        path, amount = max(amounts, key=itemgetter(1))
        yield f"{path} for {amount} elements"


def _lies_about_objects(instance: Instance) -> bool:
    """Return whether a type of arrays holds objects and no flag says so: numpy then takes bytes of the file for
    pointers.
    """
    if _find_called(instance)[0] != DTYPE:
        return False
    for state in _states(instance):
        flags = state[_FLAGS] if _has(state, _FLAGS) else 0
        if not (type(flags) is int and flags & 1) and _holds_objects(instance, depth=0):
            return True
    return False


def _has(state: Node, index: int) -> bool:
    return isinstance(state, tuple) and len(state) > index


def _states(instance: Instance) -> list[Node]:
    return [payload for update, payload in instance.updates if update is Update.STATE]


def _holds_objects(node: Node, *, depth: int) -> bool:
    if depth > _DEPTH:
        return True
    if isinstance(node, Global):
        return node.name in _OBJECTS
    if isinstance(node, Instance):  # of a state only what it is made of: fields have names, too
        parts = [state[index] for state in _states(node) for index in _PARTS if _has(state, index)]
        is_one = node.path.rpartition(".")[2] in _OBJECTS
        return is_one or _holds_objects((node.arguments, *parts), depth=depth + 1)
    if isinstance(node, tuple | list):
        return any(_holds_objects(one, depth=depth + 1) for one in node)
    if isinstance(node, Dict):
        return any(_holds_objects(value, depth=depth + 1) for _, value in node.pairs)
    text = text_of(node)
    return bool(text and re.fullmatch(_OBJECT_TEXT, text))


def _is_array_over_memory(instance: Instance) -> bool:
    """Return whether numpy.ndarray is called with more than a shape and a type, as no array is pickled."""
    arguments = _as_tuple(instance.arguments)
    path, name = _find_called(instance)
    if name in CALLING:
        is_array = any(isinstance(one, Global) and one.path == "numpy.ndarray" for one in arguments[:1])
        arguments = _as_tuple(arguments[2]) if is_array and len(arguments) > 2 else ()
        return len(arguments) > 2
    return path == "numpy.ndarray" and (len(arguments) > 2 or instance.keywords is not None)


def _count_allocated(instance: Instance) -> int:
    """Estimate how many elements a call makes beyond those that the pickle holds, from the numbers that it is given."""
    path, name = _find_called(instance)
    if path == DTYPE:
        return 0
    arguments = _as_tuple(instance.arguments)
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


def _find_called(instance: Instance) -> tuple[str, str]:
    """Return the path of what a call calls, and its last name; "" where that is no global."""
    called = find_class(instance.constructor)
    return (called.path, called.name) if isinstance(called, Global) else ("", "")


def _attributes(instance: Instance) -> Iterator[str]:
    """Yield the names of what a pickle gives an object beside what its class has."""
    states = _states(instance)
    for node in (instance.keywords, *states, *(part for state in states if isinstance(state, tuple) for part in state)):
        yield from as_mapping(node)


def _as_tuple(node: Node) -> tuple[Node, ...]:
    return node if isinstance(node, tuple) else (node,)


def _measure(argument: Node) -> int | None:
    """Return the elements that a number, a shape or the width of a text dtype stands for; None for anything else."""
    if type(argument) is int:
        return abs(argument)
    if isinstance(argument, tuple | list):
        return math.prod(abs(one) for one in argument) if all(type(one) is int for one in argument) else None
    if isinstance(argument, Instance) and argument.path == "numpy.dtype":
        argument = _as_tuple(argument.arguments)[:1]
        argument = argument[0] if argument else None
    text = text_of(argument)
    width = re.fullmatch(_TEXT_DTYPE, text) if text else None
    if width is not None:
        return int(width[1])
    return _count_range(argument) or None


def _count_range(node: Node) -> int:
    """Count the numbers of a range."""
    if not isinstance(node, Instance) or node.path not in _RANGES:
        return 0
    numbers = [one for one in _as_tuple(node.arguments) if type(one) is int]
    return len(range(*numbers[:3])) if 0 < len(numbers) <= 3 and numbers[2:] != [0] else 0
