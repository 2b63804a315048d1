"""Findings from the number of updates of BatchNorm layers beside the number of steps of the optimizer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.origin import find_progress
from bntool.checkpoints.torch.optimizers import find_optimizers, read_steps
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import StateDictInspection
from bntool.inspection.thresholds import Thresholds

FEW_STEPS = 10  # below, a multiple is chance


def compare_with_steps(
    checkpoint: Checkpoint, inspections: Sequence[StateDictInspection], thresholds: Thresholds
) -> list[StateDictInspection]:
    """Return the state dicts, with what is found where the optimizer of the file, or the file itself, counted steps."""
    if not any(inspection.layers for inspection in inspections) or not checkpoint.format.is_pytorch:
        return list(inspections)
    steps = _read_steps(checkpoint)
    return [
        dataclasses.replace(inspection, findings=(*inspection.findings, *_compare(inspection, steps, thresholds)))
        if inspection.chosen and steps is not None and steps.number >= FEW_STEPS
        else inspection
        for inspection in inspections
    ]


class _Steps(NamedTuple):
    """The number of steps that were made.

    Attributes:
        words: a sentence on who counted them.
        by_optimizer: the optimizer did, so that fewer updates say something; steps of a file may be those of several.
    """

    number: int
    words: str
    by_optimizer: bool


def _read_steps(checkpoint: Checkpoint) -> _Steps | None:
    """Return the steps of the only optimizer of a file, or those that the file counts; None where optimizers are
    several.
    """
    counted = [read_steps(checkpoint, node) for _, node in find_optimizers(checkpoint)]
    if len(counted) > 1:
        return None
    if counted and counted[0] is not None:
        return _Steps(counted[0], f"the optimizer made {counted[0]} steps", by_optimizer=True)
    progress = find_progress(checkpoint.entries)
    word = next((word for word in ("step", "iteration") if word in progress), None)
    return (
        None if word is None else _Steps(progress[word], f"the file is of {word} {progress[word]}", by_optimizer=False)
    )


def _compare(inspection: StateDictInspection, made: _Steps, thresholds: Thresholds) -> list[Finding]:
    counts = Counter(n for layer in inspection.layers if (n := layer.num_batches_tracked) is not None)
    if not counts:
        return []
    usual, votes = counts.most_common(1)[0]
    if votes * 2 <= counts.total():
        return []
    layers = tuple(layer.name for layer in inspection.layers if layer.num_batches_tracked == usual)
    steps = made.number
    times = round(usual / steps)
    facts = {"num_batches_tracked": usual, "steps": steps}
    if 2 <= times <= thresholds.forwards_per_step and 0 <= usual - times * steps <= thresholds.steps_left_out * usual:
        forwards = "two forwards" if times == 2 else f"{times} forwards"
        message = (
            f"num_batches_tracked is {usual}, {made.words}: {forwards} for each. Gradient "
            "accumulation does so, and so do gradient checkpointing, which runs a forward twice and updates the "
            "statistics with the same batch twice, and a forward without no_grad in between"
        )
        advice = "with checkpointing, halve momentum's effect: momentum 1 - sqrt(1 - m) gives what m gave"
        if times != 2:
            advice = "nothing is to be done where gradients are accumulated"
        short = f"{times} per step"
        return [Finding(FindingCode.COUNTER_AGAINST_STEPS, Severity.NOTICE, short, message, facts, advice, (), layers)]
    if made.by_optimizer and usual < (1 - thresholds.steps_left_out) * steps and usual > 0:
        message = (
            f"num_batches_tracked is {usual}, fewer than the {steps} steps of the optimizer: the statistics did not "
            "move in all of them (eval mode, frozen), or were reset or recomputed"
        )
        advice = "if that was not meant, bntool recalibrate --dry-run measures how far they are off"
        return [
            Finding(
                FindingCode.COUNTER_AGAINST_STEPS, Severity.NOTICE, "few updates", message, facts, advice, (), layers
            )
        ]
    return []
