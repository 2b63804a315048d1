"""Folding a live model, and the proof that the outputs of a folded one stay."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bntool.checkpoints.checkpoint import StateDict
from bntool.errors import UserCodeError
from bntool.graphs.graph import ModelGraph
from bntool.graphs.inputs import find_input
from bntool.graphs.traced import trace
from bntool.layers.application import apply_plan, change_structure, read_state
from bntool.layers.loading import load_state
from bntool.layers.modules import find_batchnorm_modules, find_wrapper_prefix
from bntool.operations.exporting import Program, ProgramKind, export_program
from bntool.operations.folding import FoldPlan, Layout, plan_fold
from bntool.operations.verification import TOLERANCE, Agreement, verify

_RANDOM_INPUTS = 3


@dataclass(frozen=True)
class FoldResult:
    """What :func:`fold` gives.

    Attributes:
        model: a folded copy.
        plan: what was folded, and what was skipped and why.
        report: how well the outputs agree; None where nothing was folded.
    """

    model: nn.Module
    plan: FoldPlan
    report: Agreement | None


def fold(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    layers: Sequence[str] = (),
    layout: Layout = Layout.FOLDED,
    tolerance: float = TOLERANCE,
) -> FoldResult:
    """A copy of a model with every BatchNorm folded whose fold is exact, its outputs held against the original's.

    Args:
        model: given back as it was.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; guessed if not given.
        layers: globs of BatchNorms to fold; none for all.
        layout: what becomes of the keys.
        tolerance: see :func:`~bntool.operations.verification.verify`.

    Raises:
        UsageError: no usual input runs, and none was given.
        UserCodeError: the model raised.
        VerificationError: the outputs disagree, or cannot prove anything.
    """
    inputs = find_input(model) if example_inputs is None else example_inputs
    graph = trace(model, inputs)
    plan = plan_fold(read_state(model), graph, layers=layers, layout=layout)
    folded = _copy(model)
    if not plan.steps:
        return FoldResult(folded, plan, None)
    apply_plan(folded, plan)
    change = _change(graph, layers=layers, layout=layout, eps=None)
    agreement = verify(model, change, folded, with_random_inputs([inputs]), tolerance=tolerance)
    return FoldResult(folded, plan, agreement)


def prove(  # noqa: PLR0913 all that a fold is made of
    model: nn.Module,
    plan: FoldPlan,
    graph: ModelGraph,
    state_dict: StateDict,
    *,
    inputs: Sequence[Any],
    layers: Sequence[str],
    eps: float | None,
    tolerance: float,
    export: ProgramKind | None,
) -> tuple[Agreement, Program | None]:
    """Hold what is about to be written against the model, and export it where that is asked for.

    Args:
        model: the original, with the tensors before the fold; given back as it was.
        plan, graph, layers, eps: what the fold was planned with.
        state_dict: what will be in the file, so that this is what is judged.
        inputs: what to run it on, besides random ones.
        tolerance: see :func:`~bntool.operations.verification.verify`.

    Raises:
        UserCodeError, VerificationError: as :func:`fold`.
    """
    folded = _copy(model)
    change_structure(folded, plan.steps)
    load_state(folded, state_dict)
    change = _change(graph, layers=layers, layout=plan.layout, eps=eps)
    tried = with_random_inputs(inputs)
    agreement = verify(model, change, folded, tried, tolerance=tolerance, unit=_spacing(state_dict))
    program = None
    if export is not None:
        program = export_program(model, folded, tried, tolerance=agreement.tolerance, kind=export)
    return agreement, program


def _spacing(state_dict: StateDict) -> float:
    """The relative spacing of numbers in the coarsest dtype that a fold rounds to."""
    names = {tensor.dtype.name for tensor in state_dict.tensors.values() if tensor.dtype.is_floating}
    return max((torch.finfo(getattr(torch, name)).eps for name in names if hasattr(torch, name)), default=0.0)


def add_eps(graph: ModelGraph, model: nn.Module) -> ModelGraph:
    """Declared BatchNorms with the eps of the live modules of their names."""
    found = {
        name: module.eps for name, module in find_batchnorm_modules(model).items() if isinstance(module.eps, float)
    }
    prefix = find_wrapper_prefix(model)
    nodes = (
        dataclasses.replace(node, eps=found.get(prefix + node.layer)) if node.eps is None else node
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _change(graph: ModelGraph, *, layers: Sequence[str], layout: Layout, eps: float | None) -> Any:
    """The same fold, for any copy of the model."""

    def change(model: nn.Module) -> None:
        apply_plan(model, plan_fold(read_state(model), graph, layers=layers, layout=layout, eps=eps))

    return change


def with_random_inputs(inputs: Sequence[Any]) -> list[Any]:
    """The inputs, and some random ones of the shape of the first if that is a floating tensor."""
    first = inputs[0]
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return list(inputs)
    generator = torch.Generator().manual_seed(20)
    spread = float(first.detach().float().std()) if first.numel() > 1 else 1.0
    random = [
        torch.randn(first.shape, generator=generator).mul(spread or 1.0).to(device=first.device, dtype=first.dtype)
        for _ in range(_RANDOM_INPUTS)
    ]
    return [*inputs, *random]


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UserCodeError(f"the model cannot be copied: {' '.join(str(error).split())}") from error
