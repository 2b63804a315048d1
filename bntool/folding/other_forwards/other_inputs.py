"""Inputs of another size and batch: a forward may take another way with them, and a fold has to hold there, too.

A trace is proof for the forward that was seen. What is padded to a multiple of a window, or as TensorFlow pads, has no
zeros beyond its border at one size and has some at another; a path may be for batches of one alone. So what is planned
from the forward of one input is held against the plan from that of another, and what only one of them holds stays.
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
from bntool.graphs.traced.tracing import trace
from bntool.modules.borrowing import borrow
from bntool.modules.calling import call, tensors_in
from bntool.plan import Skip, SkipReason
from bntool.verification.outputs import find_outputs

# what is added to the axes behind the second: sizes that are no multiple of anything, or those of what needs one
_MORE = ((1, 3, 1), (32, 64, 32))


def find_other_inputs(model: nn.Module, inputs: Any) -> list[Any]:
    """Return an input of another batch, and of another size where the model takes one; made of the elements of what is
    given.

    Args:
        model: given back as it was.
        inputs: a tensor, or a tuple or dict of tensors with one batch axis; nothing is made of others.
    """
    with borrow(model), torch.no_grad():
        model.eval()
        for other in _vary(inputs):
            with contextlib.suppress(UserCodeError):
                outputs = list(find_outputs(call(model, other)))
                if all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
                    return [other]
    return []


def _vary(inputs: Any) -> Iterator[Any]:
    """Yield other inputs, those that tell most first."""
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    values = [inputs] if isinstance(inputs, Tensor) else values
    if not isinstance(values, list | tuple) or not isinstance(inputs, Tensor | tuple | Mapping):
        return
    tensors = [value for value in values if isinstance(value, Tensor)]
    alike = len({len(tensor) if tensor.ndim > 1 else -1 for tensor in tensors}) == 1 and tensors[0].ndim > 1
    nested = any(tensors_in(value) for value in values if not isinstance(value, Tensor))
    if not alike or nested or not tensors[0].numel():
        return
    same = len(tensors[0])
    batch = 1 if same > 1 else 2
    for more in _MORE if any(tensor.ndim > 2 for tensor in tensors) else ():
        for count in (batch, same):
            yield _map(inputs, partial(_resize, batch=count, more=dict(enumerate(more, start=2))))
    if any(tensor.ndim == 3 for tensor in tensors):  # tokens lie along the second axis
        yield _map(inputs, partial(_resize, batch=batch, more={1: 1}))
    yield _map(inputs, partial(_resize, batch=batch, more={}))


def _map(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    def change(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) else value

    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return tuple(map(change, inputs))


def _resize(tensor: Tensor, *, batch: int, more: Mapping[int, int]) -> Tensor:
    """Repeat elements from the beginning where there are too few; a matrix keeps its columns."""
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
) -> FoldPlan:
    """Return a plan without the folds that do not hold for other inputs.

    Args:
        plan: what the traced graph holds.
        model: given back as it was.
        others: see :func:`find_other_inputs`.
    """
    first, missed = plan, dict[str, Skip]()
    for inputs in others:
        with contextlib.suppress(BntoolError):  # of the model, or of what cannot be followed there
            other = trace(model, inputs)
            while plan.steps and not _is_same(graph, other):
                there = plan_layout(state_dict, other, plan.options, model=model)
                if there.steps == plan.steps:
                    break
                missed.update(_find_missed(plan, there, inputs))
                plan = _plan_fewer(plan, there, state_dict, graph, model=model)
    return plan if plan is first else _explain(first, plan, missed, graph)


def _is_same(graph: ModelGraph, other: ModelGraph) -> bool:
    """Return whether two graphs say the same of everything that decides a fold."""
    one, two = ([dataclasses.replace(node, elements=0) for node in each.nodes] for each in (graph, other))
    return one == two and graph.edges == other.edges and graph.branches_at == other.branches_at


def _find_missed(plan: FoldPlan, there: FoldPlan, inputs: Any) -> Iterator[tuple[str, Skip]]:
    """Yield the layers whose fold another plan does not hold, with why."""
    where = f"with {' and '.join('x'.join(map(str, tensor.shape)) for tensor in tensors_in(inputs))} as input"
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
            why = "it needs a fold that does not hold for inputs of another size or batch"
            skips.setdefault(fold.layer, Skip(fold.layer, SkipReason.DATA_DEPENDENT, why))
    order = [*graph.batchnorms, *skips]
    left = sorted((skip for layer, skip in skips.items() if layer not in folded), key=lambda s: order.index(s.layer))
    return dataclasses.replace(plan, skips=tuple(left))
