"""Carrying out a plan on a checkpoint."""

from __future__ import annotations

import dataclasses

from bntool.checkpoints.checkpoint import Checkpoint, Edit, StateDict
from bntool.checkpoints.dtypes import BY_NAME, DType
from bntool.checkpoints.tensors import LiteralTensor, ScaledTensor, StoredTensor, Tensor
from bntool.errors import RefusedError, UsageError
from bntool.plan import AddTensor, Plan, Recipe, Record, RemoveTensor, SetAttribute, SetTensor, Step, Values


def apply_plan(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint as it is after the plan; nothing is read or written yet, and the argument stays as it is.

    Steps that concern only live modules (:class:`~bntool.plan.RemoveModule`) change nothing here.

    Raises:
        UsageError: the plan names a tensor that is not there, or adds one that is.
        RefusedError: an element is too large for the dtype of its tensor.
    """
    original = checkpoint.state_dict(plan.state_dict)
    state_dict, records = original, dict(checkpoint.records)
    for step in plan.steps:
        if isinstance(step, SetTensor):
            state_dict = _set_tensor(original, state_dict, step)
        elif isinstance(step, AddTensor):
            state_dict = _add_tensor(original, state_dict, step)
        elif isinstance(step, RemoveTensor):
            name = _existing(state_dict, step.name)
            kept = {key: tensor for key, tensor in state_dict.tensors.items() if key != name}
            state_dict = dataclasses.replace(state_dict, tensors=kept)
        elif isinstance(step, Record):
            records[plan.state_dict] = (*records.get(plan.state_dict, ()), step.payload)
    edits = tuple(Edit(plan.state_dict, _in_file(step, state_dict)) for step in plan.steps)
    return dataclasses.replace(
        checkpoint,
        state_dicts=tuple(state_dict if s.key == plan.state_dict else s for s in checkpoint.state_dicts),
        records=records,
        edits=(*checkpoint.edits, *edits),
    )


def _in_file(step: Step, state_dict: StateDict) -> Step:
    """Module names of steps as the file spells them."""
    return dataclasses.replace(step, module=state_dict.prefix + step.module) if isinstance(step, SetAttribute) else step


def _existing(state_dict: StateDict, name: str) -> str:
    full = state_dict.full_name(name)
    if full not in state_dict.tensors:
        raise UsageError("the state dict has no such tensor", tensor=name)
    return full


def _set_tensor(original: StateDict, state_dict: StateDict, step: SetTensor) -> StateDict:
    name = _existing(state_dict, step.name)
    old = state_dict.tensors[name]
    new = _make(step.value, original, name=step.name, dtype=old.dtype)
    if tuple(new.shape) != tuple(old.shape):
        raise UsageError(f"shape {list(new.shape)} does not fit {list(old.shape)}", tensor=step.name)
    return dataclasses.replace(state_dict, tensors={**state_dict.tensors, name: new})


def _add_tensor(original: StateDict, state_dict: StateDict, step: AddTensor) -> StateDict:
    name, after = state_dict.prefix + step.name, _existing(state_dict, step.after)
    if name in state_dict.tensors:
        raise UsageError("the state dict has this tensor already", tensor=step.name)
    new = _make(step.value, original, name=step.name, dtype=BY_NAME[step.dtype])
    tensors: dict[str, Tensor] = {}
    for key, tensor in state_dict.tensors.items():
        tensors[key] = tensor
        if key == after:
            tensors[name] = new
    return dataclasses.replace(state_dict, tensors=tensors)


def _make(recipe: Recipe, state_dict: StateDict, *, name: str, dtype: DType) -> Tensor:
    if isinstance(recipe, Values):
        try:
            return LiteralTensor.from_numbers(recipe.numbers, dtype=dtype, shape=recipe.shape)
        except OverflowError as error:
            raise RefusedError(f"a new element is too large for {dtype}: {error}", tensor=name) from error
        except ValueError as error:
            raise RefusedError(str(error), tensor=name) from error
    source = state_dict.tensor(recipe.source)
    if isinstance(source, StoredTensor) and (source.wrapper or not source.dtype.is_floating):
        raise RefusedError(f"a {source.wrapper or source.dtype} tensor cannot be scaled", tensor=recipe.source)
    return ScaledTensor(source, view=recipe.view, factors=recipe.factors, factor_shape=recipe.factor_shape)

