"""Checking that a model's own code that fuses (``fuse()`` of ultralytics, timm, YOLOX) still computes the same after a
fold.

Such code reads a BatchNorm that is gone by then, and some of it leaves out the bias that a convolution gained. It is
run on copies of both models.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bntool.errors import BntoolError
from bntool.folding.deploy.fusing_methods import find_method, fuse
from bntool.models.user_code import describe_exception
from bntool.modules.copying import copy_model
from bntool.representation import format_number
from bntool.verification.outputs import measure_difference

_INSTEAD = "call it before, or fold with the layout same-keys, or deploy where that form is known"


def find_unlike_fusing(model: nn.Module, folded: nn.Module, inputs: Any, *, tolerance: float) -> tuple[str, ...]:
    """Describe what a model's own fusing gets wrong after a fold, one sentence each; nothing where it was wrong before.

    Args:
        model: the original.
        folded: a copy of it, after the fold.
        inputs: what both agree on.
        tolerance: a larger error, relative to the largest magnitude of each output, is another result.
    """
    name = _name_method(model)
    if name is None:
        return ()
    try:
        if not measure_difference(model, fuse(copy_model(model)), inputs) <= tolerance:
            return ()
    except Exception:  # noqa: BLE001 the library's own code, on its own model
        return ()
    left = f"{name}() is not called after the fold"
    try:
        error = measure_difference(model, fuse(copy_model(folded)), inputs)
    except Exception as problem:  # noqa: BLE001 it misses what the fold took away
        said = problem.message if isinstance(problem, BntoolError) else describe_exception(problem)
        return (f"{left}: it raises then ({said}); {_INSTEAD}",)
    if error <= tolerance:
        return ()
    off = f"the model then computes something else (off by {format_number(error)} of the outputs' magnitude)"
    return (f"{left}: {off}; {_INSTEAD}",)


def _name_method(model: nn.Module) -> str | None:
    """Return the class and name of the first method that fuses."""
    for module in model.modules():
        name = find_method(module)
        if name is not None:
            return f"{type(module).__name__}.{name}"
    return None
