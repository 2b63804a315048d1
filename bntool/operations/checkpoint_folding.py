"""Folding a checkpoint: what is decided, recorded and, with a live model, proven. Imports no torch itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.checkpoint import Checkpoint, StateDict, check_changeable
from bntool.checkpoints.pickles.nodes import as_mapping, is_mapping
from bntool.errors import RefusedError
from bntool.graphs.declared import suggest_pairs
from bntool.graphs.graph import Evidence
from bntool.graphs.sources import Knowledge, build_graph
from bntool.layers.structure import describe_structure
from bntool.operations.folding import FoldPlan, Layout, plan_fold
from bntool.operations.recording import make_record
from bntool.operations.weight_ranges import Removed, WeightRange, count_removed, measure_ranges
from bntool.plan import RemoveEntry

if TYPE_CHECKING:
    from torch import nn

    from bntool.operations.exporting import Program, ProgramKind
    from bntool.operations.verification import Agreement


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
    tolerance: float,
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
        RefusedError: neither model nor pairs are given, a pair contradicts shapes, or the format is only inspected.
        UsageError, UserCodeError, VerificationError: as :func:`fold`.
    """
    check_changeable(checkpoint)
    if model is not None and not inputs:
        from bntool.graphs.inputs import find_input

        inputs = [find_input(model)]
    first = inputs[0] if inputs else None
    graph = build_graph(Knowledge(state_dict, model=model, inputs=first, pairs=pairs, checkpoint=checkpoint))
    if graph is None:
        raise RefusedError(
            "a state dict does not say what feeds what: give the model with --model FILE.py:factory, which is traced "
            f"and verified, or declare pairs with --pair PRODUCER=BATCHNORM{_suggest(state_dict)}"
        )
    if model is not None and pairs:
        from bntool.operations.proven_folding import add_eps

        graph = add_eps(graph, model)
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
    edited = apply_plan(checkpoint, plan)
    new = edited.state_dict(state_dict.key)
    agreement = program = None
    if model is not None:
        from bntool.operations.proven_folding import prove

        agreement, program = prove(
            model, plan, graph, new, inputs=inputs, layers=layers, eps=eps, tolerance=tolerance, export=export
        )
    ranges = measure_ranges(state_dict, new, plan)
    warnings = (
        *_warn(checkpoint, state_dict, plan, verified=model is not None or graph.evidence is Evidence.STORED),
        *_warn_of_ranges(ranges),
    )
    removed = count_removed(state_dict, new)
    return CheckpointFold(plan, edited, agreement, dropped, warnings, ranges=ranges, removed=removed, program=program)


def _suggest(state_dict: StateDict) -> str:
    """What names suggest, for the user to judge; they never pair anything."""
    likely = suggest_pairs(state_dict)
    if not likely:
        return ""
    batchnorm, producer = next(iter(likely.items()))
    count = "1 pair looks" if len(likely) == 1 else f"{len(likely)} pairs look"
    return f"; by name alone, which proves nothing, {count} likely, the first is --pair {producer}={batchnorm}"


def find_optimizers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Entries at the top of a file that hold the state of an optimizer, or of several."""
    return tuple(
        name
        for name, value in checkpoint.entries.items()
        if any(map(_is_optimizer, value if isinstance(value, list) else [value]))
    )


def _is_optimizer(node: Any) -> bool:
    return is_mapping(node) and {"state", "param_groups"} <= as_mapping(node).keys()


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
