"""Modules that stay in eval mode even when ``train()`` is called.

A held module has a subclass of its own class whose ``train()`` does nothing; this travels with deepcopy, pickling, DDP
and torch.compile. The model that holds them has one whose ``train()`` holds them again afterwards, which also finds
modules that were replaced meanwhile, as ``convert_sync_batchnorm`` does.

What ``torch.jit.script`` makes of a module has a ``train()`` of its own. So the classes of held BatchNorms and dropouts
have a forward that is compiled without a mode; of others whose code asks for the mode, scripting warns.
"""

from __future__ import annotations

import copyreg
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bntool.modules.finding import ORIGINAL, original_class, walk_modules

HOLD = "_bntool_hold"  # on each held module: the mode that was asked for meanwhile
FREEZE = "_bntool_freeze"  # on the model: what to give back, and what to hold


class _Held(nn.Module):
    """Mixed into the classes of frozen modules, and of the model that contains them."""

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 (torch's own signature)
        hold = vars(self).get(HOLD)
        if hold is not None:
            hold["asked"] = mode
            return self
        super().train(mode)
        notes = vars(self).get(FREEZE)
        if notes is not None:
            notes["asked"] = mode
            hold_all(self, notes["held"])
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what torch.jit.script compiles, with a train() of its own; torch.jit.script calls this."""
        if HOLD in vars(self):
            asking = (type(module) for _, module in walk_modules(self))
            for kind in dict.fromkeys(kind.__name__ for kind in asking if _asks_for_mode(cast("Any", kind))):
                warnings.warn(
                    f"torch.jit.script does not keep the freeze of {kind}, whose own code asks for the mode: train() "
                    "of what it gives lets its statistics move again; train the model as it is written, and script it "
                    "for inference",
                    stacklevel=2,
                )
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(max(int(protocol), 2)))
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (rebuild_held, (original_class(type(self)), *arguments[1:]), *rest)
        return reduced


def rebuild_held(original: type[nn.Module], *arguments: Any) -> nn.Module:
    """Make a frozen module without its state; pickles name this function, so it keeps its name and its place."""
    held = _held_class(cast("Any", original))
    return held.__new__(held, *arguments)


@cache
def _held_class(original: Any) -> type[nn.Module]:
    # named as the original is: registries, repr and fx (by __module__) go by these names
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        ORIGINAL: original,
    }
    forward = _make_forward(original)
    if forward is not None:
        namespace["forward"] = forward
    if hasattr(original, "reset_running_stats"):
        namespace["reset_running_stats"] = _reset_unless_held
    return type(original.__name__, (_Held, original), namespace)


def _reset_unless_held(self: Any) -> None:
    """Reset the statistics unless the module is held: torch's update_bn resets all first, and those of a held module
    would stay at 0 and 1.
    """
    if HOLD not in vars(self):
        cast("Any", original_class(type(self))).reset_running_stats(self)


def _make_forward(original: Any) -> Callable[..., Any] | None:
    """Make what torch.jit.script compiles for a class of torch, its forward in eval mode; None for all other
    classes.
    """
    if original.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):

        def forward(self: Any, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's own signature)
            if not torch.jit.is_scripting():  # type: ignore[attr-defined]
                return cast("torch.Tensor", original.forward(self, input))
            self._check_input_dim(input)
            by_batch = self.running_mean is None and self.running_var is None
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, by_batch, 0.0, self.eps
            )

    elif issubclass(original, _DropoutNd) and original.__module__ == _DropoutNd.__module__:

        def forward(self: Any, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            if not torch.jit.is_scripting():  # type: ignore[attr-defined]
                return cast("torch.Tensor", original.forward(self, input))
            return input

    else:
        return None
    return forward


@cache
def _asks_for_mode(kind: type) -> bool:
    """Return whether code of a class, other than that of :func:`_make_forward`, reads ``training``."""
    if ORIGINAL in vars(kind) and "forward" in vars(kind):
        return False
    classes = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base not in (nn.Module, _Held)]
    functions = (value for base in classes for value in vars(base).values() if inspect.isfunction(value))
    return any("training" in function.__code__.co_names for function in functions)


def swap_class(module: nn.Module) -> None:
    if not isinstance(module, _Held):
        module.__class__ = _held_class(cast("Any", type(module)))


def can_carry(module: nn.Module) -> bool:
    """Return whether the class of a model can be swapped: not where it pickles itself in its own way, as fx's
    GraphModule.
    """
    kind = type(module)
    return kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__


def hold(module: nn.Module) -> None:
    """Keep a module and all below it in eval mode."""
    if not isinstance(module, torch.jit.ScriptModule):
        swap_class(module)
        vars(module).setdefault(HOLD, {"asked": None})
    for _, inner in walk_modules(module):
        inner.training = False
        if isinstance(inner, torch.jit.ScriptModule):  # compiled since, with the forward of a held one
            continue
        if _make_forward(original_class(type(inner))) is not None:  # for a script, each is held by itself
            swap_class(inner)
            vars(inner).setdefault(HOLD, {"asked": None})


def hold_all(root: nn.Module, names: Sequence[str]) -> None:
    """Hold the modules of these names that exist in eval mode."""
    modules = dict(walk_modules(root))
    for name in names:
        if name in modules:
            hold(modules[name])


def release(module: nn.Module) -> None:
    """Give a module the class that it had; its mode stays as it is.

    One whose class was changed since, as fully_shard and parametrisations do, keeps that: it is held no longer either.
    """
    vars(module).pop(HOLD, None)
    if ORIGINAL in vars(type(module)):
        module.__class__ = original_class(type(module))


def asked_mode(module: nn.Module) -> bool | None:
    """Return the mode that was last asked of a held module; None where none was."""
    asked = vars(module).get(HOLD, {}).get("asked")
    return None if asked is None else bool(asked)
