"""Folding a state dict of a checkpoint: what is decided, recorded and, with a live model, proven."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.application import apply_plan, skip_not_understood
from bntool.checkpoints.checkpoint import Checkpoint, StateDict, check_changeable
from bntool.checkpoints.records import find_recorded_classes, find_recorded_eps, make_record
from bntool.errors import RefusedError, UsageError
from bntool.folding.deploy.named_blocks import assume_blocks
from bntool.folding.layouts import plan_layout
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.planning import FoldPlan
from bntool.folding.structure import describe_structure
from bntool.folding.warnings import find_optimizers, warn_of_fold
from bntool.folding.weight_ranges import (
    Removed,
    WeightRange,
    count_removed,
    measure_on_the_way,
    measure_ranges,
)
from bntool.graphs.architectures.recognition import Architecture
from bntool.graphs.declared import suggest_pairs
from bntool.graphs.graph import Evidence, ModelGraph, NodeKind
from bntool.graphs.sources import Knowledge, build_graph, trace_as_named
from bntool.plan import RemoveEntry, RemoveTensor, SetTensor
from bntool.progress import OnProgress, Progress, ignore
from bntool.representation import html_repr, repr_of_change

if TYPE_CHECKING:
    from torch import nn

    from bntool.folding.exporting import Program
    from bntool.folding.multiply_adds import Cost
    from bntool.folding.options import ProgramKind
    from bntool.folding.runtime_agreement import RuntimeAgreement
    from bntool.folding.speed import Speed
    from bntool.verification.outputs import Agreement


@dataclass(frozen=True)
class CheckpointFold:
    """A checkpoint that is folded and proven, ready to be saved.

    Attributes:
        source: the checkpoint before.
        state_dict: the one that is folded, before.
        plan: what is folded, and what is skipped and why.
        checkpoint: with its edits; None where nothing could be folded.
        evidence: how it is known who feeds whom.
        agreement: of the outputs; None without a model.
        dropped: entries that no longer fit.
        proven_ranges: where a model proved the fold, the ranges of what was proven.
        removed: how much smaller the state dict is.
        program: the folded model exported, where that was asked for.
        cost: of one forward in multiply-adds; None where the model was not traced.
        speed: beside the original, where that was asked for.
        runtime: what the format's own runtime said of the written file; None where it was not asked.
        architectures: what was recognised, where nothing else says what feeds what.
        output: the file that was written; None where nothing was.
        export: the program that was written.
    """

    source: Checkpoint
    state_dict: StateDict
    plan: FoldPlan
    checkpoint: Checkpoint | None
    evidence: Evidence
    agreement: Agreement | None = None
    dropped: tuple[str, ...] = ()
    proven_ranges: tuple[WeightRange, ...] | None = None
    removed: Removed = dataclasses.field(default_factory=lambda: Removed(parameters=0, buffers=0))
    program: Program | None = None
    cost: Cost | None = None
    speed: Speed | None = None
    runtime: RuntimeAgreement | None = None
    architectures: tuple[Architecture, ...] = ()
    output: str | None = None
    export: str | None = None

    def __repr__(self) -> str:
        known = "verified on the model" if self.agreement is not None else f"pairs are {self.evidence.value}"
        layers, left = len(self.plan.layers), len(self.plan.skips)
        output = self.output if self.output is not None else self.export
        return repr_of_change(self, self.source.path, changed=layers, left_alone=left, more=known, output=output)

    _repr_html_ = html_repr

    @cached_property
    def ranges(self) -> tuple[WeightRange, ...]:
        """Channels of each weight that was scaled: measured while the file was written, else read for it now."""
        if self.checkpoint is None:
            return ()
        if self.proven_ranges is not None:
            return self.proven_ranges
        return measure_ranges(self.state_dict, self.checkpoint.state_dict(self.state_dict.key), self.plan)

    def read_ranges(self) -> None:
        """Read now what has to be read for them, while the file is open."""
        _ = self.warnings

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user."""
        if self.checkpoint is None:
            return ()
        evidence = None if self.agreement is not None else self.evidence
        return tuple(warn_of_fold(self.source, self.state_dict, self.plan, self.ranges, evidence=evidence))


def fold_state_dict(  # noqa: PLR0913 as many as the command has options
    checkpoint: Checkpoint,
    state_dict: StateDict,
    options: FoldOptions = FoldOptions(),
    *,
    model: nn.Module | None = None,
    inputs: Sequence[Any] = (),
    pairs: Mapping[str, str] | None = None,
    architecture: str | None = None,
    tolerance: float,
    export: ProgramKind | None = None,
    benchmark: bool = False,
    on_progress: OnProgress = ignore,
) -> CheckpointFold:
    """Fold one state dict of a checkpoint.

    Args:
        options: which layers, and how.
        model: the live model with these tensors; given back as it was. It proves who feeds whom and that outputs stay.
        inputs: what to run it on; guessed if none are given.
        pairs: from the BatchNorm to its producer, declared instead of traced.
        architecture: whose forward is assumed where neither model nor pairs are given, e.g. ``timm:resnet50``; None
            for the one that names and shapes of the tensors are recognised as.
        tolerance: see :func:`~bntool.verification.outputs.verify`.
        export: export the folded model too, as this; needs ``model``.
        benchmark: measure how much faster the folded model is; needs ``model``.
        on_progress: called with what is being done.

    Raises:
        RefusedError: neither model nor pairs are given and no architecture is recognised, or several that differ; a
            pair contradicts shapes; the model changes tensors when it loads them; or the format is only inspected.
        UsageError, UserCodeError, VerificationError: as :func:`fold`.
    """
    check_changeable(checkpoint)
    if model is not None and not inputs:
        from bntool.graphs.traced.inputs import find_input

        inputs = [find_input(model)]
    first = inputs[0] if inputs else None
    if architecture is not None and (model is not None or pairs):
        raise UsageError("--arch says what to assume where neither --model nor --pair says what feeds what")
    known = Knowledge(
        state_dict,
        model=model,
        inputs=first,
        pairs=pairs,
        checkpoint=checkpoint,
        architecture=architecture,
        eps=options.eps,
    )
    graph = _find_graph(known, on_progress, layout=options.layout)
    plan = plan_layout(state_dict, graph, options, model=model)
    plan, others = _hold_for_others(plan, state_dict, graph, model=model, inputs=first)
    plan = skip_not_understood(plan, checkpoint, state_dict, layers=options.layers)
    if not plan.steps:
        nothing = CheckpointFold(checkpoint, state_dict, plan, None, graph.evidence)
        return dataclasses.replace(nothing, architectures=graph.architectures)
    dropped = () if options.layout is Layout.SAME_KEYS else find_optimizers(checkpoint)
    plan = dataclasses.replace(plan, steps=(*plan.steps, *(RemoveEntry((name,)) for name in dropped)))
    if checkpoint.format.can_record(checkpoint, state_dict):
        folds = [f.describe() for f in plan.folds]
        evidence: dict[str, Any] = {"evidence": graph.evidence.value, "verified": model is not None}
        if graph.architectures:
            evidence["architectures"] = [found.describe() for found in graph.architectures]
        record = make_record(
            plan, layout=options.layout.value, folds=folds, **evidence, **describe_structure(plan.steps)
        )
        plan = plan.with_record(record)  # type: ignore[assignment]
    agreement = program = cost = speed = ranges = None
    if model is None:
        edited = apply_plan(checkpoint, plan)
        measured = measure_on_the_way(edited.state_dict(state_dict.key), plan)
        edited = edited.with_state_dict(measured)
    else:
        from bntool.folding.live import prove, with_random_inputs
        from bntool.modules.loading import find_changed

        touched = {step.name for step in plan.steps if isinstance(step, SetTensor | RemoveTensor)}
        changed = find_changed(model, state_dict, touched)
        if changed is not None:
            raise RefusedError(
                "the model changes this tensor when it loads it, so that the file does not hold what runs; a state "
                "dict that is saved from the loaded model may",
                tensor=changed,
            )
        on_progress(Progress("comparing outputs"))
        proof = prove(model, plan, graph, state_dict, inputs=inputs, others=others, tolerance=tolerance)
        plan, ranges, agreement, cost = proof.plan, proof.ranges, proof.agreement, proof.cost
        edited = apply_plan(checkpoint, plan)
        if export is not None:
            from bntool.folding.exporting import export_program

            on_progress(Progress("exporting the folded model"))

            bound, tried = agreement.tolerance, with_random_inputs(inputs)
            program = export_program(model, proof.folded, tried, tolerance=bound, kind=export)
        if benchmark:
            from bntool.folding.speed import measure_speed

            on_progress(Progress("measuring speed"))

            speed = measure_speed(model, proof.folded, inputs[0])
    return CheckpointFold(
        checkpoint,
        state_dict,
        plan,
        edited,
        graph.evidence,
        agreement=agreement,
        dropped=dropped,
        proven_ranges=ranges,
        removed=count_removed(state_dict, edited.state_dict(state_dict.key)),
        program=program,
        cost=cost,
        speed=speed,
        architectures=graph.architectures,
    )


def _hold_for_others(
    plan: FoldPlan, state_dict: StateDict, graph: ModelGraph, *, model: nn.Module | None, inputs: Any
) -> tuple[FoldPlan, Sequence[Any]]:
    """Return the plan without what does not hold for inputs of another size and batch, and such inputs."""
    if model is None or not plan.steps:
        return plan, ()
    from bntool.folding.other_forwards.other_inputs import find_other_inputs, plan_alike

    others = find_other_inputs(model, inputs)
    if graph.evidence is Evidence.TRACED and plan.layout is not Layout.DEPLOY:
        trace_again = partial(trace_as_named, state_dict, model)
        plan = plan_alike(plan, state_dict, graph, model=model, others=others, trace_again=trace_again)
    return plan, others


def _find_graph(known: Knowledge, on_progress: OnProgress, *, layout: Layout) -> ModelGraph:
    """Find out who feeds whom, with every eps that is known.

    Raises:
        RefusedError: nothing tells.
    """
    if known.model is not None:
        on_progress(Progress("tracing the model"))
    graph = build_graph(known)
    if graph is None and layout is Layout.DEPLOY:
        graph = assume_blocks(known.state_dict)
    if graph is None:
        raise RefusedError(
            "the tensors are those of no known architecture, and a state dict does not say what feeds what: give the "
            "model with --model FILE.py:factory, which is traced and verified, or declare pairs with "
            f"--pair PRODUCER=BATCHNORM{_suggest(known.state_dict)}"
        )
    if known.model is not None and known.pairs:
        from bntool.folding.live import add_eps

        return add_eps(graph, known.model)
    if graph.evidence is Evidence.DECLARED and known.checkpoint is not None:
        return _add_recorded(graph, known.checkpoint.records.get(known.state_dict.key, ()))
    return graph


def _add_recorded(graph: ModelGraph, history: Sequence[Mapping[str, Any]]) -> ModelGraph:
    """Add the eps of records, since statistics that were folded, or made to fit another eps, are right with that one
    only; and the classes that BatchNorms had.
    """
    eps, classes = find_recorded_eps(history), find_recorded_classes(history)
    nodes = (
        dataclasses.replace(
            node,
            eps=eps.get(node.layer) if node.eps is None else node.eps,
            class_name=node.class_name or classes.get(node.layer, "").rpartition(".")[2],
        )
        if node.kind is NodeKind.BATCH_NORM
        else node
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _suggest(state_dict: StateDict) -> str:
    """Describe the pairs that names suggest, for the user to judge; names never pair anything."""
    likely = suggest_pairs(state_dict)
    if not likely:
        return ""
    batchnorm, producer = next(iter(likely.items()))
    count = "1 pair looks" if len(likely) == 1 else f"{len(likely)} pairs look"
    return f"; by name alone, which proves nothing, {count} likely, the first is --pair {producer}={batchnorm}"
