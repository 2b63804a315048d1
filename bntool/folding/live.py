"""Folding a live model, and the proof that the outputs of a folded one stay."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bntool.checkpoints.application import change_state_dict
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import find_coarsest_spacing
from bntool.choices import choose
from bntool.errors import RefusedError, UsageError, UserCodeError, VerificationError
from bntool.folding.layouts import apply_fold, plan_layout
from bntool.folding.multiply_adds import Cost, count_cost
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.other_forwards.other_inputs import find_other_inputs, plan_alike
from bntool.folding.other_forwards.own_fusing import find_unlike_fusing
from bntool.folding.other_forwards.switches import find_unlike_arguments, find_unlike_attributes
from bntool.folding.planning import FoldPlan
from bntool.folding.unchanged_outputs import find_points
from bntool.folding.weight_ranges import WeightRange, count_flushed, flush_subnormals, measure_ranges
from bntool.graphs.declared import as_pairs, declare
from bntool.graphs.graph import Evidence, ModelGraph
from bntool.graphs.traced.inputs import find_input
from bntool.graphs.traced.tracing import trace
from bntool.models.exported import check_has_layers
from bntool.modules.application import read_state
from bntool.modules.borrowing import borrow
from bntool.modules.calling import call
from bntool.modules.copying import copy_model
from bntool.modules.finding import (
    check_has_elements,
    check_is_model,
    describe_producers,
    find_batchnorm_modules,
    find_name_prefix,
    walk_modules,
)
from bntool.plan import assume
from bntool.representation import html_repr, short_repr
from bntool.verification.outputs import CHECK_WHAT_WAS_GIVEN, TOLERANCE, Agreement, verify

_RANDOM_INPUTS = 3
_CLASS_ASKED = (
    "the forward may look at the class of a BatchNorm, which a fold takes away (the layout same-keys, --layout "
    "same-keys, leaves it in its place), at which parameters there are, at a dtype, or at what was computed from "
    "weights as they were loaded"
)
_MORE_MERGED = (
    "the model's own code may merge more in its deploy form than parallel branches, e.g. a gate: fold with another "
    "layout"
)
_AS_WELL = 1.01  # times the error with subnormal weights, without them


@dataclass(frozen=True)
class FoldResult:
    """The result of :func:`fold`.

    Attributes:
        model: a folded copy.
        plan: what was folded, and what was skipped and why.
        report: how well the outputs agree, of the model and layer by layer; None where nothing was folded.
    """

    model: nn.Module
    plan: FoldPlan
    report: Agreement | None

    __repr__ = short_repr
    _repr_html_ = html_repr


def fold(  # noqa: PLR0913 as many as the command has options
    model: nn.Module,
    example_inputs: Any = None,
    *,
    layers: Sequence[str] = (),
    layout: Layout | str = Layout.FOLDED,
    pairs: Mapping[str, str] | Sequence[str] = (),
    eps: float | None = None,
    change_padding: bool = False,
    direct_only: bool = False,
    tolerance: float = TOLERANCE,
) -> FoldResult:
    """Fold every BatchNorm of a copy of a model whose fold is exact, and compare its outputs with the original's.

    Args:
        model: given back as it was.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; guessed if not given.
        layers: globs of BatchNorms to fold; none for all.
        layout: what becomes of the keys.
        pairs: what feeds which BatchNorm, declared instead of traced: ``["conv1=bn1"]`` as ``--pair`` takes it, or a
            mapping from the BatchNorm to its producer. The outputs are compared all the same.
        eps: of BatchNorms whose eps nothing tells.
        change_padding: convolutions may pad with other values than zeros where that lets BatchNorms fold. Their modules
            become bntool's (``plan.padding`` names them), with the values in a buffer: the state dict of such a copy
            does not fit into the unmodified code.
        direct_only: nothing but the convolution or linear right before a BatchNorm takes it, which leaves all other
            weights in their ranges.
        tolerance: see :func:`~bntool.verification.outputs.verify`.

    Raises:
        UsageError: no usual input runs, and none was given; or there is no such layout; or a pair or eps is none; or
            the padding may change, and the pairs or the layout do not let it.
        RefusedError: it is a compiled or exported program, has no weights yet, or reads attributes of a BatchNorm that
            is folded.
        UserCodeError: the model raised.
        VerificationError: the outputs disagree, or cannot prove anything.
    """
    layout = choose(Layout, layout, option="layout")
    if change_padding and pairs:
        raise UsageError("pairs do not say what pads with zeros: change_padding needs the model traced")
    check_is_model(model, for_files="fold_checkpoint")
    check_has_layers(model, "the model")
    check_has_elements(model)
    inputs = find_input(model) if example_inputs is None else example_inputs
    state = read_state(model)
    if pairs:
        declared = as_pairs(pairs)
        graph = add_eps(declare(state, declared, modules=describe_producers(model, declared.values())), model)
    else:
        graph = trace(model, inputs)
    options = FoldOptions(layers=layers, layout=layout, eps=eps, change_padding=change_padding, direct_only=direct_only)
    plan = plan_layout(state, graph, options, model=model)
    if not plan.steps:
        return FoldResult(copy_model(model), plan, None)
    others = find_other_inputs(model, inputs)
    if graph.evidence is Evidence.TRACED and layout is not Layout.DEPLOY:
        plan = plan_alike(plan, state, graph, model=model, others=others, trace_again=partial(trace, model))
        if not plan.steps:
            return FoldResult(copy_model(model), plan, None)
    proof = prove(model, plan, graph, state, inputs=[inputs], others=others, tolerance=tolerance)
    return FoldResult(proof.folded, proof.plan, proof.agreement)


@dataclass(frozen=True)
class Proof:
    """A fold that was held against the live model.

    Attributes:
        plan: what was proven; subnormal weights may be zero in it.
        ranges: of the weights that took scales.
        folded: a copy of the model after the plan.
        agreement: of the outputs of both.
        cost: of a forward in multiply-adds; None where not every layer is known.
    """

    plan: FoldPlan
    ranges: tuple[WeightRange, ...]
    folded: nn.Module
    agreement: Agreement
    cost: Cost | None


def prove(
    model: nn.Module,
    plan: FoldPlan,
    graph: ModelGraph,
    state_dict: StateDict,
    *,
    inputs: Sequence[Any],
    others: Sequence[Any] = (),
    tolerance: float,
) -> Proof:
    """Compare what is about to be written with the model, without subnormal weights if that is as good.

    Args:
        model: the original, with the tensors before the fold; given back as it was.
        plan: what is about to be done.
        graph: what it was planned with.
        state_dict: before the fold; what the plan makes of it is what is judged.
        inputs: what to run it on, besides random ones.
        others: see :func:`~bntool.folding.other_forwards.other_inputs.find_other_inputs`.
        tolerance: see :func:`~bntool.verification.outputs.verify`.

    Raises:
        UserCodeError, VerificationError: as :func:`fold`.
    """
    tried = [*with_random_inputs(inputs), *others]
    points, unit = find_points(graph, plan), find_coarsest_spacing(state_dict.tensors.values())
    change = _change(graph, plan)

    def attempt(plan: FoldPlan) -> tuple[nn.Module, Agreement]:
        folded = copy_model(model)
        apply_fold(folded, plan, state_dict)
        try:
            return folded, verify(
                model,
                change,
                folded,
                tried,
                tolerance=tolerance,
                unit=unit,
                points=points,
                transforms=plan.stored,
            )
        except UserCodeError as error:
            missed = _find_asked(error, folded, plan) or _find_missed(error, model, folded, tried[0], plan)
            raise missed or error from error
        except VerificationError as error:
            if plan.layout is Layout.DEPLOY and error.remedy == CHECK_WHAT_WAS_GIVEN:
                raise VerificationError(error.message, remedy=_MORE_MERGED) from error
            traced = graph.evidence is Evidence.TRACED and plan.layout is Layout.FOLDED
            if traced and error.remedy == CHECK_WHAT_WAS_GIVEN:
                raise VerificationError(error.message, remedy=_CLASS_ASKED) from error
            raise

    with borrow(model):  # hooks of a copy may write to what the original keeps
        folded, agreement = attempt(plan)
        ranges = measure_ranges(state_dict, change_state_dict(state_dict, plan.steps), plan)
        flushed = flush_subnormals(plan, ranges)
        if flushed is not plan:
            with contextlib.suppress(VerificationError):
                other, without = attempt(flushed)
                if without.rounded <= _AS_WELL * agreement.rounded:
                    plan, ranges, folded, agreement = flushed, count_flushed(ranges), other, without
        bound = max(tolerance, agreement.tolerance)
        names = [fold.layer for fold in plan.folds]
        unlike = (
            *find_unlike_arguments(model, folded, inputs[0], tolerance=bound),
            *find_unlike_attributes(model, folded, inputs[0], layers=names, tolerance=bound),
        )
        if plan.layout is not Layout.DEPLOY:  # which its own code has fused
            unlike = (*unlike, *find_unlike_fusing(model, folded, inputs[0], tolerance=bound))
        plan = assume(plan, *unlike) if unlike else plan
    gone = [fold.layer for fold in plan.folds if not fold.stays]
    cost = count_cost(model, inputs[0], graph, gone=gone) if graph.complete else None
    return Proof(plan, ranges, folded, agreement, cost)


def _find_asked(error: UserCodeError, folded: nn.Module, plan: FoldPlan) -> RefusedError | None:
    """Explain that a forward asks for an attribute of a BatchNorm that is gone, if that is what failed."""
    asked = error.__cause__
    if not isinstance(asked, AttributeError):
        return None
    modules = dict(walk_modules(folded))
    prefix = find_name_prefix(folded, [f"{fold.layer}." for fold in plan.folds])
    for fold in plan.folds:
        if asked.obj is not None and modules.get(prefix + fold.layer) is asked.obj:
            return RefusedError(
                f"the forward reads {asked.name} of this BatchNorm, which a fold takes away; the layout same-keys "
                "(--layout same-keys) leaves it in its place",
                tensor=fold.layer,
            )
    return None


def _find_missed(
    error: UserCodeError, model: nn.Module, folded: nn.Module, inputs: Any, plan: FoldPlan
) -> RefusedError | None:
    """Explain that a forward which ran before does not run after the fold, since it looks for what is gone."""
    if plan.layout is not Layout.FOLDED or not _runs(model, inputs) or _runs(folded, inputs):
        return None
    return RefusedError(
        f"the forward does not run without the BatchNorms that a fold takes away ({error}); the layout same-keys "
        "(--layout same-keys) leaves them in their places"
    )


def _runs(model: nn.Module, inputs: Any) -> bool:
    with borrow(model), torch.no_grad():
        model.eval()
        try:
            call(model, inputs)
        except UserCodeError:
            return False
    return True


def add_eps(graph: ModelGraph, model: nn.Module) -> ModelGraph:
    """Give declared BatchNorms the eps of the live modules of their names."""
    found = {
        name: module.eps for name, module in find_batchnorm_modules(model).items() if isinstance(module.eps, float)
    }
    prefix = find_name_prefix(model, [f"{node.layer}." for node in graph.nodes])
    nodes = (
        dataclasses.replace(node, eps=found.get(prefix + node.layer)) if node.eps is None else node
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _change(graph: ModelGraph, plan: FoldPlan) -> Any:
    """Fold any copy of the model in the same way."""

    def change(model: nn.Module) -> None:
        # of a copy: code that makes the deploy form of a model may scale weights where they are
        state = read_state(copy_model(model) if plan.layout is Layout.DEPLOY else model)
        apply_fold(model, plan_layout(state, graph, plan.options, model=model), state)

    return change


def with_random_inputs(inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs, and some random ones of the shape of the first if that is a floating tensor."""
    first = inputs[0]
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return list(inputs)
    generator = torch.Generator().manual_seed(20)
    spread = float(first.detach().float().std()) if first.numel() > 1 else 1.0
    random = [
        torch.randn(first.shape, generator=generator, dtype=torch.float32, device="cpu")
        .mul(spread or 1.0)
        .to(device=first.device, dtype=first.dtype)
        for _ in range(_RANDOM_INPUTS)
    ]
    return [*inputs, *random]
