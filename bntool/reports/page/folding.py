"""The page of what `fold` did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bntool.reports.blocks import Style
from bntool.reports.folding import show_fold
from bntool.reports.page.cells import draw_item, number_item
from bntool.reports.page.document import Column, Item, Page, Row, Snippet, Table
from bntool.reports.page.from_blocks import leave_out_skips, read_blocks
from bntool.reports.page.skips import list_skips
from bntool.reports.page.strips import scale_sizes
from bntool.reports.text import plural
from bntool.representation import format_number
from bntool.shells import join_words

if TYPE_CHECKING:
    from bntool.folding.live import FoldResult
    from bntool.folding.planning import FoldPlan
    from bntool.folding.state_dict import CheckpointFold
    from bntool.folding.weight_ranges import WeightRange
    from bntool.verification.outputs import Agreement


def make_fold_page(path: str, result: CheckpointFold) -> Page:
    """Make the page of a file."""
    parts = read_blocks(show_fold(result))
    plan = result.plan
    total = len(plan.folds) + len(plan.skips)
    style = Style.WARNING if result.warnings else Style.NOTICE if plan.skips else Style.GOOD
    inspect = (Snippet("Look at the new file", (join_words(["bntool", "inspect", result.output or ""]),)),)
    return Page(
        command="fold",
        subject=path,
        style=style,
        verdict=f"{len(plan.folds)} of {plural(total, 'BatchNorm layer')} folded",
        details=tuple(one for one in leave_out_skips(parts.lines, plan) if one.style is not Style.HEADING),
        heading="Left alone",
        entries=list_skips(plan),
        tables=tuple(make_fold_tables(plan, result.agreement, result.ranges)),
        snippets=(*parts.snippets, *(inspect if result.output is not None else ())),
    )


def make_live_fold_page(result: FoldResult) -> Page:
    """Make the page of a live model."""
    plan, report = result.plan, result.report
    total = len(plan.folds) + len(plan.skips)
    proof = () if report is None else (f"outputs agree to {format_number(report.rounded, 2)} of the largest",)
    return Page(
        command="fold",
        subject=type(result.model).__name__,
        style=Style.NOTICE if plan.skips else Style.GOOD,
        verdict=f"{len(plan.folds)} of {plural(total, 'BatchNorm layer')} folded",
        details=tuple(Item(text, Style.GOOD) for text in proof),
        heading="Left alone",
        entries=list_skips(plan),
        tables=tuple(make_fold_tables(plan, report, ())),
    )


def make_fold_tables(plan: FoldPlan, agreement: Agreement | None, ranges: tuple[WeightRange, ...]) -> Iterator[Table]:
    """Make the tables: each BatchNorm with what takes it, and each weight before and after."""
    known = {} if agreement is None else {one.layer: one for one in agreement.layers}
    if plan.folds:
        columns = [Column("BatchNorm"), Column("into"), Column("how")]
        if known:
            columns += [
                Column("float64", "How far its output moved in float64, relative to the largest", is_number=True),
                Column("as stored", "The same in the dtype of the file", is_number=True),
            ]
        rows = []
        for fold in plan.folds:
            one = known.get(fold.layer)
            errors = [] if one is None else [one.exact, one.stored]
            items = [Item(fold.layer), Item(", ".join(fold.into)), Item(fold.how)]
            if known:
                items += [number_item(None if math.isnan(error) else error) for error in errors or (math.nan, math.nan)]
            rows.append(Row(tuple(items)))
        yield Table("Folds", "layers", tuple(columns), tuple(rows))
    if ranges:
        yield _make_range_table(ranges)


def _make_range_table(ranges: tuple[WeightRange, ...]) -> Table:
    sizes = scale_sizes(value for one in ranges for side in (one.before, one.after) for value in side.magnitudes)
    columns = (
        Column("weight"),
        Column("max|w|, before", "Largest magnitude of each output channel", scale=sizes),
        Column("max|w|, folded", "The same after it took the scale; the same colours", scale=sizes),
        Column(
            "evenness before", "How much of the tensor's range the average channel fills: 100 % is even", is_number=True
        ),
        Column("folded", "The same after the fold", is_number=True),
        Column("subnormal", "Elements too small to be normal numbers of the dtype", is_number=True, is_minor=True),
    )
    rows = tuple(
        Row(
            (
                Item(one.name),
                draw_item(one.before.magnitudes, sizes, what="max|w| before"),
                draw_item(one.after.magnitudes, sizes, what="max|w| folded"),
                number_item(100 * one.before.evenness, " %"),
                number_item(100 * one.after.evenness, " %"),
                Item(str(one.subnormal) if one.subnormal else "", sort=one.subnormal),
            ),
            f"w{number}",
            Style.WARNING if one.is_uneven else Style.PLAIN,
        )
        for number, one in enumerate(ranges)
    )
    note = "A fold that makes channels uneven costs bits where the weight is quantised per tensor."
    return Table("Weights", "weights", columns, rows, note)
