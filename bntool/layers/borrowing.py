"""Borrowing a live model: whatever is changed meanwhile is given back, also when something raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from bntool.layers.modules import walk_modules


class Borrowed:
    """What may be changed in a borrowed model beside modes, requires_grad and buffers, which are always given back."""

    def __init__(self) -> None:
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

    def give_back(self) -> None:
        """Undo what was changed through this object."""
        self._undo.close()


@contextlib.contextmanager
def borrow(model: torch.nn.Module) -> Iterator[Borrowed]:
    """A context in which a model may be run and changed, and after which it is exactly as it was.

    Given back are ``training`` of each module, ``requires_grad`` of each parameter, every buffer (object and
    elements), hooks and attributes set through the :class:`Borrowed`, and the state of torch's random generators on
    the CPU and, where CUDA is in use, on its devices. Parameters are not copied: do not change their elements.
    """
    modules = {id(module): module for _, module in walk_modules(model)}.values()
    modes = [(module, module.training) for module in modules]
    gradients = [(p, p.requires_grad) for module in modules for p in module._parameters.values() if p is not None]
    buffers = [
        (module, name, buffer, buffer.detach().clone() if buffer is not None and _has_elements(buffer) else None)
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    random_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    borrowed = Borrowed()
    try:
        yield borrowed
    finally:
        borrowed.give_back()
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for module, name, buffer, elements in buffers:
            _restore_buffer(module, name, buffer, elements)
        torch.set_rng_state(random_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _has_elements(buffer: torch.Tensor) -> bool:
    return not is_lazy(buffer) and not buffer.is_meta


def _restore_buffer(
    module: torch.nn.Module, name: str, buffer: torch.Tensor | None, elements: torch.Tensor | None
) -> None:
    if module._buffers.get(name) is not buffer:
        module._buffers[name] = buffer
    if buffer is not None and elements is not None and not torch.equal(buffer, elements):
        with torch.no_grad():
            buffer.copy_(elements)
