"""Carrying out a plan on a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping

from bntool.checkpoints.checkpoint import Checkpoint, Edit, StateDict
from bntool.checkpoints.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.scaled_tensors import ScaledTensor
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, Tensor, count_elements
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
        checkpoint.with_state_dict(state_dict),
        entries=entries,
        records=records,
        edits=(*checkpoint.edits, *edits),
    )


def change_state_dict(original: StateDict, steps: Iterable[Step]) -> StateDict:
    """A state dict after the steps that concern its tensors; see :func:`apply_plan`."""
    tensors = dict(original.tensors)
    followers: dict[str, list[str]] = {}  # what was added right after a tensor, the latest first
    versions = original.versions
    for step in steps:
        if isinstance(step, SetTensor):
            name = _existing(original, tensors, step.name)
            tensors[name] = _new_elements(original, tensors[name], step)
        elif isinstance(step, AddTensor):
            name, after = original.prefix + step.name, _existing(original, tensors, step.after)
            if name in tensors:
                raise UsageError("the state dict has this tensor already", tensor=step.name)
            tensors[name] = _make(step.value, original, name=step.name, dtype=BY_NAME[step.dtype])
            followers.setdefault(after, []).insert(0, name)
        elif isinstance(step, RemoveTensor):
            del tensors[_existing(original, tensors, step.name)]
        elif isinstance(step, SetVersion) and versions is not None:
            versions = {**versions, (original.prefix + step.module).removesuffix("."): step.version}
    order: dict[str, None] = {}
    for name in original.tensors:
        _place(name, followers, order)
    ordered = {name: tensors[name] for name in order if name in tensors}
    return dataclasses.replace(original, tensors=ordered, versions=versions)


def _place(name: str, followers: Mapping[str, list[str]], order: dict[str, None]) -> None:
    order[name] = None
    for follower in followers.get(name, ()):
        _place(follower, followers, order)


def _in_file(step: Step, state_dict: StateDict) -> Step:
    """Module names of steps as the file spells them."""
    if not isinstance(step, SetAttribute | SetVersion):
        return step
    return dataclasses.replace(step, module=(state_dict.prefix + step.module).removesuffix("."))


def _existing(original: StateDict, tensors: Mapping[str, Tensor], name: str) -> str:
    """The name in the file of a tensor that is there by now."""
    full = name if original.prefix and name in tensors else original.prefix + name
    if full not in tensors:
        raise UsageError("the state dict has no such tensor", tensor=name)
    return full


def _new_elements(original: StateDict, old: Tensor, step: SetTensor) -> Tensor:
    if isinstance(old, StoredTensor) and old.wrapper:
        raise RefusedError(f"a {old.wrapper} tensor cannot be given new elements", tensor=step.name)
    dtype = old.dtype if step.dtype is None else BY_NAME[step.dtype]
    new = _make(step.value, original, name=step.name, dtype=dtype)
    if tuple(new.shape) != tuple(old.shape):
        raise UsageError(f"shape {list(new.shape)} does not fit {list(old.shape)}", tensor=step.name)
    return new


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
