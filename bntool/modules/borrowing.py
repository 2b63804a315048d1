"""Borrowing a live model: whatever is changed meanwhile is given back, also when something raises."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.modules import module as all_modules
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from bntool.errors import RefusedError
from bntool.modules.finding import is_uninitialized, walk_modules
from bntool.modules.memory import count_writes, lie_at_one_place

# what every module has: parameters, buffers, modules, and hooks of all kinds
_REGISTRIES = frozenset(name for name, value in vars(torch.nn.Module()).items() if isinstance(value, dict | set))
_GLOBAL_HOOKS = [v for n, v in vars(all_modules).items() if n.startswith("_global_") and isinstance(v, dict)]
_CONTAINERS = (list, dict, OrderedDict, defaultdict, set, deque)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_FEW = 1 << 13  # elements of a parameter that are copied


class Borrowed:
    """A borrowed model: what may be changed in it beside what :func:`borrow` always gives back.

    Args:
        contents: of its modules.
    """

    def __init__(self, contents: Sequence[_Contents]) -> None:
        self._contents = contents
        self._undo = contextlib.ExitStack()

    def add_forward_hook(self, module: torch.nn.Module, hook: Callable[..., Any], **options: Any) -> None:
        """Call ``module.register_forward_hook``; the hook goes when the model is given back."""
        self._keep(module.register_forward_hook(hook, **options))

    def add_forward_pre_hook(self, module: torch.nn.Module, hook: Callable[..., Any], **options: Any) -> None:
        """Call ``module.register_forward_pre_hook``; the hook goes when the model is given back."""
        self._keep(module.register_forward_pre_hook(hook, **options))

    def _keep(self, handle: RemovableHandle) -> None:
        """Keep a hook, which :meth:`reset` does not undo."""
        for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
            registry = reference()
            found = (contents.find_container(registry) for contents in self._contents)
            container = next((one for one in found if one is not None), None)
            if container is not None and registry is not None and handle.id in registry:
                container.items[handle.id] = registry[handle.id]
                self._undo.callback(container.items.pop, handle.id)
        self._undo.callback(handle.remove)

    def set_attribute(self, module: torch.nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute such as ``momentum``, or a method, until the model is given back."""
        if name in vars(module):
            self._undo.callback(setattr, module, name, vars(module)[name])
        else:
            self._undo.callback(delattr, module, name)
        setattr(module, name, value)

    def reset(self) -> None:
        """Give back now what code of the model left on its modules; elements of parameters and buffers stay."""
        with contextlib.ExitStack() as all_of_them:  # also after one that raises
            for contents in self._contents:
                all_of_them.callback(contents.give_back)

    def find_written(self, copied: Iterable[torch.nn.Parameter]) -> torch.nn.Parameter | None:
        """Return a parameter whose elements were changed and cannot be given back, because they were not copied; or
        None.
        """
        known = set(map(id, copied))
        facts = (facts for contents in self._contents for facts in contents.parameters)
        return next((f.parameter for f in facts if f.is_lost and id(f.parameter) not in known), None)

    def give_back(self) -> None:
        """Undo what was changed through this object, and what code of the model left on its modules."""
        self._undo.close()
        self.reset()
        for contents in self._contents:
            for facts in contents.parameters:
                facts.give_back_elements()


@contextlib.contextmanager
def borrow(model: torch.nn.Module) -> Iterator[Borrowed]:
    """Let a model be run and changed inside the context; after it the model is exactly as it was.

    Given back are the class and plain attributes of each module, ``training`` among them, and what lists, dicts and
    sets among these hold; its modules, parameters (the objects, their memory, hooks and ``requires_grad``) and buffers
    (object and elements); hooks of every kind, those of all modules too; and the state of torch's random generators on
    the CPU and, where CUDA is in use, on its devices. Elements of parameters are copied where they are few, and below
    modules with a train() or eval() of their own, which may merge weights: do not change others.

    What torch.compile made of the model, or of a part, runs as it was written, so that hooks are code, not traced.

    Raises:
        RefusedError: code of the model wrote to a parameter of which there is no copy.
    """
    named = list(walk_modules(model))
    modules = {id(module): module for _, module in named}.values()
    borrowed = Borrowed([_Contents(module) for module in modules if not is_uninitialized(module)])
    switched = _find_switched(modules)
    with contextlib.ExitStack() as undo:  # everything, also after something that raises
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            undo.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        undo.callback(torch.set_rng_state, torch.get_rng_state())
        for registry in _GLOBAL_HOOKS:
            undo.callback(_Container(registry).give_back)
        for module in modules:
            for buffer in module._buffers.values():
                if buffer is not None:
                    undo.callback(_Elements(buffer).give_back)
        for parameter in switched:
            undo.callback(_Elements(parameter).give_back)
        undo.callback(borrowed.give_back)
        undo.enter_context(_running_as_written())
        yield borrowed
        written = borrowed.find_written(switched)
    if written is not None:
        names = (f"{path}.{leaf}" for path, module in named for leaf, p in module._parameters.items() if p is written)
        raise RefusedError(
            "the forward writes to this parameter: run the model once before, so that whatever it prepares is there",
            tensor=next(names),
        )


def _running_as_written() -> contextlib.AbstractContextManager[None]:
    # what was not imported has compiled nothing, and costs a second; torch 2.5 cannot do it
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    as_written: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return as_written


class _Contents:
    """All that one module holds: its class, registries and attributes, and the contents of simple containers."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._class = type(module)
        self._training = module.training
        self._attributes = _find_attributes(module)
        self._registries = {name: value for name, value in vars(module).items() if name in _REGISTRIES}
        held = [v for v in (*self._attributes.values(), *self._registries.values()) if type(v) in _CONTAINERS]
        self._empty = [value for value in held if not value]  # most are: they need no copy
        self._containers = [_Container(value) for value in held if value]
        self.parameters = [_ParameterFacts(p) for p in module._parameters.values() if p is not None and _is_plain(p)]
        self._gradients = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]

    def give_back(self) -> None:
        module = self._module
        if type(module) is not self._class:  # parametrizations give a module another
            module.__class__ = self._class
        if module.training != self._training:
            module.training = self._training
        for name in _find_attributes(module).keys() - self._attributes.keys():
            delattr(module, name)
        vars(module).update(self._attributes)
        vars(module).update(self._registries)
        for container in self._containers:
            container.give_back()
        for empty in self._empty:
            if empty:
                empty.clear()
        for facts in self.parameters:
            facts.give_back()
        for parameter, requires_grad in self._gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    def find_container(self, value: Any) -> _Container | None:
        """Return the saved contents of a list, dict, set or registry of this module."""
        for position, empty in enumerate(self._empty):
            if empty is value:
                del self._empty[position]
                container = _Container(empty)
                container.items.clear()
                self._containers.append(container)
                return container
        return next((container for container in self._containers if container.container is value), None)


class _Container:
    """The items of one list, dict, set or registry, as objects."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self.items = copy.copy(container)

    def give_back(self) -> None:
        now, before = self.container, self.items
        if len(now) == len(before) and _identify(now) == _identify(before):
            return
        now.clear()
        if isinstance(now, list | deque):
            now.extend(before)
        else:
            now.update(before)


def _identify(container: Any) -> list[int]:
    values = container.values() if isinstance(container, dict) else ()
    return list(map(id, itertools.chain(container, values)))


def _is_plain(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a tensor with memory of its own."""
    return not is_lazy(parameter) and type(parameter.data) is torch.Tensor


class _ParameterFacts:
    """The facts about a parameter that a forward may change: its memory, its hooks, and its elements where they are
    few.

    Few elements are copied, as those of vectors that a first forward sets from its data. Of many it is only noticed
    that they were written to.
    """

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter = parameter
        self._data = parameter.data
        hooks = {name: getattr(parameter, name, None) for name in _TENSOR_HOOKS}
        self._hooks = {name: None if found is None else copy.copy(found) for name, found in hooks.items()}
        self._elements = _Elements(parameter) if parameter.numel() <= _FEW else None
        self._writes = count_writes(parameter)

    def give_back(self) -> None:
        parameter = self.parameter
        if not lie_at_one_place(parameter.data, self._data):
            parameter.data = self._data
        for name, hooks in self._hooks.items():
            if getattr(parameter, name, None) != hooks:
                setattr(parameter, name, hooks)

    def give_back_elements(self) -> None:
        if self._elements is not None:
            self._elements.give_back()

    @property
    def is_lost(self) -> bool:
        """Whether elements that were not copied were written to."""
        return self._elements is None and count_writes(self.parameter) != self._writes


class _Elements:
    """A copy of the elements of one tensor, if it has any."""

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
    """Return whether the class of a module does more than set a flag when its mode changes."""
    kind = type(module)
    return kind.train is not torch.nn.Module.train or kind.eval is not torch.nn.Module.eval


def _find_switched(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Return the parameters that a change of mode may change."""
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
    """Find the attributes of a module beside its registries; not those of torch on wrappers and compiled modules."""
    kind = type(module).__module__
    is_opaque = kind.partition(".")[0] == "torch" and not kind.startswith("torch.nn.modules.")
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _REGISTRIES and name != "training" and not (is_opaque and name.startswith("_"))
    }
