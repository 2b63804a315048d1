"""Carrying out a plan on a live module: the same steps as on a file, and those that only a module knows."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from bntool.checkpoints.application import change_state_dict
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import Tensor
from bntool.errors import UsageError
from bntool.modules.finding import find_name_prefix, find_wrapper_prefix, walk_modules
from bntool.modules.loading import LiveTensor, load_state
from bntool.modules.padding import change_padding
from bntool.names import remove_prefix
from bntool.plan import AddTensor, ChangePadding, Plan, RemoveModule, RemoveTensor, RenameTensor, SetAttribute, Step

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_AFTER_NORM = ("drop", "act")  # children of combined modules, in the order in which they run


def apply_plan(model: nn.Module, plan: Plan, state_dict: StateDict | None = None) -> None:
    """Change a live model as the plan says.

    Args:
        model: changed in place.
        plan: its names are those of the unwrapped model.
        state_dict: what the recipes of the plan start from; the model's own tensors if not given.

    Raises:
        UsageError: the plan names something that the model does not have.
        RefusedError: an element is too large for its dtype.
    """
    original = state_dict if state_dict is not None else read_state(model)
    changed = change_state_dict(original, plan.steps)
    change_structure(model, plan.steps)
    load_state(model, changed)


def change_structure(model: nn.Module, steps: Iterable[Step]) -> None:
    """Add and remove parameters, buffers and modules as steps say; elements of new tensors are not set.

    Raises:
        UsageError: a step names something that the model does not have.
    """
    steps = tuple(steps)
    prefix = find_name_prefix(model, map(_find_place, steps))
    modules = {remove_prefix(name, prefix): module for name, module in walk_modules(model)}
    steps = list(steps)
    _rename(model, {step.name: step.new_name for step in steps if isinstance(step, RenameTensor)})
    means = {step.module: _find_mean(modules, step.module) for step in steps if isinstance(step, RemoveModule)}
    for step in steps:
        if isinstance(step, AddTensor):
            _add(_find(modules, step.name.rpartition(".")[0]), step)
        elif isinstance(step, RemoveTensor):
            path, _, leaf = step.name.rpartition(".")
            if path in modules:
                _remove(modules[path], leaf)
        elif isinstance(step, RemoveModule):
            path, _, leaf = step.module.rpartition(".")
            parent = _find(modules, path)
            module = _find(modules, step.module)
            parent._modules[leaf] = remaining = what_remains(module, copies=step.copies)
            _add_neutral_tensors(remaining, means[step.module], getattr(module, "eps", None))
        elif isinstance(step, ChangePadding):
            change_padding(_find(modules, step.module))
        elif isinstance(step, SetAttribute):
            _set_attribute(_find(modules, step.module), step)


def _find_place(step: Step) -> str:
    if isinstance(step, RemoveModule | ChangePadding | SetAttribute):
        return f"{step.module}."
    return step.name if isinstance(step, AddTensor | RemoveTensor) else ""


def what_remains(module: nn.Module, *, copies: bool = False) -> nn.Module:
    """Return the module that takes the place of a folded BatchNorm: the identity, or the activation of a combined
    module.

    It is given the forward hooks of the BatchNorm: its output is still the same.

    Args:
        copies: it gives a copy of what it is given, because something writes into that.
    """
    children = OrderedDict(
        (name, child) for name in _AFTER_NORM if isinstance(child := module._modules.get(name), nn.Module)
    )
    # no bound cuts anything: a plain module of torch that copies
    identity = nn.Hardtanh(-math.inf, math.inf) if copies else nn.Identity()
    if copies and "act" in children:
        children = OrderedDict([("copy", identity), *children.items()])
    remaining = nn.Sequential(children) if "act" in children else identity
    if "act" in children:
        remaining.train(module.training)
    for hooks in _HOOKS:  # the very dicts, so that whoever added a hook can remove it
        setattr(remaining, hooks, getattr(module, hooks))
    return remaining


def _find_mean(modules: dict[str, nn.Module], path: str) -> torch.Tensor | None:
    return modules[path]._buffers.get("running_mean") if path in modules else None


def _add_neutral_tensors(remaining: nn.Module, mean: torch.Tensor | None, eps: object) -> None:
    """Add the tensors of the identity, for code that folds by itself afterwards (``fuse()`` of a library) and asks a
    BatchNorm for them.

    They are in no state dict.
    """
    if mean is None or not isinstance(eps, int | float):
        return
    one = torch.ones_like(mean, requires_grad=False)
    neutral = {"weight": one, "bias": 0 * one, "running_mean": 0 * one, "running_var": one - eps}
    for name, tensor in neutral.items():
        remaining.register_buffer(name, tensor, persistent=False)
    vars(remaining)["eps"] = float(eps)


def _find(modules: dict[str, nn.Module], path: str) -> nn.Module:
    if path not in modules:
        raise UsageError("the model has no such module; is it the model that the checkpoint belongs to?", tensor=path)
    return modules[path]


def _add(module: nn.Module, step: AddTensor) -> None:
    leaf = step.name.rpartition(".")[2]
    if module._parameters.get(leaf) is not None or module._buffers.get(leaf) is not None:
        return  # the same module under another name
    neighbours = (*module._parameters.values(), *module._buffers.values())
    neighbour = next((tensor for tensor in neighbours if tensor is not None), None)
    shape = step.value.shape if hasattr(step.value, "shape") else step.value.view
    dtype: torch.dtype = getattr(torch, step.dtype)
    if neighbour is not None and neighbour.is_floating_point():
        dtype = neighbour.dtype  # the live model may compute in another precision than the file stores
    tensor = torch.zeros(shape, dtype=dtype, device=None if neighbour is None else neighbour.device)
    if step.is_parameter:
        wanted = neighbour.requires_grad if isinstance(neighbour, nn.Parameter) else True
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=wanted))
    else:
        module.register_buffer(leaf, tensor)


def _remove(module: nn.Module, leaf: str) -> None:
    """Remove a tensor but keep its name, so that the module's code reads None."""
    for slot in (module._parameters, module._buffers):
        if leaf in slot:
            slot[leaf] = None


def _rename(model: nn.Module, renames: Mapping[str, str]) -> None:
    """Move tensors, and with all tensors of a module the module itself; the code that calls it is not changed.

    Raises:
        UsageError: the model has no such tensor, or has one of the new name.
    """
    modules = dict(walk_modules(model))
    targets: dict[str, dict[str, tuple[str, str]]] = {}  # of each owner, by leaf: new owner and leaf
    for old, new in renames.items():
        (path, _, leaf), (new_path, _, new_leaf) = old.rpartition("."), new.rpartition(".")
        owner = modules.get(path)
        if owner is None or (owner._parameters.get(leaf) is None and owner._buffers.get(leaf) is None):
            raise UsageError("the model has no such tensor", tensor=old)
        targets.setdefault(path, {})[leaf] = (new_path, new_leaf)
    taken: list[tuple[str, nn.Module | torch.Tensor | None]] = []
    for path, leaves in targets.items():
        owner = modules[path]
        slots = (owner._parameters, owner._buffers)
        own = {name for slot in slots for name, tensor in slot.items() if tensor is not None}
        places = {new_path for new_path, _ in leaves.values()}
        if path and own == leaves.keys() and len(places) == 1 and all(leaf == new for leaf, (_, new) in leaves.items()):
            parent, _, name = path.rpartition(".")
            del modules[parent]._modules[name]
            taken.append((places.pop(), owner))
            continue
        for leaf, (new_path, new_leaf) in leaves.items():
            slot = next(slot for slot in slots if slot.get(leaf) is not None)
            taken.append((f"{new_path}.{new_leaf}".removeprefix("."), slot[leaf]))
            slot[leaf] = None
    for name, value in taken:
        _place(model, name, value)


def _place(model: nn.Module, name: str, value: nn.Module | torch.Tensor | None) -> None:
    """Put a module or a tensor under a name; modules on the way that are not there are made, empty."""
    path, _, leaf = name.rpartition(".")
    target = model
    for part in path.split(".") if path else ():
        if target._modules.get(part) is None:
            target.add_module(part, nn.Module())
        target = target.get_submodule(part)
    if any(slot.get(leaf) is not None for slot in (target._parameters, target._buffers, target._modules)):
        raise UsageError(f"nothing can be renamed to {name!r}: something else has that name", tensor=name)
    if isinstance(value, nn.Module):
        target.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        target.register_parameter(leaf, value)
    else:
        target.register_buffer(leaf, value)


def _set_attribute(module: nn.Module, step: SetAttribute) -> None:
    owner, _, attribute = step.attribute.rpartition(".")
    if not owner:
        setattr(module, attribute, step.value)
        return
    parameter = module._parameters.get(owner)
    if parameter is None or attribute != "requires_grad":
        raise UsageError(f"the model has no {step.attribute} there", tensor=step.module)
    parameter.requires_grad_(bool(step.value))


def read_state(model: nn.Module) -> StateDict:
    """Return the state of a live model as if it came from a file; its tensors are those of the model, not copies."""
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {
        name: LiveTensor(tensor) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)
    }
    versions = {path: facts.get("version") for path, facts in getattr(state, "_metadata", {}).items()}
    return StateDict(key="", prefix=find_wrapper_prefix(model), tensors=tensors, versions=versions)
