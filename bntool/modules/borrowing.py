"""Borrowing a live model: whatever is changed meanwhile is given back, also when something raises."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from bntool.modules.finding import is_uninitialized, walk_modules
from bntool.modules.memory import count_writes

_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))


class Borrowed:
    """What may be changed in a borrowed model beside what :func:`borrow` always gives back.

    Args:
        contents: of its modules.
    """

    def __init__(self, contents: Sequence[_Contents]) -> None:
        self._contents = contents
        self._undo = contextlib.ExitStack()

    def add_forward_hook(self, module: torch.nn.Module, hook: Callable[..., Any], **options: Any) -> None:
        """``module.register_forward_hook``, until the model is given back."""
        self._undo.callback(module.register_forward_hook(hook, **options).remove)

    def add_forward_pre_hook(self, module: torch.nn.Module, hook: Callable[..., Any], **options: Any) -> None:
        """``module.register_forward_pre_hook``, until the model is given back."""
        self._undo.callback(module.register_forward_pre_hook(hook, **options).remove)

    def set_attribute(self, module: torch.nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute such as ``momentum``, or a method, until the model is given back."""
        if name in vars(module):
            self._undo.callback(setattr, module, name, vars(module)[name])
        else:
            self._undo.callback(delattr, module, name)
        setattr(module, name, value)

    def reset(self) -> None:
        """Give back now what code of the model left on its modules; elements of buffers stay."""
        with contextlib.ExitStack() as all_of_them:  # also after one that raises
            for contents in self._contents:
                all_of_them.callback(contents.give_back)

    def give_back(self) -> None:
        """Undo what was changed through this object, and what code of the model left on its modules."""
        self._undo.close()
        self.reset()


@contextlib.contextmanager
def borrow(model: torch.nn.Module) -> Iterator[Borrowed]:
    """A context in which a model may be run and changed, and after which it is exactly as it was.

    Given back are the plain attributes of each module, ``training`` among them, its modules and parameters (the objects
    and ``requires_grad``), every buffer (object and elements), hooks and attributes set through the :class:`Borrowed`,
    and the state of torch's random generators on the CPU and, where CUDA is in use, on its devices. Elements of
    parameters are copied only below modules with a train() or eval() of their own, which may merge weights: do not
    change others.

    What torch.compile made of the model, or of a part, runs as it was written, so that hooks are code, not traced.
    """
    modules = {id(module): module for _, module in walk_modules(model)}.values()
    borrowed = Borrowed([_Contents(module) for module in modules if not is_uninitialized(module)])
    with contextlib.ExitStack() as undo:  # everything, also after something that raises
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            undo.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        undo.callback(torch.set_rng_state, torch.get_rng_state())
        for module in modules:
            for buffer in module._buffers.values():
                if buffer is not None:
                    undo.callback(_Elements(buffer).give_back)
        for parameter in _find_switched(modules):
            undo.callback(_Elements(parameter).give_back)
        undo.callback(borrowed.give_back)
        undo.enter_context(_running_as_written())
        yield borrowed


def _running_as_written() -> contextlib.AbstractContextManager[None]:
    # what was not imported has compiled nothing, and costs a second; torch 2.5 cannot do it
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    as_written: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return as_written


class _Contents:
    """What one module holds, as objects."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._training = module.training
        self._attributes = _find_attributes(module)
        self._registered = {kind: dict(getattr(module, kind)) for kind in _find_registries(module)}
        self._gradients = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]

    def give_back(self) -> None:
        module = self._module
        if module.training != self._training:
            module.training = self._training
        for name in _find_attributes(module).keys() - self._attributes.keys():
            delattr(module, name)
        vars(module).update(self._attributes)
        # functional_call swaps tensors while it runs, and is not to leave others behind where it was interrupted
        for kind, before in self._registered.items():
            now = getattr(module, kind)
            for name in now.keys() - before.keys():
                del now[name]
            for name, value in before.items():
                if now.get(name) is not value:
                    now[name] = value
        for parameter, requires_grad in self._gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


class _Elements:
    """The elements of one tensor, where it has any."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._copy = None if is_lazy(tensor) or tensor.is_meta else tensor.detach().clone()
        self._writes = 0 if self._copy is None else count_writes(tensor)

    def give_back(self) -> None:
        if self._copy is not None and self._has_changed(self._copy):
            with torch.no_grad():
                self._tensor.copy_(self._copy)

    def _has_changed(self, before: torch.Tensor) -> bool:
        try:
            return not torch.equal(self._tensor, before)
        except RuntimeError:  # sparse and nested tensors cannot be compared, but their changes are counted
            return count_writes(self._tensor) != self._writes


def is_switching(module: torch.nn.Module) -> bool:
    """Whether the class of a module does something of its own when its mode changes."""
    kind = type(module)
    return kind.train is not torch.nn.Module.train or kind.eval is not torch.nn.Module.eval


def _find_switched(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters that a change of modes may change: those below modules that do something of their own then."""
    found = {
        id(parameter): parameter
        for module in modules
        if is_switching(module)
        for _, below in walk_modules(module)
        for parameter in below._parameters.values()
        if parameter is not None
    }
    return list(found.values())


def _find_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """What is kept on a module beside what is registered: not what torch itself keeps there."""
    is_torchs = type(module).__module__.partition(".")[0] == "torch"
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") or not (is_torchs or name in _OF_EVERY_MODULE)
    }


def _find_registries(module: torch.nn.Module) -> tuple[str, ...]:
    # what is compiled holds its own
    return () if isinstance(module, torch.jit.ScriptModule) else ("_parameters", "_buffers", "_modules")
