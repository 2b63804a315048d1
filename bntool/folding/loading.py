"""Turning a model into the folded one that a file holds the state of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.errors import UsageError
from bntool.folding.deploy.live import take_deploy_form
from bntool.folding.options import Layout
from bntool.folding.structure import structure_of
from bntool.modules.application import change_structure
from bntool.modules.finding import check_is_model, find_name_prefix, walk_modules
from bntool.modules.loading import load_state
from bntool.plan import AddTensor, Operation, RemoveModule, Step, Values

Model = TypeVar("Model", bound=torch.nn.Module)


def load_folded(model: Model, path: str | os.PathLike[str], *, state_dict: str | None = None) -> Model:
    """Load a file that ``bntool fold`` wrote into an unmodified model, which becomes the folded one.

    What was done is read from the record that bntool left in the file; a format that has no place for one tells by its
    keys alone: BatchNorms that are missing, biases that are new. The keys are then loaded strictly.

    Args:
        model: the architecture as its code builds it; changed in place.
        path: the folded checkpoint.
        state_dict: which one, where the file holds several.

    Returns:
        The model itself.

    Raises:
        UsageError: the file holds no record of a fold, or the model lacks a layer that it names.
        FileError: the file cannot be read.
        RefusedError: the keys do not fit the model.
    """
    check_is_model(model, for_files="open_checkpoint")
    with open_checkpoint(path) as checkpoint, _undone_on_error(model):
        chosen = choose_state_dict(checkpoint, state_dict)
        if checkpoint.format.can_record(checkpoint, chosen):
            for record in _find_records(checkpoint, chosen):
                if record.get("layout") == Layout.DEPLOY.value:
                    take_deploy_form(model)
                else:
                    change_structure(model, structure_of(record))
        else:
            change_structure(model, compare_structure(model, chosen))
        load_state(model, chosen)
    return model


@contextlib.contextmanager
def _undone_on_error(model: torch.nn.Module) -> Iterator[None]:
    """Give the model its modules and parameters back if something is refused inside."""
    tables = [
        (table, dict(table))
        for _, module in walk_modules(model)
        for table in (module._modules, module._parameters, module._buffers)
    ]
    try:
        yield
    except BaseException:
        for table, before in tables:
            table.clear()
            table.update(before)  # type: ignore[arg-type]
        raise


def _find_records(checkpoint: Checkpoint, chosen: StateDict) -> list[Mapping[str, Any]]:
    records = [r for r in checkpoint.records.get(chosen.key, ()) if r.get("operation") == Operation.FOLD.value]
    if not records:
        raise UsageError(
            "the file holds no record of a fold; if its keys were changed by another tool, fold the original again",
            path=checkpoint.path,
        )
    return records


def compare_structure(model: torch.nn.Module, state_dict: StateDict) -> tuple[Step, ...]:
    """Return the steps that give a model the keys of a folded state dict, as far as folding explains them.

    Raises:
        UsageError: no BatchNorm of the model is missing from the state dict.
    """
    prefix = find_name_prefix(model, map(state_dict.strip, state_dict.tensors))
    wanted = {name.removeprefix(prefix) for name in model.state_dict(keep_vars=True)}
    given = {state_dict.strip(name): tensor for name, tensor in state_dict.tensors.items()}
    removed = [
        name.removesuffix(".running_mean") for name in wanted if name.endswith(".running_mean") and name not in given
    ]
    if not removed:
        raise UsageError("every BatchNorm of the model is in the file: it is not folded, or load_state_dict will do")
    added = [name for name in given if name.endswith(".bias") and name not in wanted]
    return (
        *(AddTensor(n, Values((), tuple(given[n].shape)), dtype=given[n].dtype.name, after="") for n in added),
        *(RemoveModule(name, copies=True) for name in removed),  # keys do not say which ones have to
    )
