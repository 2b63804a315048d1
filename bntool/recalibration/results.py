"""The result of recalibrating a checkpoint file, and the record of it that goes into the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.records import make_record
from bntool.plan import Plan
from bntool.recalibration.new_statistics import Recalibration
from bntool.recalibration.options import Precision
from bntool.representation import html_repr, repr_of_change

if TYPE_CHECKING:  # merging partials needs no torch
    from bntool.recalibration.evaluation import Evaluation
    from bntool.recalibration.output_changes import OutputChanges


@dataclass(frozen=True)
class PreprocessingSteps:
    """The steps that images or pixels went through, in words.

    Attributes:
        steps: as ``--preprocess`` takes them.
        origin: who says that they are to be done.
    """

    steps: str
    origin: str


@dataclass(frozen=True)
class CheckpointRecalibration:
    """The result of recalibrating a checkpoint file.

    Attributes:
        checkpoint: with its new statistics.
        state_dict: the one that was recalibrated, before.
        recalibration: what was computed.
        before, after: the model on the evaluation data, with the old and the new statistics; None where partials were
            merged, for which no model runs.
        flipped: share of samples predicted as another class; None where outputs are not classes.
        output_changes: what the new statistics do to the outputs for a few samples; None where none could be run.
        evaluated_on: which data that was, in words; None for none.
        output: the file that was written; None for none.
        kept: the old statistics were as good: nothing was written for that reason.
        preprocessing: what was done to images and pixels; None for other data.
        lacking: layers whose statistics the file lacked; before stands for a mean of 0 and a variance of 1 there.
        promoted: names of tensors that are float32 in the output and were not in the input.
        warnings: what the reader should not miss.
    """

    checkpoint: Checkpoint
    state_dict: StateDict
    recalibration: Recalibration
    before: Evaluation | None
    after: Evaluation | None
    flipped: float | None
    output_changes: OutputChanges | None
    evaluated_on: str | None
    output: str | None
    kept: bool
    preprocessing: PreprocessingSteps | None = None
    promoted: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        metric = ""
        if self.before is not None and self.after is not None and None not in (self.before.value, self.after.value):
            metric = f"{self.before.metric} {self.before.value:.4g} -> {self.after.value:.4g}"
        plan = self.recalibration.plan
        return repr_of_change(
            self,
            self.checkpoint.path,
            changed=len(plan.layers),
            left_alone=len(plan.skips),
            more="kept the old statistics" if self.kept else metric,
            output=self.output,
        )

    _repr_html_ = html_repr


def with_record(
    plan: Plan,
    source: Checkpoint,
    state_dict: StateDict,
    result: Recalibration,
    *,
    data: str,
    seed: int,
    preprocessing: str | None,
) -> Plan:
    """Return the plan with a record of how the statistics were computed, where the file has a place for one.

    Args:
        data: the calibration data in words.
        seed: that they were shuffled by.
        preprocessing: what was done to images and pixels, in words; None for other data.
    """
    if not source.format.can_record(source, state_dict):
        return plan
    facts: dict[str, Any] = {"method": result.method.value, "prior": result.prior, "data": data, "seed": seed}
    if result.precision is not Precision.MODEL:
        facts["precision"] = result.precision.value
    if preprocessing is not None:
        facts["preprocessing"] = preprocessing
    return plan.with_record(make_record(plan, **facts, samples=result.samples, batches=result.batches))
