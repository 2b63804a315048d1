"""Inputs of another size and batch: a forward may take another way with them, and a fold has to hold there, too.

A trace is proof for the forward that was seen. What is padded to a multiple of a window, or as TensorFlow pads, has no
zeros beyond its border at one size and has some at another; a path may be for batches of one alone, for calls after the
first, or for those without gradients. So what is planned from the forward of one input is held against the plan from
that of another, which is as unlike it as the model takes, and what only one of them holds stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bntool.checkpoints.checkpoint import StateDict
from bntool.errors import BntoolError, UserCodeError
from bntool.folding.layouts import plan_layout
from bntool.folding.planning import FoldPlan
from bntool.graphs.graph import ModelGraph
from bntool.modules.borrowing import borrow
from bntool.modules.calling import SecondCall, call, map_tensors, tensors_in
from bntool.plan import Skip, SkipReason
from bntool.verification.outputs import find_outputs

# what is added to the axes behind the second: sizes that are no multiple of anything, or those of what needs one
_MORE = ((1, 3, 1), (32, 64, 32))


def find_other_inputs(model: nn.Module, inputs: Any) -> list[Any]:
    """Return inputs of another batch, and of another size where the model takes one; made of the elements of what is
    given.

    The first of them is for a call after one with what is given, while gradients are recorded, with channels last in
    memory where there are positions, as far as the model takes that. Where several tensors are given, one more has
    tensors of unequal sizes.

    Args:
        model: given back as it was.
        inputs: what the model is called with, as :func:`~bntool.modules.calling.pass_inputs` takes it.
    """
    with borrow(model) as borrowed, torch.no_grad():
        model.eval()

        def runs(other: Any) -> bool:
            with contextlib.suppress(UserCodeError):
                outputs = list(find_outputs(call(model, other)))
                borrowed.reset()
                return all(bool(torch.isfinite(tensor).all()) for tensor in outputs)
            borrowed.reset()
            return False

        found = [next(filter(runs, candidates), None) for candidates in (_vary(inputs), _vary_apart(inputs))]
        others = [other for other in found if other is not None] or [inputs]
        seconds = (map_tensors(_put_channels_last, others[0]), others[0])
        calls = (SecondCall((before, second)) for before in (inputs, others[0]) for second in seconds)
        first = next(filter(runs, calls), others[0])
        return [one for one in (first, *others[1:]) if one is not inputs]


def _put_channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.ndim > 2 else tensor


def _vary(inputs: Any) -> Iterator[Any]:
    """Yield other inputs, those that tell most first: all tensors with the same batch axis are changed alike."""
    tensors = tensors_in(inputs)
    leading = next((tensor for tensor in tensors if tensor.ndim > 1), None)
    if leading is None or not leading.numel():
        return
    same = len(leading)
    batch = 1 if same > 1 else 2
    mores = list(_MORE) if any(tensor.ndim > 2 for tensor in tensors) else []
    changes = [(count, dict(enumerate(more, start=2))) for more in mores for count in (batch, same)]
    if any(tensor.ndim == 3 for tensor in tensors):  # tokens lie along the second axis
        changes.append((batch, {1: 1}))
    changes.append((batch, {}))
    # a vector may have an element for each sample, or not
    for least in (1, 2) if any(tensor.ndim == 1 and len(tensor) == same for tensor in tensors) else (1,):
        for count, more in changes:
            resize = partial(_resize, same=same, batch=count, more=more, least=least)
            yield map_tensors(resize, inputs)


def _vary_apart(inputs: Any) -> Iterator[Any]:
    """Yield inputs whose tensors differ in size from each other, or of which lists have another length."""
    sized = [tensor for tensor in tensors_in(inputs) if tensor.ndim > 2 and tensor.numel()]
    recounted = _recount(inputs)
    given = [inputs] if recounted is None else [recounted, inputs]
    for other in given:
        if len(sized) > 1 or other is recounted:
            yield map_tensors(_grow_one_by_one(), other)
    if recounted is not None:
        yield recounted


def _grow_one_by_one() -> Callable[[Tensor], Tensor]:
    """Return a function that makes each image that it is given larger than the one before."""
    seen: list[int] = []

    def grow(tensor: Tensor) -> Tensor:
        if tensor.ndim < 3:
            return tensor
        seen.append(3)
        more = {tensor.ndim - 1: sum(seen), **({tensor.ndim - 2: sum(seen)} if tensor.ndim > 3 else {})}
        return _resize(tensor, same=len(tensor), batch=len(tensor), more=more)

    return grow


def _recount(inputs: Any) -> Any:
    """Return inputs whose lists and inner tuples of tensors have one tensor, or two where they have one; None where
    there are none.
    """
    changed: list[bool] = []

    def change(value: Any) -> Any:
        if type(value) in (list, tuple) and value and all(isinstance(one, Tensor) for one in value):
            changed.append(True)
            return type(value)(value[:1] if len(value) > 1 else [value[0], value[0]])
        return value

    if isinstance(inputs, Mapping):
        other: Any = {name: change(value) for name, value in inputs.items()}
    elif isinstance(inputs, tuple):
        other = tuple(map(change, inputs))
    else:
        other = change(inputs)
    return other if changed else None


def _resize(tensor: Tensor, *, same: int, batch: int, more: Mapping[int, int], least: int = 1) -> Tensor:
    """Repeat elements from the beginning where there are too few; a matrix keeps its columns.

    Args:
        same: the batch that there is; tensors with another one stay as they are.
        least: how many axes a tensor has to have.
    """
    if tensor.ndim < least or not tensor.numel() or len(tensor) != same:
        return tensor
    for axis in range(tensor.ndim):
        extent = batch if axis == 0 else tensor.shape[axis] + (more.get(axis, 0) if tensor.ndim > 2 else 0)
        if extent != tensor.shape[axis]:
            places = torch.arange(extent, device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, places)
    return tensor


def plan_alike(
    plan: FoldPlan,
    state_dict: StateDict,
    graph: ModelGraph,
    *,
    model: nn.Module,
    others: Sequence[Any],
    trace_again: Callable[[Any], ModelGraph],
) -> FoldPlan:
    """Return a plan without the folds that do not hold for other inputs.

    Args:
        plan: what the traced graph holds.
        model: given back as it was.
        others: see :func:`find_other_inputs`.
        trace_again: gives the graph for other inputs, with the names of the first one.
    """
    first, missed = plan, dict[str, Skip]()

    def narrow(plan: FoldPlan, other: ModelGraph, inputs: Any) -> tuple[FoldPlan, dict[str, Skip]]:
        left: dict[str, Skip] = {}
        while plan.steps and not _is_same(graph, other):
            there = plan_layout(state_dict, other, plan.options, model=model)
            if there.steps == plan.steps:
                break
            left.update(_find_missed(plan, there, inputs))
            plan = _plan_fewer(plan, there, state_dict, graph, model=model)
        return plan, left

    for inputs in others:
        with contextlib.suppress(BntoolError):  # of the model, or of what cannot be followed there
            other = _trace(inputs, trace_again)
            fewer, left = narrow(plan, other, inputs)
            if fewer is not plan and isinstance(
                inputs, SecondCall
            ):  # what a first call leaves, too, is said of the size
                with contextlib.suppress(BntoolError):
                    plain = map_tensors(Tensor.contiguous, inputs[1])
                    plan, of_size = narrow(plan, trace_again(plain), plain)
                    missed |= of_size
                fewer, left = narrow(plan, other, inputs)
            plan = fewer
            missed |= left
    return plan if plan is first else _explain(first, plan, missed, graph)


def _trace(inputs: Any, trace_again: Callable[[Any], ModelGraph]) -> ModelGraph:
    """Trace a model, by its first call where a second one cannot be followed."""
    try:
        return trace_again(inputs)
    except BntoolError:
        if not isinstance(inputs, SecondCall):
            raise
        return trace_again(inputs[1])


def _is_same(graph: ModelGraph, other: ModelGraph) -> bool:
    """Return whether two graphs say the same of everything that decides a fold."""
    one, two = ([dataclasses.replace(node, elements=0) for node in each.nodes] for each in (graph, other))
    return one == two and graph.edges == other.edges and graph.branches_at == other.branches_at


def _find_missed(plan: FoldPlan, there: FoldPlan, inputs: Any) -> Iterator[tuple[str, Skip]]:
    """Yield the layers whose fold another plan does not hold, with why."""
    tensors = tensors_in(inputs[1] if isinstance(inputs, SecondCall) else inputs)
    where = f"with {' and '.join('x'.join(map(str, tensor.shape)) for tensor in tensors)} as input"
    if isinstance(inputs, SecondCall):
        is_dense = all(tensor.is_contiguous() for tensor in tensors)
        where += f"{'' if is_dense else ' (channels last)'} of a second call that records gradients"
    skips = {skip.layer: skip for skip in there.skips}
    for fold in plan.folds:
        if fold in there.folds:
            continue
        skip = skips.get(fold.layer)
        if skip is None:
            yield fold.layer, Skip(fold.layer, SkipReason.DATA_DEPENDENT, f"{where} other layers would take it")
        else:
            yield fold.layer, dataclasses.replace(skip, detail=f"{where}: {skip.detail}")


def _plan_fewer(
    plan: FoldPlan, there: FoldPlan, state_dict: StateDict, graph: ModelGraph, *, model: nn.Module
) -> FoldPlan:
    """Plan the folds that both hold; where they hold the same ones with other numbers, direct ones alone, and then
    none.
    """
    kept = tuple(fold.layer for fold in plan.folds if fold in there.folds)
    options = dataclasses.replace(plan.options, layers=kept)
    if len(kept) == len(plan.folds):
        options = dataclasses.replace(plan.options, direct_only=True, change_padding=False)
        kept = () if plan.options.direct_only else kept
    if kept:
        return plan_layout(state_dict, graph, options, model=model)
    return FoldPlan(operation=plan.operation, state_dict=plan.state_dict, steps=(), skips=(), options=options)


def _explain(first: FoldPlan, plan: FoldPlan, missed: Mapping[str, Skip], graph: ModelGraph) -> FoldPlan:
    """Give each layer that stays now its reason, and the others those that they had."""
    skips = {skip.layer: skip for skip in first.skips} | dict(missed)
    folded = set(plan.layers)
    for fold in first.folds:
        if fold.layer not in folded:
            why = "it needs a fold that does not hold for inputs of another size or batch, or for another call"
            skips.setdefault(fold.layer, Skip(fold.layer, SkipReason.DATA_DEPENDENT, why))
    order = [*graph.batchnorms, *skips]
    left = sorted((skip for layer, skip in skips.items() if layer not in folded), key=lambda s: order.index(s.layer))
    return dataclasses.replace(plan, skips=tuple(left))
