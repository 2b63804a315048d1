"""Freezing BatchNorm in a live model, in a way that outlasts ``model.train()``."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bntool.batchnorm import STATISTICS, check_globs, selects
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.errors import RefusedError, UsageError
from bntool.freezing.held_modules import FREEZE, HOLD, asked_mode, can_carry, hold_all, release, swap_class
from bntool.freezing.policy import FreezePolicy
from bntool.freezing.stages import find_frozen_stages, is_within
from bntool.freezing.unheld import find_normalising_themselves, skip_unheld
from bntool.models.exported import is_exported
from bntool.modules.finding import (
    check_is_model,
    describe_unread_statistics,
    find_batchnorm_modules,
    find_name_prefix,
    find_wrapper_prefix,
    is_batchnorm,
    is_frozen_class,
    is_uninitialized,
    normalises_by_statistics,
    skip_unread_statistics,
    unwrap,
    walk_modules,
)
from bntool.names import join_name
from bntool.plan import Skip


def freeze(
    model: nn.Module,
    *,
    norm_eval: bool = True,
    requires_grad: bool | None = None,
    layers: str | Sequence[str] | None = None,
    frozen_stages: int | None = None,
) -> FreezePolicy:
    """Freeze the BatchNorm layers of a model until :func:`unfreeze`, whatever ``train()`` is called.

    The defaults are mmdet's ``norm_eval=True``: statistics stay, weight and bias go on training. Freeze after
    ``convert_sync_batchnorm``, and before wrapping in DDP if gradients are switched off.

    Args:
        norm_eval: keep the layers in eval mode: they normalise by their statistics, and these do not move.
        requires_grad: False also keeps weight and bias, and drops a gradient that they have already: SGD would
            still apply it. True lets them train; None leaves them as they are.
        layers: globs of layer names, without a wrapper's prefix; None for all.
        frozen_stages: freeze the first stages of the backbone as a whole, as mmdet's option of that name does; see
            :func:`~bntool.freezing.stages.find_frozen_stages`.

    Returns:
        What is frozen now.

    Raises:
        UsageError: no BatchNorm is selected, nothing is switched, or the stages are not known.
        RefusedError: a layer is lazy and has seen no batch, the model is scripted or exported, or gradients would be
            switched off under DDP; the model is as it was.

    Layers of classes of one's own whose statistics move in eval mode too are skipped: a copy of each is run on random
    data. Where the forward of a module around layers calls batch_norm with their statistics, a warning says so.
    """
    check_is_model(model, for_files="freeze_checkpoint")
    _refuse_programs(model)
    prefix = find_wrapper_prefix(model)
    globs = [layers] if isinstance(layers, str) else list(layers or ())
    found = find_batchnorm_modules(model)
    check_globs(globs, [name.removeprefix(prefix) for name in found])
    names = [
        name.removeprefix(prefix)
        for name, module in found.items()
        if not is_frozen_class(module)
        and selects(globs, name.removeprefix(prefix))
        # one without statistics normalises by each batch in eval mode too: only its weight and bias can be frozen
        and (requires_grad is not None or is_uninitialized(module) or normalises_by_statistics(module))
    ]
    if not norm_eval and requires_grad is None and frozen_stages is None:
        raise UsageError("norm_eval=False and requires_grad=None freeze nothing")
    unheld = skip_unheld({name: found[prefix + name] for name in names}) if norm_eval else []
    names = [name for name in names if name not in {skip.layer for skip in unheld}]
    if not names and frozen_stages is None:
        raise UsageError(_describe_nothing(model, found, prefix, unheld))
    stages = None
    if frozen_stages is not None:
        stages = find_frozen_stages([name.removeprefix(prefix) for name, _ in walk_modules(model)], frozen_stages)
    policy = FreezePolicy(
        norm_eval=norm_eval,
        requires_grad=requires_grad,
        layers=tuple(names),
        stages=stages,
        skips=(*unheld, *skip_unread_statistics(model, globs, prefix=prefix)),
    )
    _apply(model, policy, prefix)
    return policy


def apply_freeze(model: nn.Module, path: str | os.PathLike[str], *, state_dict: str | None = None) -> FreezePolicy:
    """Freeze a model as the policy says that ``bntool freeze`` recorded in a checkpoint.

    Args:
        model: the model whose state the checkpoint holds; wrappers' prefixes do not matter.
        path: the checkpoint.
        state_dict: which one, where the file holds several policies.

    Raises:
        UsageError: the file holds no policy, or the model lacks a layer that it names.
        FileError: the file cannot be read.
        RefusedError: as for :func:`freeze`.
    """
    check_is_model(model, for_files="freeze_checkpoint")
    with open_checkpoint(path) as checkpoint:
        policy = _read_policy(checkpoint, state_dict)
    _refuse_programs(model)
    prefix = find_name_prefix(model, [f"{name}." for name in policy.layers])
    existing = dict(walk_modules(model))
    stages = policy.stages
    wanted = [*policy.layers, *(() if stages is None else (*stages.without_gradient, *stages.in_eval))]
    absent = [name for name in wanted if prefix + name not in existing]
    if absent:
        raise UsageError(
            f"the model has no {absent[0]}, which the file freezes ({len(absent)} of {len(wanted)} names are missing); "
            "is it the model that the checkpoint belongs to?",
            path=path,
            tensor=absent[0],
        )
    if policy.norm_eval:
        for skip in skip_unheld({name: existing[prefix + name] for name in policy.layers}):
            raise RefusedError(f"it cannot be frozen: {skip.detail}", tensor=skip.layer)
    _apply(model, policy, prefix)
    return policy


def unfreeze(model: nn.Module) -> None:
    """Undo :func:`freeze`: classes, requires_grad and modes are what they would be without it.

    Modes are those that the last ``train()`` or ``eval()`` asked for meanwhile. Dropped gradients are not brought back.

    Raises:
        UsageError: the model is not frozen.
    """
    roots = [(name, module) for name, module in walk_modules(model) if FREEZE in vars(module)]
    if not roots:
        inside = any(HOLD in vars(module) for _, module in walk_modules(model))
        raise UsageError(
            "this is part of a larger model that was frozen; unfreeze that one" if inside else "the model is not frozen"
        )
    for _, root in roots:
        _unfreeze(root)


@contextlib.contextmanager
def frozen(
    model: nn.Module,
    *,
    norm_eval: bool = True,
    requires_grad: bool | None = None,
    layers: str | Sequence[str] | None = None,
    frozen_stages: int | None = None,
) -> Iterator[FreezePolicy]:
    """Freeze a model inside the context as :func:`freeze` does; after it the model is as it was before.

    Modes and requires_grad are those of before, whatever is called inside. Contexts and freezes nest.
    """
    check_is_model(model, for_files="freeze_checkpoint")
    modules = [module for _, module in walk_modules(model)]
    before = [
        (module, type(module), {key: _copy(vars(module)[key]) for key in (HOLD, FREEZE) if key in vars(module)})
        for module in modules
    ]
    modes = [(module, module.training) for module in modules]
    gradients = [(p, p.requires_grad) for module in modules for p in module._parameters.values() if p is not None]
    try:
        yield freeze(
            model, norm_eval=norm_eval, requires_grad=requires_grad, layers=layers, frozen_stages=frozen_stages
        )
    finally:
        for module, kind, notes in before:
            for key in (HOLD, FREEZE):
                vars(module).pop(key, None)
            vars(module).update(notes)
            if type(module) is not kind:
                module.__class__ = kind
        for module, training in modes:
            module.training = training
        for parameter, requires_grad_before in gradients:
            parameter.requires_grad_(requires_grad_before)


def _describe_nothing(model: nn.Module, found: dict[str, nn.Module], prefix: str, unheld: Sequence[Skip]) -> str:
    """Explain why none of the BatchNorms that were found can be frozen."""
    for skip in unheld:
        return f"no BatchNorm layer could be frozen: {skip.layer or 'the model itself'}: {skip.detail}"
    if not found:
        unread = describe_unread_statistics(model)
        return f"the model has no BatchNorm layer that could be frozen{': ' * bool(unread)}{unread}"
    named = {name.removeprefix(prefix): module for name, module in found.items()}
    for name, module in named.items():
        if not is_frozen_class(module) and not normalises_by_statistics(module):
            return (
                f"no BatchNorm layer could be frozen: {name} keeps no statistics and normalises by each batch in eval "
                "mode too; requires_grad=False freezes its weight and bias"
            )
    return f"no BatchNorm layer could be frozen: {next(iter(named))} never changes, it is frozen by its class"


def _apply(model: nn.Module, policy: FreezePolicy, prefix: str) -> None:
    root = unwrap(model)
    here = prefix.removeprefix(_path_of(model, root))
    modules = dict(walk_modules(root))
    layers = {here + name: modules[here + name] for name in policy.layers}
    stages = policy.stages
    in_eval = [here + name for name in stages.in_eval] if stages is not None else []
    without_gradient = [here + name for name in stages.without_gradient] if stages is not None else []
    held = [*in_eval, *(layers if policy.norm_eval else ())]

    changes: dict[str, bool] = {}
    for name, module in modules.items():
        for leaf, parameter in module._parameters.items():
            full = join_name(name, leaf)
            wanted = policy.requires_grad if name in layers else None
            if is_within(full, without_gradient):
                wanted = False
            if parameter is not None and wanted is not None:
                changes[full] = wanted
    _check(model, modules, layers=layers, changes=changes)
    _check_shared(modules, held)
    _warn_of_normalising(modules, layers if policy.norm_eval else {})

    notes = vars(root).setdefault(FREEZE, {"held": [], "modes": {}, "gradients": {}, "asked": None})
    for name, module in modules.items():
        if is_within(name, held):
            notes["modes"].setdefault(name, module.training)
    notes["held"] = list(dict.fromkeys([*notes["held"], *held]))
    for full, wanted in changes.items():
        parameter = _parameter(modules, full)
        assert parameter is not None
        notes["gradients"].setdefault(full, parameter.requires_grad)
        parameter.requires_grad_(wanted)
        if not wanted:
            parameter.grad = None
    if held and can_carry(root):
        swap_class(root)
    hold_all(root, notes["held"])


def _warn_of_normalising(modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> None:
    for kind, layer in find_normalising_themselves(modules, layers).items():
        warnings.warn(
            f"the forward of {kind} calls batch_norm with the statistics of its layers itself (the first is {layer}): "
            "where it does so in train mode they move, since a freeze holds the mode of the layers alone",
            stacklevel=4,
        )


def _path_of(model: nn.Module, root: nn.Module) -> str:
    """Return the prefix that wrappers put before the names of the model inside."""
    path = next(name for name, module in walk_modules(model) if module is root)
    return f"{path}." if path else ""


def _refuse_programs(model: nn.Module) -> None:
    for _, module in walk_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise RefusedError(
                "a scripted model cannot be frozen, its code is compiled: freeze the model and script it then, which "
                "keeps the freeze of torch's own layers, and warns of others"
            )
        if is_exported(module):
            raise RefusedError(
                "an exported program cannot be frozen, the mode of its layers is part of it: freeze the model and "
                "export it then"
            )


def _check(
    model: nn.Module, modules: dict[str, nn.Module], *, layers: dict[str, nn.Module], changes: dict[str, bool]
) -> None:
    for name, module in layers.items():
        if is_uninitialized(module):
            raise RefusedError("this layer is lazy and has seen no batch; run one through the model first", tensor=name)
    switched = [
        f for f, wanted in changes.items() if (p := _parameter(modules, f)) is None or p.requires_grad != wanted
    ]
    if switched and isinstance(model, nn.parallel.DistributedDataParallel):
        raise RefusedError(
            "DDP waits for gradients of all parameters that had them when it was made; freeze first, then wrap"
        )


def _check_shared(modules: dict[str, nn.Module], held: Sequence[str]) -> None:
    """Refuse to hold statistics that a layer which is not held goes on changing.

    Raises:
        RefusedError
    """
    statistics = {
        name: [tensor for role in STATISTICS if (tensor := module._buffers.get(role)) is not None]
        for name, module in modules.items()
        if is_batchnorm(module) and not is_frozen_class(module)
    }
    names = {id(module): name for name, module in modules.items() if is_within(name, held)}
    kept = {id(tensor): name for name in names.values() for tensor in statistics.get(name, ())}
    for name, tensors in statistics.items():
        shared = next((kept[id(tensor)] for tensor in tensors if id(tensor) in kept), None)
        if shared is not None and id(modules[name]) not in names:
            raise RefusedError(
                f"its statistics are those of {name}, too, which would go on changing them: freeze both", tensor=shared
            )


def _parameter(modules: dict[str, nn.Module], full: str) -> nn.Parameter | None:
    owner, _, leaf = full.rpartition(".")
    return modules[owner]._parameters.get(leaf) if owner in modules else None


def _unfreeze(root: nn.Module) -> None:
    notes = vars(root).pop(FREEZE)
    modules = dict(walk_modules(root))
    modes = {
        name: _asked(name, modules, notes["held"], default=notes["asked"], before=before)
        for name, before in notes["modes"].items()
    }
    for module in {id(module): module for module in modules.values()}.values():
        release(module)
    for name, mode in modes.items():
        if name in modules:
            modules[name].training = mode
    for full, requires_grad in notes["gradients"].items():
        parameter = _parameter(modules, full)
        if parameter is not None:
            parameter.requires_grad_(requires_grad)


def _asked(
    name: str, modules: dict[str, nn.Module], held: Sequence[str], *, default: bool | None, before: bool
) -> bool:
    """Return the mode that a module would be in: the last one asked of it, or of a held module above it, or of the
    model.
    """
    above = sorted((other for other in held if is_within(name, (other,))), key=len, reverse=True)
    for other in above:
        asked = asked_mode(modules[other]) if other in modules else None
        if asked is not None:
            return asked
    return before if default is None else default


def _copy(notes: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() if isinstance(value, list | dict) else value for key, value in notes.items()}


def _read_policy(checkpoint: Checkpoint, key: str | None) -> FreezePolicy:
    policies = {}
    for name, history in checkpoint.records.items():
        for record in history:
            if isinstance(record.get("policy"), dict) and record.get("operation") == "freeze":
                policies[name] = record["policy"]
    if key is None and len(policies) == 1:
        (policy,) = policies.values()
        return FreezePolicy.from_record(policy)
    name = choose_state_dict(checkpoint, key).key
    if name not in policies:
        raise UsageError(
            "no freeze policy is recorded in this file; write one with: bntool freeze CKPT -o OUT", path=checkpoint.path
        )
    return FreezePolicy.from_record(policies[name])
