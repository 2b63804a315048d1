"""The page of what `recalibrate` found and did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bntool.reports.blocks import Style
from bntool.reports.page.cells import number_item
from bntool.reports.page.changes import ChangeColumns
from bntool.reports.page.document import Column, Item, Page, Row, Snippet, Table
from bntool.reports.page.from_blocks import leave_out_skips, read_blocks
from bntool.reports.page.skips import list_skips
from bntool.reports.recalibration import format_rate, show_recalibration
from bntool.reports.text import plural
from bntool.shells import join_words

if TYPE_CHECKING:
    from bntool.recalibration.drift import LayerDrift
    from bntool.recalibration.new_statistics import Recalibration
    from bntool.recalibration.output_changes import OutputChange, OutputChanges
    from bntool.recalibration.results import CheckpointRecalibration


def make_recalibration_page(path: str, outcome: CheckpointRecalibration) -> Page:
    """Make the page of a file."""
    result = outcome.recalibration
    parts = read_blocks(show_recalibration(outcome))
    before, after = outcome.before, outcome.after
    verdict, style = _count_parted(result.drifts), _judge(result.drifts)
    if before is not None and after is not None and before.value is not None and after.value is not None:
        numbers = [format_rate(before.metric, value) for value in (before.value, after.value)]
        verdict = f"{before.metric} {numbers[0]} → {numbers[1]}; {verdict}"
        style = Style.WARNING if after.value < before.value else Style.GOOD if after.value > before.value else style
    inspect = (Snippet("Look at the new file", (join_words(["bntool", "inspect", outcome.output or ""]),)),)
    return Page(
        command="recalibrate",
        subject=path,
        style=style,
        verdict=verdict,
        details=leave_out_skips(parts.lines, outcome.recalibration.plan),
        heading="Left alone",
        entries=list_skips(result.plan),
        tables=(make_drift_table(result.drifts, outcome.output_changes),) if result.drifts else (),
        snippets=(*parts.snippets, *(inspect if outcome.output is not None else ())),
    )


def make_live_recalibration_page(result: Recalibration) -> Page:
    """Make the page of a live model."""
    counts = f"{plural(result.samples, 'sample')} in {plural(result.batches, 'batch', 'batches')}"
    return Page(
        command="recalibrate",
        subject="",
        style=_judge(result.drifts),
        verdict=_count_parted(result.drifts),
        facts={"Method": result.method.value, "Data": counts},
        heading="Left alone",
        entries=list_skips(result.plan),
        tables=(make_drift_table(result.drifts),) if result.drifts else (),
    )


def _count_parted(drifts: tuple[LayerDrift, ...]) -> str:
    parted = sum(drift.has_parted for drift in drifts)
    if not parted:
        return "the stored statistics are those of this data"
    return f"{parted} of {plural(len(drifts), 'layer')} had other statistics than this data"


def _judge(drifts: tuple[LayerDrift, ...]) -> Style:
    return Style.NOTICE if any(drift.has_parted for drift in drifts) else Style.GOOD


def _find_percent(change: OutputChange | None) -> float | None:
    """Return how far outputs change relative to their norm, in percent; None where that was not measured, or is not
    defined.
    """
    return None if change is None or change.relative is None else 100 * change.relative


def make_drift_table(drifts: tuple[LayerDrift, ...], output_changes: OutputChanges | None = None) -> Table:
    """Make the table of layers in order of execution, each with its statistics before and as the data have them.

    Args:
        output_changes: what the new statistics of single layers do to the outputs.
    """
    alone = output_changes.alone if output_changes is not None else {}
    columns = ChangeColumns([drift.shift for drift in drifts], before="stored", after="data")
    own = (
        Column("layer"),
        *columns.columns(),
        Column(
            "error",
            "Standard error of the measured mean, in standard deviations",
            is_number=True,
            is_minor=True,
        ),
        Column("outputs", "How far the new statistics of this layer alone change the outputs", is_number=True),
    )
    rows = tuple(
        Row(
            (
                Item(drift.layer),
                *columns.items(drift.shift),
                number_item(drift.sampling_error, " σ"),
                number_item(_find_percent(alone.get(drift.layer)), " %"),
            ),
            f"l{number}",
            Style.WARNING if drift.has_parted else Style.PLAIN,
        )
        for number, drift in enumerate(drifts)
    )
    note = "In order of execution: the first layer that is marked is where the model parts from the data."
    return Table("Layers", "layers", own, rows, note, marked="only those that part from the data")
