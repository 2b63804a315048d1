"""Arguments and flags that may have another value: where a folded model then computes something else, it is said.

A trace follows one way through the code. ``self.bn(y) if normalise else y`` reads a convolution without its BatchNorm
where another argument is given, or where ``self.normalise`` is changed, and no module tells of it. So the models are
run once more for each other value of a switch of the forward, and of a flag that the code reads: the other bool, the
other members of an enum, the words beside a text, and numbers around those that one is compared with.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from bntool.batchnorm import STATISTICS
from bntool.errors import UserCodeError, VerificationError
from bntool.modules.finding import unwrap
from bntool.modules.own_code import find_compared, find_names_read, find_texts_beside, is_torchs
from bntool.representation import format_number
from bntool.verification.outputs import measure_difference

_TRIED_ARGUMENTS = 8  # of one forward
_TRIED_FLAGS = 12  # values of those of one model
_TRIED_VALUES = 4  # of one of them, beside its own
_TRIED_KEYWORDS = 3  # that a forward takes without saying so
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


def find_switches(model: nn.Module, inputs: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield the switches of a forward that inputs leave as they are: name, another value, and inputs with it.

    A switch is an argument whose default is a bool, a number, a text or a member of an enum, or None where its
    annotation speaks of bool; of a forward that takes any keywords also those that its code has as texts.
    """
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind(**inputs) if isinstance(inputs, Mapping) else signature.bind(*_as_tuple(inputs))
    except (TypeError, ValueError):  # of a compiled model, or one that takes anything
        return
    if any(signature.parameters[name].kind not in _BY_NAME for name in given.arguments):
        return
    kinds = _find_own_kinds(model)
    switches: list[tuple[str, Any]] = []
    for parameter in signature.parameters.values():
        if parameter.kind in _BY_NAME and parameter.name not in given.arguments:
            default = parameter.default
            if default is None and "bool" in str(parameter.annotation):
                default = False
            switches += [(parameter.name, other) for other in _find_other_values(parameter.name, default, kinds)]
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            words = sorted(find_texts_beside(type(model), parameter.name))[:_TRIED_KEYWORDS]
            switches += [(word, value) for word in words if word.isidentifier() for value in (False, True)]
    for name, value in switches[:_TRIED_ARGUMENTS]:
        yield name, value, {**given.arguments, name: value}


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _find_own_kinds(model: nn.Module) -> list[type[nn.Module]]:
    """List the classes of a model's modules that are not torch's."""
    kinds = dict.fromkeys(type(module) for _, module in unwrap(model).named_modules())
    return [kind for kind in kinds if not is_torchs(kind)]


def _find_other_values(name: str, value: Any, kinds: Sequence[type[nn.Module]]) -> list[Any]:
    """List the other values that code may ask for where an argument or attribute has this one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, Enum):
        return [other for other in type(value) if other is not value][:_TRIED_VALUES]
    compared = frozenset[Any]().union(*(find_compared(kind).get(name, ()) for kind in kinds))
    if isinstance(value, str):
        texts = {one for one in compared if isinstance(one, str)}
        beside = frozenset[str]().union(*(find_texts_beside(kind, name) for kind in kinds))
        words = dict.fromkeys((*sorted(texts), *([""] if texts else []), *sorted(beside)))
        return [word for word in words if word != value][:_TRIED_VALUES]
    if isinstance(value, int | float):
        numbers = {one + step for one in compared if type(one) in (int, float) for step in (0, -1, 1)}
        return sorted(numbers - {value}, key=lambda number: abs(number - value))[:_TRIED_VALUES]
    return []


@dataclass(frozen=True)
class Flag:
    """An attribute that modules of one class keep under one name, and that has one value in them.

    Attributes:
        name: of the attribute.
        value: that it has: a bool, a number, a text or a member of an enum.
        others: what it may be instead.
        modules: their paths, "" for the model.
    """

    name: str
    value: Any
    others: tuple[Any, ...]
    modules: tuple[str, ...]

    def __str__(self) -> str:
        first = f"{self.modules[0]}.{self.name}" if self.modules[0] else self.name
        more = f" (and {len(self.modules) - 1} more of its class)" if len(self.modules) > 1 else ""
        return f"{first} is {self.value!r}{more}"


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
    found: dict[Flag, str] = {}
    turns = [(flag, other) for flag in find_flags(model, layers) for other in flag.others]
    for flag, other in turns[:_TRIED_FLAGS]:
        if flag in found:
            continue
        with _turned(flag, other, model, folded) as is_same:
            error = _measure(model, folded, inputs) if is_same else 0.0
            if error <= tolerance or not _measure(model, model, inputs) <= tolerance:  # the latter draws anew each time
                continue
        found[flag] = (
            f"{flag}: with {other!r} the folded model computes something else (off by {format_number(error)} of "
            "the outputs' magnitude)"
        )
    return tuple(found.values())


def find_flags(model: nn.Module, layers: Sequence[str]) -> list[Flag]:
    """List the flags that the code of a model reads, of the modules that certain layers lie in: bools first.

    Modules of torch itself and those with running statistics are no such modules: what they decide is known.

    Args:
        model: as it came; wrappers of it are looked through.
        layers: paths of modules, as the model inside calls them.
    """
    around = {"", *(path[:end] for path in layers for end, sign in enumerate(path) if sign == ".")}
    kinds = _find_own_kinds(model)
    read = {name for kind in kinds for name in find_names_read(kind)}
    groups: dict[tuple[type[nn.Module], str, type, Any], list[str]] = {}
    for path, module in unwrap(model).named_modules():
        if path not in around or is_torchs(type(module)) or set(STATISTICS) <= module._buffers.keys():
            continue
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | Enum) and name in read and name not in _NOT_FLAGS:
                groups.setdefault((type(module), name, type(value), value), []).append(path)
    flags = [
        Flag(name, value, tuple(_find_other_values(name, value, kinds)), tuple(paths))
        for (_, name, _, value), paths in groups.items()
    ]
    return sorted((flag for flag in flags if flag.others), key=lambda flag: not isinstance(flag.value, bool))


@contextlib.contextmanager
def _turned(flag: Flag, other: Any, *models: nn.Module) -> Iterator[bool]:
    """Give models another value of a flag; yield False where one of them lacks it, or has another value already."""
    named = [dict(unwrap(model).named_modules(remove_duplicate=False)) for model in models]
    places = [modules[path].__dict__ for modules in named for path in flag.modules if path in modules]
    values = [place.get(flag.name) for place in places]
    is_same = len(places) == len(models) * len(flag.modules) and all(
        type(value) is type(flag.value) and value == flag.value for value in values
    )
    try:
        for place in places if is_same else ():
            place[flag.name] = other
        yield is_same
    finally:
        for place, value in zip(places, values, strict=True) if is_same else ():
            place[flag.name] = value


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
