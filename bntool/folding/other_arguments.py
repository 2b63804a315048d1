"""Arguments of a forward that nobody gave: where another value of one computes something else after a fold, it is said.

A trace follows one way through the code. ``self.bn(y) if normalise else y`` reads a convolution without its BatchNorm
where another argument is given, and no module tells of it. So the models are run once more for each switch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from bntool.errors import UserCodeError, VerificationError
from bntool.representation import format_number
from bntool.verification.outputs import measure_difference

_TRIED = 8  # switches of one forward
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def find_unlike_arguments(model: nn.Module, folded: nn.Module, inputs: Any, *, tolerance: float) -> tuple[str, ...]:
    """What must stay as it is for a folded model to compute what the original does, a sentence each.

    Args:
        model: the original.
        folded: a copy of it, after the fold.
        inputs: what both agree on.
        tolerance: a larger error, relative to the largest magnitude of each output, is another result.
    """
    found = []
    for name, value, changed in find_switches(model, inputs):
        try:
            error = measure_difference(model, folded, changed)
        except UserCodeError:  # the model does not take it
            continue
        except VerificationError:  # outputs of other shapes
            error = float("inf")
        if not error <= tolerance:
            found.append(
                f"{name}={value!r} is not given to the forward: the folded model then computes something else "
                f"(off by {format_number(error)} of the outputs' magnitude)"
            )
    return tuple(found)


def find_switches(model: nn.Module, inputs: Any) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """The switches of a forward that inputs leave as they are: name, the other value, and inputs with it.

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
    for name, value in switches[:_TRIED]:
        yield name, value, {**given.arguments, name: value}


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)
