"""Carrying out a plan on a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

from bntool.checkpoints.checkpoint import Checkpoint, Edit, StateDict
from bntool.checkpoints.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.tensors import LiteralTensor, ScaledTensor, StoredTensor, Tensor, count_elements
from bntool.errors import RefusedError, UsageError
from bntool.plan import (
    AddTensor,
    Plan,
    Recipe,
    Record,
    RemoveEntry,
    RemoveTensor,
    SetAttribute,
    SetTensor,
    SetVersion,
    Step,
    Values,
)


def apply_plan(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint as it is after the plan; nothing is read or written yet, and the argument stays as it is.

    Steps that concern only live modules (:class:`~bntool.plan.RemoveModule`) change nothing here.

    Raises:
        UsageError: the plan names a tensor that is not there, or adds one that is.
        RefusedError: an element is too large for the dtype of its tensor.
    """
    original = checkpoint.state_dict(plan.state_dict)
    records, entries = dict(checkpoint.records), checkpoint.entries
    state_dict = change_state_dict(original, plan.steps)
    for step in plan.steps:
        if isinstance(step, Record):
            payload = json.loads(json.dumps(step.payload))  # as it will be read back
            records[plan.state_dict] = (*records.get(plan.state_dict, ()), payload)
        elif isinstance(step, RemoveEntry):
            entries = {key: value for key, value in entries.items() if step.path != (key,)}
    edits = tuple(Edit(plan.state_dict, _in_file(step, state_dict)) for step in plan.steps)
    return dataclasses.replace(
        checkpoint,
        state_dicts=tuple(state_dict if s.key == plan.state_dict else s for s in checkpoint.state_dicts),
        entries=entries,
        records=records,
        edits=(*checkpoint.edits, *edits),
    )


def change_state_dict(original: StateDict, steps: Iterable[Step]) -> StateDict:
    """A state dict after the steps that concern its tensors; see :func:`apply_plan`."""
    state_dict = original
    for step in steps:
        if isinstance(step, SetTensor):
            state_dict = _set_tensor(original, state_dict, step)
        elif isinstance(step, AddTensor):
            state_dict = _add_tensor(original, state_dict, step)
        elif isinstance(step, RemoveTensor):
            name = _existing(state_dict, step.name)
            kept = {key: tensor for key, tensor in state_dict.tensors.items() if key != name}
            state_dict = dataclasses.replace(state_dict, tensors=kept)
        elif isinstance(step, SetVersion):
            state_dict = _set_version(state_dict, step)
    return state_dict


def _in_file(step: Step, state_dict: StateDict) -> Step:
    """Module names of steps as the file spells them."""
    if not isinstance(step, SetAttribute | SetVersion):
        return step
    return dataclasses.replace(step, module=(state_dict.prefix + step.module).removesuffix("."))


def _set_version(state_dict: StateDict, step: SetVersion) -> StateDict:
    if state_dict.versions is None:
        return state_dict
    path = (state_dict.prefix + step.module).removesuffix(".")
    return dataclasses.replace(state_dict, versions={**state_dict.versions, path: step.version})


def _existing(state_dict: StateDict, name: str) -> str:
    full = state_dict.full_name(name)
    if full not in state_dict.tensors:
        raise UsageError("the state dict has no such tensor", tensor=name)
    return full


def _set_tensor(original: StateDict, state_dict: StateDict, step: SetTensor) -> StateDict:
    name = _existing(state_dict, step.name)
    old = state_dict.tensors[name]
    if isinstance(old, StoredTensor) and old.wrapper:
        raise RefusedError(f"a {old.wrapper} tensor cannot be given new elements", tensor=step.name)
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
    if source.dtype is not dtype:
        raise UsageError(f"{source.dtype} elements cannot be scaled into {dtype}", tensor=name)
    wrapper = source.wrapper if isinstance(source, StoredTensor) else None
    if wrapper or dtype not in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16):
        raise RefusedError(f"a {wrapper or dtype} tensor cannot be scaled", tensor=recipe.source)
    if count_elements(recipe.view) != count_elements(source.shape):
        raise UsageError(f"view {list(recipe.view)} does not fit {list(source.shape)}", tensor=recipe.source)
    shape, factors = recipe.factor_shape, recipe.factors
    return ScaledTensor(source, view=recipe.view, factors=factors, factor_shape=shape, flush=recipe.flush)
