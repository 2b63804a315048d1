"""Choosing the layers of a live model that are to be recalibrated, and checking that they can be."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch

from bntool.batchnorm import STATISTICS, check_globs, selects
from bntool.data.batches import Batch, copy_batch
from bntool.errors import BntoolError, RefusedError
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import borrow
from bntool.modules.finding import (
    find_batchnorm_modules,
    find_scripted,
    has_statistics,
    is_batchnorm,
    is_frozen_class,
    is_uninitialized,
    normalises_by_statistics,
    skip_unread_statistics,
    unwrap,
    walk_modules,
)
from bntool.plan import Skip, SkipReason
from bntool.recalibration.ranks import find_ranks


def choose_layers(
    model: torch.nn.Module, globs: Sequence[str], *, prefix: str
) -> tuple[dict[str, torch.nn.Module], list[Skip]]:
    """Return the selected BatchNorm layers by name, and those that are left alone.

    Layers that the model itself keeps frozen (FrozenBatchNorm, or in eval mode while the model is in train mode) are
    left alone unless globs select them. Layers that globs leave out are not mentioned.

    Args:
        model: the live model.
        globs: on layer names; none for all.
        prefix: what wrappers put before all names; globs and skips go without.

    Raises:
        UsageError: a glob selects no layer.
        UserCodeError: the model's own train() raised.
    """
    found = find_batchnorm_modules(model)
    check_globs(globs, [name.removeprefix(prefix) for name in found])
    frozen = _find_frozen(model)
    chosen: dict[str, torch.nn.Module] = {}
    skips = []
    for name, module in found.items():
        shown = name.removeprefix(prefix)
        if not selects(globs, shown):
            continue
        if is_uninitialized(module):
            skips.append(Skip(shown, SkipReason.NOT_INITIALISED, "a lazy layer that has not seen a batch"))
        elif not has_statistics(module) and normalises_by_statistics(module):
            skips.append(Skip(shown, SkipReason.COMPUTED_WEIGHT, "its statistics are computed by a parametrization"))
        elif not has_statistics(module):
            skips.append(Skip(shown, SkipReason.NO_STATISTICS, "track_running_stats is off"))
        elif id(module) in frozen and not globs:
            skips.append(Skip(shown, SkipReason.FROZEN, f"{frozen[id(module)]}; --layers selects it all the same"))
        else:
            chosen[name] = module
    skips += [
        Skip(name.removeprefix(prefix), SkipReason.NOT_RECOGNISED, "it is part of a TorchScript program")
        for name in find_scripted(model)
        if selects(globs, name.removeprefix(prefix))
    ]
    return chosen, [*skips, *skip_unread_statistics(model, globs, prefix=prefix)]


def _find_frozen(model: torch.nn.Module) -> dict[int, str]:
    """Explain why layers count as frozen, by id of their module."""
    layers = find_batchnorm_modules(model).values()
    frozen = {id(layer): "its class never updates statistics" for layer in layers if is_frozen_class(layer)}
    was_training = _unwrap(model).training
    with borrow(model):
        if was_training:
            frozen |= {id(layer): "it is in eval mode while the model trains" for layer in layers if not layer.training}
        # models with norm_eval or frozen stages say so in a train() of their own
        with running_user_code("train() of the model"):
            model.train()
        kept = {id(layer): "the model's train() keeps it in eval mode" for layer in layers if not layer.training}
    return {**kept, **frozen}


def find_layers_of_train_mode(
    model: torch.nn.Module, names: Collection[str], batches: Sequence[Batch]
) -> frozenset[str]:
    """Find the layers that a batch comes through where the whole model is in train mode, by its own ``train()``.

    Args:
        model: is as it was afterwards.
        names: the layers to look for, by their names in the live model.
        batches: the first is run; without one nothing is found, nor where the model raises.
    """
    found: set[str] = set()
    # in a job of several processes a forward in train mode may wait for the others
    if not batches or find_ranks().world > 1:
        return frozenset()
    with contextlib.suppress(BntoolError), borrow(model) as borrowed, torch.no_grad():
        for name, module in walk_modules(model):
            if name in names:
                borrowed.add_forward_pre_hook(module, partial(_note, found, name))
        with running_user_code("running the model in train mode"):
            model.train()
            copy_batch(batches[0]).run(model)
    return frozenset(found)


def _note(found: set[str], name: str, _module: torch.nn.Module, _args: object) -> None:
    found.add(name)


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside of wrappers of any class: whatever has one module, and no tensor beside it.

    That a whole model is in eval mode inside of a wrapper that is not, as timm's ModelEmaV3 has it, freezes no layer.
    """
    inner = unwrap(model)
    children = [child for child in inner._modules.values() if child is not None]
    if len(children) != 1 or inner._parameters or inner._buffers or is_batchnorm(children[0]):
        return inner
    return _unwrap(children[0])


def check_can_be_set(model: torch.nn.Module, layers: Mapping[str, torch.nn.Module]) -> None:
    """Refuse layers whose statistics cannot be set while the model runs, and models without weights.

    Raises:
        RefusedError
    """
    for name, module in walk_modules(model):
        if is_uninitialized(module) and not is_batchnorm(module):
            raise RefusedError("this lazy layer has no weights yet: run the model once", tensor=name)
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for tensor in (layer._buffers[role] for role in STATISTICS):
            assert tensor is not None
            if tensor.is_meta:
                raise RefusedError("the model is on the meta device, which computes nothing", tensor=name)
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise RefusedError(
                    "its statistics were made in inference mode and can be set only in it: call this inside of "
                    "torch.inference_mode()",
                    tensor=name,
                )
            if tensor.numel() > 1 and 0 in tensor.stride():
                raise RefusedError("its statistics are one number for all channels", tensor=name)
            if owners.setdefault(id(tensor), name) != name:
                raise RefusedError(f"it shares its statistics with {owners[id(tensor)]}", tensor=name)
