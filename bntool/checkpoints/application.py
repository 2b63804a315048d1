"""Carrying out a plan on a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from bntool.batchnorm import selects
from bntool.checkpoints.checkpoint import Checkpoint, Edit, StateDict
from bntool.checkpoints.combined_tensors import AveragedTensor, MergedTensor
from bntool.checkpoints.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.renaming import rename_paths, rename_record, rename_versions
from bntool.checkpoints.scaled_tensors import scale
from bntool.checkpoints.state_dicts import find_not_understood, find_prefix
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, Tensor, count_elements
from bntool.errors import RefusedError, UsageError
from bntool.names import add_prefix, remove_prefix
from bntool.plan import (
    AddTensor,
    AnyPlan,
    Averaged,
    Merged,
    Plan,
    Recipe,
    Record,
    RemoveEntry,
    RemoveTensor,
    RenameTensor,
    SetAttribute,
    SetTensor,
    SetVersion,
    Skip,
    SkipReason,
    Step,
    Values,
)


def apply_plan(checkpoint: Checkpoint, plan: Plan, others: Sequence[StateDict] = ()) -> Checkpoint:
    """Return the checkpoint as it is after the plan; nothing is read or written yet, and the argument stays as it is.

    Steps that concern only live modules (:class:`~bntool.plan.RemoveModule`) change nothing here.

    Args:
        others: the state dicts that :class:`~bntool.plan.Averaged` takes in beside that of the plan; their files stay
            open until the checkpoint is written.

    Raises:
        UsageError: the plan names a tensor that is not there, or adds one that is.
        RefusedError: an element is too large for the dtype of its tensor.
    """
    original = checkpoint.state_dict(plan.state_dict)
    records, entries = dict(checkpoint.records), checkpoint.entries
    state_dict = change_state_dict(original, plan.steps, others)
    if state_dict.renamed != original.renamed and plan.state_dict in records:
        places = _find_places(original, state_dict)
        records[plan.state_dict] = tuple(rename_record(record, places) for record in records[plan.state_dict])
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


def _find_places(before: StateDict, after: StateDict) -> dict[str, str]:
    """Map the names of tensors and modules before to those after, without the prefixes of wrappers."""
    in_file = {now: old for old, now in before.renamed.items()}
    names = {name: after.renamed.get(in_file.get(name, name), name) for name in before.tensors}
    paths = {"": None}
    for name in names:
        path = name.rpartition(".")[0]
        while path and path not in paths:
            paths[path] = None
            path = path.rpartition(".")[0]
    moved = {old: new for old, new in rename_paths(paths, names, names).items() if new is not None}
    return {
        remove_prefix(old, before.prefix): remove_prefix(new, after.prefix) for old, new in {**moved, **names}.items()
    }


def change_state_dict(original: StateDict, steps: Iterable[Step], others: Sequence[StateDict] = ()) -> StateDict:
    """Return a state dict after the steps that concern its tensors; see :func:`apply_plan`.

    Tensors are renamed last: all other steps go by the names before.
    """
    steps = list(steps)
    tensors = dict(original.tensors)
    followers: dict[str, list[str]] = {}  # what was added right after a tensor, the latest first
    versions = original.versions
    renames = {step.name: step.new_name for step in steps if isinstance(step, RenameTensor)}
    for step in steps:
        if isinstance(step, SetTensor):
            name = _existing(original, tensors, step.name)
            tensors[name] = _new_elements([original, *others], tensors[name], step)
        elif isinstance(step, AddTensor):
            name, after = original.prefix + step.name, _existing(original, tensors, step.after)
            if name in tensors:
                raise UsageError("the state dict has this tensor already", tensor=step.name)
            tensors[name] = _make(step.value, [original, *others], name=step.name, dtype=BY_NAME[step.dtype])
            followers.setdefault(after, []).insert(0, name)
        elif isinstance(step, RemoveTensor):
            del tensors[_existing(original, tensors, step.name)]
        elif isinstance(step, SetVersion) and versions is not None:
            versions = {**versions, add_prefix(step.module, original.prefix): step.version}
    order: dict[str, None] = {}
    for name in original.tensors:
        _place(name, followers, order)
    ordered = {name: tensors[name] for name in order if name in tensors}
    changed = dataclasses.replace(original, tensors=ordered, versions=versions)
    return _rename(changed, renames) if renames else changed


def _rename(state_dict: StateDict, renames: Mapping[str, str]) -> StateDict:
    """Rename the tensors of a state dict, all at once; the common prefix and the versions of modules follow.

    Raises:
        UsageError: a tensor is not there, a name is empty, or two tensors would have the same.
    """
    for old, new in renames.items():
        if old not in state_dict.tensors:
            raise UsageError("the state dict has no such tensor", tensor=old)
        if not new or (new in state_dict.tensors and new not in renames):
            why = "another tensor has that name" if new else "that is no name"
            raise UsageError(f"it cannot be renamed to {new!r}: {why}", tensor=old)
    tensors = {renames.get(name, name): tensor for name, tensor in state_dict.tensors.items()}
    if len(tensors) < len(state_dict.tensors):
        raise UsageError("two tensors cannot have the same name")
    versions = state_dict.versions
    if versions is not None:
        versions = rename_versions(versions, renames, state_dict.tensors)
    in_file = {now: old for old, now in state_dict.renamed.items()}
    return dataclasses.replace(
        state_dict,
        tensors=tensors,
        prefix=find_prefix(list(tensors)),
        versions=versions,
        renamed={**state_dict.renamed, **{in_file.get(name, name): new for name, new in renames.items()}},
    )


def _place(name: str, followers: Mapping[str, list[str]], order: dict[str, None]) -> None:
    order[name] = None
    for follower in followers.get(name, ()):
        _place(follower, followers, order)


def _in_file(step: Step, state_dict: StateDict) -> Step:
    """Return a step with its module names as the file spells them."""
    if not isinstance(step, SetAttribute | SetVersion):
        return step
    return dataclasses.replace(step, module=add_prefix(step.module, state_dict.prefix))


def _existing(original: StateDict, tensors: Mapping[str, Tensor], name: str) -> str:
    """Return the name in the file of a tensor that is there by now."""
    full = name if original.prefix and name in tensors else original.prefix + name
    if full not in tensors:
        raise UsageError("the state dict has no such tensor", tensor=name)
    return full


def _new_elements(state_dicts: Sequence[StateDict], old: Tensor, step: SetTensor) -> Tensor:
    if isinstance(old, StoredTensor) and old.wrapper:
        raise RefusedError(f"a {old.wrapper} tensor cannot be given new elements", tensor=step.name)
    dtype = old.dtype if step.dtype is None else BY_NAME[step.dtype]
    new = _make(step.value, state_dicts, name=step.name, dtype=dtype)
    if tuple(new.shape) != tuple(old.shape):
        raise UsageError(f"shape {list(new.shape)} does not fit {list(old.shape)}", tensor=step.name)
    return new


def _make(recipe: Recipe, state_dicts: Sequence[StateDict], *, name: str, dtype: DType) -> Tensor:
    """Make the tensor that a recipe stands for.

    Args:
        state_dicts: that of the plan, and the others that it takes in.
    """
    if isinstance(recipe, Values):
        try:
            return LiteralTensor.from_numbers(recipe.numbers, dtype=dtype, shape=recipe.shape)
        except OverflowError as error:
            raise RefusedError(f"a new element is too large for {dtype}: {error}", tensor=name) from error
        except ValueError as error:
            raise RefusedError(str(error), tensor=name) from error
    if isinstance(recipe, Averaged):
        return AveragedTensor(tuple(one.tensor(name) for one in state_dicts), recipe.weights)
    if isinstance(recipe, Merged):
        return MergedTensor(
            tuple(state_dicts[0].tensor(source) for source in recipe.sources),
            recipe.factors,
            recipe.inputs,
            places=recipe.places,
            addends=recipe.addends,
        )
    source = state_dicts[0].tensor(recipe.source)
    if source.dtype is not dtype:
        raise UsageError(f"{source.dtype} elements cannot be scaled into {dtype}", tensor=name)
    wrapper = source.wrapper if isinstance(source, StoredTensor) else None
    if wrapper or dtype not in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16):
        raise RefusedError(f"a {wrapper or dtype} tensor cannot be scaled", tensor=recipe.source)
    if count_elements(recipe.view) != count_elements(source.shape):
        raise UsageError(f"view {list(recipe.view)} does not fit {list(source.shape)}", tensor=recipe.source)
    return scale(source, recipe)


def skip_not_understood(
    plan: AnyPlan, checkpoint: Checkpoint, state_dict: StateDict, *, layers: Sequence[str] = ()
) -> AnyPlan:
    """Return the plan with what was not understood among its skips, where the globs select it: nothing is done to
    it.
    """
    known = {*plan.layers, *(skip.layer for skip in plan.skips)}
    more = tuple(
        Skip(one.name, SkipReason.NOT_RECOGNISED, one.reason)
        for one in find_not_understood(checkpoint, state_dict)
        if one.name not in known and selects(layers, one.name)
    )
    return dataclasses.replace(plan, skips=(*plan.skips, *more))
