"""Warnings about a fold whose result is valid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.pickles.nodes import as_mapping, is_mapping
from bntool.folding.folds import Level
from bntool.folding.options import Layout
from bntool.folding.planning import FoldPlan
from bntool.folding.weight_ranges import WeightRange
from bntool.graphs.graph import Evidence
from bntool.representation import format_number


def warn_of_fold(
    checkpoint: Checkpoint,
    state_dict: StateDict,
    plan: FoldPlan,
    ranges: Sequence[WeightRange],
    *,
    evidence: Evidence | None,
) -> Iterator[str]:
    """Yield the warnings about a fold, one sentence each.

    Args:
        checkpoint: before the fold.
        state_dict: the one that was folded.
        plan: what was done.
        ranges: of the weights that took scales.
        evidence: how it is known who feeds whom; None where the outputs were compared.
    """
    if evidence is Evidence.DECLARED:
        yield "without --model the outputs could not be compared; the pairs were taken as declared"
    if evidence is Evidence.ASSUMED:
        yield "without --model the outputs could not be compared; forward and eps were assumed"
    folded = {f"{layer}.running_mean" for layer in plan.layers}
    for sibling in checkpoint.state_dicts:
        if sibling.key != state_dict.key and folded <= {sibling.strip(name) for name in sibling.tensors}:
            yield (
                f"{sibling.key or 'the root'} holds another copy of the model (EMA?), which was not folded; "
                f"fold it with --state-dict {sibling.key}"
            )
    if plan.layout is Layout.SAME_KEYS and find_optimizers(checkpoint):
        yield "the optimizer state was kept, but belongs to the weights before folding"
    if plan.padding:
        count = len(plan.padding)
        which = "1 convolution pads" if count == 1 else f"{count:,} convolutions pad"
        yield (
            f"{which} with other values than zeros (the first is {plan.padding[0]}): "
            "the folded model does not fit into the unmodified code"
        )
    if plan.below_zero:
        first, count = plan.below_zero[0], len(plan.below_zero)
        yield (
            f"running_var is negative in {count:,} folded layer{'s' * (count > 1)} (the first is {first}); "
            "with eps it is positive, and it was folded as every framework computes it"
        )
    yield from _warn_of_uneven(ranges, spread=any(fold.level is not Level.DIRECT for fold in plan.folds))
    yield from _warn_of_subnormal(ranges)


def find_optimizers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return entries at the top of a file that hold the state of an optimizer, or of several."""
    return tuple(
        name
        for name, value in checkpoint.entries.items()
        if any(map(_is_optimizer, value if isinstance(value, list) else [value]))
    )


def _is_optimizer(node: Any) -> bool:
    return is_mapping(node) and {"state", "param_groups"} <= as_mapping(node).keys()


def _warn_of_uneven(ranges: Sequence[WeightRange], *, spread: bool) -> Iterator[str]:
    uneven = [r for r in ranges if r.is_uneven]
    if uneven:
        worst = min(uneven, key=lambda r: r.after.evenness)
        largest = max(range(len(worst.after.magnitudes)), key=worst.after.magnitudes.__getitem__, default=0)
        yield (
            f"quantisation: in {len(uneven)} of {len(ranges)} weights the average channel now fills an eighth of the "
            f"tensor's range or less (worst: {worst.name}, {100 * worst.before.evenness:.0f} % before, "
            f"{format_number(100 * worst.after.evenness, 2)} % now, channel {largest} being the largest); quantise "
            "them per channel, not per tensor"
            f"{', or see what --direct-only leaves' if spread else ''}"
        )


def _warn_of_subnormal(ranges: Sequence[WeightRange]) -> Iterator[str]:
    flushed = sum(r.flushed for r in ranges)
    if flushed:
        yield (
            f"{flushed} weight elements would have become subnormal numbers, which slow many CPUs down; they were set "
            "to zero before the outputs were compared"
        )
    gained = sum(max(r.subnormal - r.subnormal_before, 0) for r in ranges)
    if gained:
        yield (
            f"{gained} weight elements became subnormal numbers, which slow many CPUs down; they were kept, because "
            "nothing proved that setting them to zero is harmless: call torch.set_flush_denormal(True) where the model "
            "runs"
        )
