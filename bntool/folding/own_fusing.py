"""Whether a model's own code that fuses (``fuse()`` of ultralytics, timm, YOLOX) still computes the same after a fold.

Such code reads a BatchNorm that is gone by then, and some of it leaves out the bias that a convolution gained. It is
run on copies of both models.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from bntool.errors import BntoolError
from bntool.models.user_code import describe_exception
from bntool.modules.copying import copy_model
from bntool.representation import format_number
from bntool.verification.outputs import measure_difference

# of ultralytics and LeViT; of timm's MobileOne, FastViT and others; of RepVGG's authors
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_INSTEAD = "call it before, or fold with the layout same-keys"
_METHODS = ("fuse", "reparameterize", "switch_to_deploy")


def find_unlike_fusing(model: nn.Module, folded: nn.Module, inputs: Any, *, tolerance: float) -> tuple[str, ...]:
    """What of a model's own fusing is wrong after a fold, a sentence; nothing where it was wrong before.

    Args:
        model: the original.
        folded: a copy of it, after the fold.
        inputs: what both agree on.
        tolerance: a larger error, relative to the largest magnitude of each output, is another result.
    """
    name = _find_method(model)
    if name is None:
        return ()
    try:
        if not measure_difference(model, _fuse(copy_model(model)), inputs) <= tolerance:
            return ()
    except Exception:  # noqa: BLE001 the library's own code, on its own model
        return ()
    left = f"{name}() is not called after the fold"
    try:
        error = measure_difference(model, _fuse(copy_model(folded)), inputs)
    except Exception as problem:  # noqa: BLE001 it misses what the fold took away
        said = problem.message if isinstance(problem, BntoolError) else describe_exception(problem)
        return (f"{left}: it raises then ({said}); {_INSTEAD}",)
    if error <= tolerance:
        return ()
    off = f"the model then computes something else (off by {format_number(error)} of the outputs' magnitude)"
    return (f"{left}: {off}; {_INSTEAD}",)


def _find_method(model: nn.Module) -> str | None:
    """The class and name of the first method that fuses."""
    for module in model.modules():
        for name in _METHODS:
            if _takes_nothing(module, name):
                return f"{type(module).__name__}.{name}"
    return None


def _takes_nothing(module: nn.Module, name: str) -> bool:
    """Whether its class has this method, and it can be called without arguments."""
    method = getattr(type(module), name, None)
    if not inspect.isfunction(method):
        return False
    _, *parameters = inspect.signature(method).parameters.values()
    return all(parameter.default is not parameter.empty or parameter.kind in _VARIADIC for parameter in parameters)


def _fuse(model: nn.Module) -> nn.Module:
    """Let a model fuse itself, or each of its parts, as ``reparameterize_model`` of timm 1.0 goes through them."""
    for name in _METHODS:
        if _takes_nothing(model, name):
            quiet = {"verbose": False} if "verbose" in inspect.signature(getattr(model, name)).parameters else {}
            fused = getattr(model, name)(**quiet)
            return fused if isinstance(fused, nn.Module) else model
    for name, child in list(model.named_children()):
        setattr(model, name, _fuse(child))
    return model
