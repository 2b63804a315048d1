"""Arguments and flags that may have another value: where a folded model then computes something else, it is said.

A trace follows one way through the code. ``self.bn(y) if normalise else y`` reads a convolution without its BatchNorm
where another argument is given, or where ``self.normalise`` is changed, and no module tells of it. So the models are
run once more for each switch of the forward, and for each flag that the code reads.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from bntool.batchnorm import STATISTICS
from bntool.errors import UserCodeError, VerificationError
from bntool.modules.finding import unwrap
from bntool.representation import format_number
from bntool.verification.outputs import measure_difference

_TRIED_ARGUMENTS = 8  # of one forward
_TRIED_FLAGS = 8  # of one model
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NOT_FLAGS = ("training", "inplace")  # all models have a mode, which is not theirs alone to decide


def find_unlike_arguments(model: nn.Module, folded: nn.Module, inputs: Any, *, tolerance: float) -> tuple[str, ...]:
    """Find arguments of the forward that must stay as they are for the folded model to compute what the original does,
    one sentence each.

    Args:
        model: the original.
        folded: a copy of it, after the fold.
        inputs: what both agree on.
        tolerance: a larger error, relative to the largest magnitude of each output, is another result.
    """
    found = []
    for name, value, changed in find_switches(model, inputs):
        error = _measure(model, folded, changed)
        if not error <= tolerance:
            found.append(
                f"{name}={value!r} is not given to the forward: the folded model then computes something else "
                f"(off by {format_number(error)} of the outputs' magnitude)"
            )
    return tuple(found)


def find_switches(model: nn.Module, inputs: Any) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Yield the switches of a forward that inputs leave as they are: name, the other value, and inputs with it.

    A switch is an argument whose default is a bool, or None where its annotation speaks of bool.
    """
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind(**inputs) if isinstance(inputs, Mapping) else signature.bind(*_as_tuple(inputs))
    except (TypeError, ValueError):  # of a compiled model, or one that takes anything
        return
    if any(signature.parameters[name].kind not in _BY_NAME for name in given.arguments):
        return
    switches = [
        (parameter.name, parameter.default is not True)
        for parameter in signature.parameters.values()
        if parameter.kind in _BY_NAME
        and parameter.name not in given.arguments
        and (isinstance(parameter.default, bool) or (parameter.default is None and "bool" in str(parameter.annotation)))
    ]
    for name, value in switches[:_TRIED_ARGUMENTS]:
        yield name, value, {**given.arguments, name: value}


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


@dataclass(frozen=True)
class Flag:
    """A bool that modules of one class keep under one name, and that has one value in them.

    Attributes:
        name: of the attribute.
        value: that it has.
        modules: their paths, "" for the model.
    """

    name: str
    value: bool
    modules: tuple[str, ...]

    def __str__(self) -> str:
        first = f"{self.modules[0]}.{self.name}" if self.modules[0] else self.name
        more = f" (and {len(self.modules) - 1} more of its class)" if len(self.modules) > 1 else ""
        return f"{first} is {self.value}{more}"


def find_unlike_attributes(
    model: nn.Module, folded: nn.Module, inputs: Any, *, layers: Sequence[str], tolerance: float
) -> tuple[str, ...]:
    """Find attributes of modules that must stay as they are for the folded model to compute what the original does, one
    sentence each.

    Args:
        model: the original; given back with its flags.
        folded: a copy of it, after the fold; given back, too.
        inputs: what both agree on.
        layers: paths of the BatchNorms that were folded.
        tolerance: a larger error, relative to the largest magnitude of each output, is another result.
    """
    found = []
    for flag in find_flags(model, layers)[:_TRIED_FLAGS]:
        with _turned(flag, model, folded) as is_same:
            error = _measure(model, folded, inputs) if is_same else 0.0
            if error <= tolerance or not _measure(model, model, inputs) <= tolerance:  # the latter draws anew each time
                continue
        found.append(
            f"{flag}: with {not flag.value} the folded model computes something else (off by {format_number(error)} of "
            "the outputs' magnitude)"
        )
    return tuple(found)


def find_flags(model: nn.Module, layers: Sequence[str]) -> list[Flag]:
    """Return the bools that the code of a model reads, of the modules that certain layers lie in, in the order of
    modules.

    Modules of torch itself and those with running statistics are no such modules: what they decide is known.

    Args:
        model: as it came; wrappers of it are looked through.
        layers: paths of modules, as the model inside calls them.
    """
    around = {"", *(path[:end] for path in layers for end, sign in enumerate(path) if sign == ".")}
    own = {
        path: module
        for path, module in unwrap(model).named_modules()
        if not type(module).__module__.startswith("torch.")
    }
    read = {name for kind in {type(module) for module in own.values()} for name in _names_read(kind)}
    groups: dict[tuple[type, str, bool], list[str]] = {}
    for path, module in own.items():
        if path not in around or set(STATISTICS) <= module._buffers.keys():
            continue
        for name, value in vars(module).items():
            if isinstance(value, bool) and name in read and name not in _NOT_FLAGS:
                groups.setdefault((type(module), name, value), []).append(path)
    return [Flag(name, value, tuple(paths)) for (_, name, value), paths in groups.items()]


def _names_read(kind: type) -> set[str]:
    """Return the names in the code of a class's forward and of what it calls of its own."""
    waiting, seen, names = ["forward"], set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for owner in kind.__mro__:
            if owner.__module__.startswith("torch."):
                break
            for code in _codes(vars(owner).get(name)):
                found = set(code.co_names) | {one for one in code.co_consts if isinstance(one, str)}
                names |= found
                waiting += found - seen
    return names


def _codes(member: object) -> Iterator[CodeType]:
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


@contextlib.contextmanager
def _turned(flag: Flag, *models: nn.Module) -> Iterator[bool]:
    """Give models the other value of a flag; yield False where one of them lacks it, or has that value already."""
    named = [dict(unwrap(model).named_modules(remove_duplicate=False)) for model in models]
    places = [modules[path].__dict__ for modules in named for path in flag.modules if path in modules]
    is_same = len(places) == len(models) * len(flag.modules) and all(p.get(flag.name) is flag.value for p in places)
    try:
        for place in places if is_same else ():
            place[flag.name] = not flag.value
        yield is_same
    finally:
        for place in places if is_same else ():
            place[flag.name] = flag.value


def _measure(model: nn.Module, other: nn.Module, inputs: Any) -> float:
    """Measure the error of the other model; 0 where the first does not take a value, infinity where only the other does
    not.
    """
    try:
        return measure_difference(model, other, inputs)
    except UserCodeError:
        return 0.0
    except VerificationError:
        return float("inf")
