"""Choosing the state dict of a file that a command works on, and the prefix of wrappers before its names."""

from __future__ import annotations

import dataclasses

from bntool.checkpoints.checkpoint import Checkpoint, NotUnderstood, StateDict
from bntool.checkpoints.tensors import StoredTensor
from bntool.errors import RefusedError

_WELL_KNOWN_KEYS = (
    "",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
)
_MANY_PARTS = 64  # first parts of names; a state dict of more is no model beside its average
COUNT_OF_AVERAGES = "n_averaged"  # beside the model, in torch.optim.swa_utils.AveragedModel
_AVERAGED = ("ema", "shadow", "teacher", "average", "averaged", "avg", "swa", "polyak")
FLAT_AVERAGE = "ema_"  # before all names of an average that mmcv's EMAHook keeps as buffers, with _ for each dot


def is_averaged_copy(key: str) -> bool:
    """Return whether the key of a state dict names an averaged copy (EMA, SWA) of the model."""
    parts = key.lower().replace("-", "_").replace(".", "_").split("_")
    return any(part in _AVERAGED for part in parts)


def find_averaged_parts(state_dict: StateDict) -> list[str]:
    """Return first parts of names that are those of an averaged copy beside the model: ``ema`` of
    ``ema.conv1.weight``.
    """
    parts = dict.fromkeys(state_dict.strip(name).partition(".")[0] for name in state_dict.tensors if "." in name)
    return [part for part in parts if is_averaged_copy(part)] if len(parts) <= _MANY_PARTS else []


def flatten_average(name: str) -> str:
    """Return what mmcv's EMAHook calls the average of a tensor: ``ema_bn1_weight`` that of ``bn1.weight``."""
    return FLAT_AVERAGE + name.replace(".", "_")


def part_flat_average(state_dict: StateDict) -> tuple[StateDict, StateDict] | None:
    """Return the model, and the average that mmcv's EMAHook keeps beside it under the model's names; None without one.

    Buffers that the hook does not average are in the model alone.
    """
    tensors = state_dict.tensors
    flat = {flatten_average(name): name for name in tensors}
    averaged = {name: tensor for name, tensor in tensors.items() if name in flat}
    if not averaged:
        return None
    model = {name: tensor for name, tensor in tensors.items() if name not in averaged}
    average = {flat[name]: tensor for name, tensor in averaged.items()}
    renamed = {name: flat[name] for name in averaged}
    return (
        dataclasses.replace(state_dict, tensors=model, stored=model),
        dataclasses.replace(state_dict, tensors=average, stored=average, renamed=renamed),
    )


def may_hold_average(state_dict: StateDict) -> bool:
    """Return whether it is an averaged copy, or one lies in it beside the model."""
    if any(name.startswith(FLAT_AVERAGE) for name in state_dict.tensors):
        return True
    if is_averaged_copy(state_dict.key) or f"{state_dict.prefix}{COUNT_OF_AVERAGES}" in state_dict.tensors:
        return True
    return COUNT_OF_AVERAGES in state_dict.tensors or bool(find_averaged_parts(state_dict))


def choose_state_dict(checkpoint: Checkpoint, key: str | None = None) -> StateDict:
    """Return the state dict that a command works on.

    The rule: the one asked for; else the only one; else, leaving averaged copies (EMA, SWA) aside, the first of the
    well-known keys (the root, state_dict, model_state_dict, model_state, model, module, net, network, params,
    weights); else the one with the most elements.

    Raises:
        RefusedError: the file holds no state dict.
        UsageError: it holds none of that key.
    """
    if key is not None:
        return checkpoint.state_dict(key)
    if not checkpoint.state_dicts:
        why = f": {checkpoint.format.why_empty}" if checkpoint.format.why_empty else ""
        raise RefusedError(f"no state dict was found in this file{why}", path=checkpoint.path)
    candidates = [s for s in checkpoint.state_dicts if not is_averaged_copy(s.key)] or list(checkpoint.state_dicts)
    for known in _WELL_KNOWN_KEYS:
        for state_dict in candidates:
            if state_dict.key == known:
                return state_dict
    return max(candidates, key=_count_elements)


def find_not_understood(checkpoint: Checkpoint, state_dict: StateDict) -> list[NotUnderstood]:
    """Find what may be a BatchNorm of this state dict, or a part of one, and could not be read as that."""
    inside = f"{state_dict.key}."
    alone = len(checkpoint.state_dicts) == 1
    return [one for one in checkpoint.not_understood if alone or one.name.startswith(inside)]


def _count_elements(state_dict: StateDict) -> int:
    return sum(tensor.numel for tensor in state_dict.tensors.values() if isinstance(tensor, StoredTensor))


_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.", "model.")
MAX_PREFIX = 200  # characters; a hostile name repeats a wrapper a million times
UNPREFIXED = (COUNT_OF_AVERAGES, "steps")  # counters that AveragedModel and mmengine's averaging put beside the model


def find_prefix(names: list[str]) -> str:
    """Find the prefix that wrappers (DataParallel, torch.compile, FSDP, Lightning's ``model.``) put before all
    names.
    """
    names = [name for name in names if name not in UNPREFIXED]
    prefix = ""
    while names and len(prefix) < MAX_PREFIX:
        wrapper = next((w for w in _WRAPPERS if all(name.startswith(w, len(prefix)) for name in names)), None)
        if wrapper is None:
            break
        prefix += wrapper
    return prefix
