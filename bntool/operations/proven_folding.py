"""Folding a live model or a checkpoint, with the proof that its outputs stay."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bntool.checkpoints.application import apply_plan as apply_to_checkpoint
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.pickles.nodes import as_mapping, is_mapping
from bntool.errors import RefusedError, UserCodeError
from bntool.graphs.declared import suggest_pairs
from bntool.graphs.graph import Evidence, ModelGraph
from bntool.graphs.inputs import find_input
from bntool.graphs.sources import Knowledge, build_graph
from bntool.graphs.traced import trace
from bntool.layers.application import apply_plan, change_structure, read_state
from bntool.layers.folding import describe_structure
from bntool.layers.loading import load_state
from bntool.layers.modules import find_batchnorm_modules, find_wrapper_prefix
from bntool.operations.exporting import Program, ProgramKind, export_program
from bntool.operations.folding import FoldPlan, Layout, plan_fold
from bntool.operations.recording import make_record
from bntool.operations.verification import TOLERANCE, Agreement, verify
from bntool.operations.weight_ranges import Removed, WeightRange, count_removed, measure_ranges
from bntool.plan import RemoveEntry

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


@dataclass(frozen=True)
class CheckpointFold:
    """A checkpoint that is folded and proven, ready to be saved.

    Attributes:
        plan: what is folded, and what is skipped and why.
        checkpoint: with its edits; None where nothing could be folded.
        agreement: of the outputs; None without a model.
        dropped: entries that no longer fit.
        warnings: what the user should know.
        ranges: of the channels of each weight that was scaled.
        removed: how much smaller the state dict is.
        program: the folded model exported, where that was asked for.
    """

    plan: FoldPlan
    checkpoint: Checkpoint | None
    agreement: Agreement | None
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    ranges: tuple[WeightRange, ...] = ()
    removed: Removed = dataclasses.field(default_factory=lambda: Removed(parameters=0, buffers=0))
    program: Program | None = None


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


def fold_checkpoint(  # noqa: PLR0913 as many as the command has options
    checkpoint: Checkpoint,
    state_dict: StateDict,
    *,
    model: nn.Module | None = None,
    inputs: Sequence[Any] = (),
    pairs: Mapping[str, str] | None = None,
    layers: Sequence[str] = (),
    layout: Layout = Layout.FOLDED,
    eps: float | None = None,
    tolerance: float = TOLERANCE,
    export: ProgramKind | None = None,
) -> CheckpointFold:
    """Fold one state dict of a checkpoint.

    Args:
        model: the live model with these tensors; given back as it was. It proves who feeds whom and that outputs stay.
        inputs: what to run it on; guessed if none are given.
        pairs: from the BatchNorm to its producer, declared instead of traced.
        layers, layout, eps: see :func:`~bntool.operations.folding.plan_fold`.
        tolerance: see :func:`~bntool.operations.verification.verify`.
        export: export the folded model too, as this; needs ``model``.

    Raises:
        RefusedError: neither model nor pairs are given, or a pair contradicts shapes.
        UsageError, UserCodeError, VerificationError: as :func:`fold`.
    """
    if model is not None and not inputs:
        inputs = [find_input(model)]
    first = inputs[0] if inputs else None
    graph = build_graph(Knowledge(state_dict, model=model, inputs=first, pairs=pairs, checkpoint=checkpoint))
    if graph is None:
        raise RefusedError(
            "a state dict does not say what feeds what: give the model with --model FILE.py:factory, which is traced "
            f"and verified, or declare pairs with --pair PRODUCER=BATCHNORM{_suggest(state_dict)}"
        )
    if model is not None and pairs:
        graph = _with_eps(graph, model)
    plan = plan_fold(state_dict, graph, layers=layers, layout=layout, eps=eps)
    if not plan.steps:
        return CheckpointFold(plan, None, None, (), ())
    dropped = find_optimizers(checkpoint) if layout is Layout.FOLDED else ()
    plan = dataclasses.replace(plan, steps=(*plan.steps, *(RemoveEntry((name,)) for name in dropped)))
    if checkpoint.format.can_record(checkpoint, state_dict):
        folds = [f.describe() for f in plan.folds]
        evidence = {"evidence": graph.evidence.value, "verified": model is not None}
        record = make_record(plan, layout=layout.value, folds=folds, **evidence, **describe_structure(plan.steps))
        plan = plan.with_record(record)  # type: ignore[assignment]
    edited = apply_to_checkpoint(checkpoint, plan)
    agreement = program = None
    if model is not None:
        folded = _copy(model)
        change_structure(folded, plan.steps)
        load_state(
            folded, edited.state_dict(state_dict.key)
        )  # what will be in the file, so that this is what is judged
        change = _change(graph, layers=layers, layout=layout, eps=eps)
        tried = with_random_inputs(inputs)
        agreement = verify(model, change, folded, tried, tolerance=tolerance, unit=_spacing(state_dict))
        if export is not None:
            program = export_program(model, folded, tried, tolerance=agreement.tolerance, kind=export)
    new = edited.state_dict(state_dict.key)
    ranges = measure_ranges(state_dict, new, plan)
    warnings = (
        *_warn(checkpoint, state_dict, plan, verified=model is not None or graph.evidence is Evidence.STORED),
        *_warn_of_ranges(ranges),
    )
    removed = count_removed(state_dict, new)
    return CheckpointFold(plan, edited, agreement, dropped, warnings, ranges=ranges, removed=removed, program=program)


def _spacing(state_dict: StateDict) -> float:
    """The relative spacing of numbers in the coarsest dtype that a fold rounds to."""
    names = {tensor.dtype.name for tensor in state_dict.tensors.values() if tensor.dtype.is_floating}
    return max((torch.finfo(getattr(torch, name)).eps for name in names if hasattr(torch, name)), default=0.0)


def _suggest(state_dict: StateDict) -> str:
    """What names suggest, for the user to judge; they never pair anything."""
    likely = suggest_pairs(state_dict)
    if not likely:
        return ""
    batchnorm, producer = next(iter(likely.items()))
    count = "1 pair looks" if len(likely) == 1 else f"{len(likely)} pairs look"
    return f"; by name alone, which proves nothing, {count} likely, the first is --pair {producer}={batchnorm}"


def _with_eps(graph: ModelGraph, model: nn.Module) -> ModelGraph:
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


def find_optimizers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Entries at the top of a file that hold the state of an optimizer, or of several."""
    return tuple(
        name
        for name, value in checkpoint.entries.items()
        if any(map(_is_optimizer, value if isinstance(value, list) else [value]))
    )


def _is_optimizer(node: Any) -> bool:
    return is_mapping(node) and {"state", "param_groups"} <= as_mapping(node).keys()


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UserCodeError(f"the model cannot be copied: {' '.join(str(error).split())}") from error


def _warn(checkpoint: Checkpoint, state_dict: StateDict, plan: FoldPlan, *, verified: bool) -> list[str]:
    warnings = []
    if not verified:
        warnings.append("without --model the outputs could not be compared; the pairs were taken as declared")
    folded = {f"{layer}.running_mean" for layer in plan.layers}
    warnings += [
        f"{sibling.key or 'the root'} holds another copy of the model (EMA?), which was not folded; "
        f"fold it with --state-dict {sibling.key}"
        for sibling in checkpoint.state_dicts
        if sibling.key != state_dict.key and folded <= {sibling.strip(name) for name in sibling.tensors}
    ]
    if plan.layout is Layout.SAME_KEYS and find_optimizers(checkpoint):
        warnings.append("the optimizer state was kept, but belongs to the weights before folding")
    return warnings


def _warn_of_ranges(ranges: Sequence[WeightRange]) -> Iterator[str]:
    uneven = [r for r in ranges if r.is_uneven]
    if uneven:
        worst = min(uneven, key=lambda r: r.after.evenness)
        yield (
            f"quantisation: in {len(uneven)} of {len(ranges)} weights the average channel now fills an eighth of the "
            f"tensor's range or less (worst: {worst.name}, {100 * worst.before.evenness:.2g} % before, "
            f"{100 * worst.after.evenness:.2g} % now); quantise them per channel, not per tensor"
        )
    gained = sum(max(r.subnormal - r.subnormal_before, 0) for r in ranges)
    if gained:
        yield (
            f"{gained} weight elements became subnormal numbers, which slow many CPUs down; they were kept, because "
            "setting them to zero is not exact: call torch.set_flush_denormal(True) where the model runs"
        )
