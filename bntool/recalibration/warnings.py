"""Warnings about a recalibration whose result is valid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bntool.recalibration.new_statistics import Recalibration
from bntool.recalibration.options import Precision
from bntool.representation import list_first

if TYPE_CHECKING:  # merging partials needs no torch
    from bntool.data.batches import Batches
    from bntool.recalibration.evaluation import Evaluation

_NAMED = 4  # layers that a warning names


def counts_other_classes(evaluation: Evaluation, batches: Batches) -> bool:
    """Return whether there are more or fewer class folders than outputs, so that labels cannot be trusted."""
    folders, outputs = batches.classes, evaluation.outputs
    return evaluation.value is not None and folders is not None and outputs not in (None, len(folders))


def warn_of_fewer(result: Recalibration, *, asked: int | None, there: int | None, cut: bool) -> Iterator[str]:
    """Warn where fewer samples were used than were asked for.

    Args:
        result: what was used.
        asked: samples that were asked for; None for all.
        there: samples of the data; None where nothing tells.
        cut: whether only as many as fit into memory were to be used.
    """
    if asked is not None and result.samples < asked:
        yield f"only {result.samples:,} of the {asked:,} samples asked for were there"
    used = result.samples + sum(left_out.samples for left_out in result.left_out)
    if cut and there is not None and used < there:
        yield f"only {used:,} of the {there:,} samples fit into memory"


def warn_of_lacking(lacking: Sequence[str], result: Recalibration) -> Iterator[str]:
    """Warn of statistics that the file does not hold: what stood in for them, and which it still lacks."""
    if not lacking:
        return
    count = f"{len(lacking):,} BatchNorm layer{'s' * (len(lacking) > 1)}"
    yield f"the file holds no statistics of {count}: before means those of a new layer, a mean of 0 and a variance of 1"
    left = [layer for layer in lacking if layer not in result.plan.layers]
    if left:
        yield f"the output does not hold those of {list_first(left, _NAMED)} either"


def warn_of_precision(precision: Precision, *, is_faster: bool) -> Iterator[str]:
    """Warn where the lower precision is no faster on this processor."""
    if precision is Precision.BFLOAT16 and not is_faster:
        yield "this processor has no bfloat16 instructions: float32 is faster"


def warn_of_judging(
    before: Evaluation, held_out: Batches, *, fair: bool, apart: bool, difference: str | None
) -> Iterator[str]:
    """Warn where accuracy was not measured as one may assume: on what data, with what labels.

    Args:
        before: the model with its old statistics.
        held_out: the data that it was measured on.
        fair: whether nothing hangs on it, or these are not the data of the statistics.
        apart: whether these are not the data of the statistics.
        difference: what tells that the model was given other data with its new statistics; None where nothing does.
    """
    if before.note is not None:
        yield f"not measured: {before.note}"
    if difference is not None:
        yield f"before and after do not compare: {difference}"
    if apart and before.left_out:
        count = sum(left_out.samples for left_out in before.left_out)
        yield f"{count} samples of the evaluation data were left out, first {before.left_out[0].reason}"
    if counts_other_classes(before, held_out):
        yield (
            f"{len(held_out.classes or ())} class folders, but the model has {before.outputs} outputs: folders are "
            f"numbered in sorted order, so {before.metric} says little"
        )
    if not fair:
        yield "better is judged on the calibration data itself; --eval-data gives a fairer judge"


def warn_of_platforms(platforms: Sequence[Mapping[str, Any]], *, what: str) -> Iterator[str]:
    """Warn of what was measured by different processors, numbers of threads or versions of torch.

    Args:
        platforms: of each part.
        what: what was measured, in words.
    """
    kinds = list(dict.fromkeys(", ".join(f"{name} {value}" for name, value in one.items()) for one in platforms))
    # one that was gone on with elsewhere names both
    if len(kinds) > 1 or any(" and " in kind for kind in kinds):
        shown = "; ".join(kinds[:_NAMED])
        yield f"{what} measured in different ways, so last bits may differ from one run's: {shown}"
