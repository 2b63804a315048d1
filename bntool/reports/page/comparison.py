"""The page of what `diff` found."""

from __future__ import annotations

from bntool.comparison.checkpoint import Change, Comparison, LayerComparison
from bntool.reports.blocks import Style
from bntool.reports.comparison import MEANINGS, describe_changes, show_comparison
from bntool.reports.page.cells import number_item
from bntool.reports.page.changes import ChangeColumns
from bntool.reports.page.document import Column, Entry, Item, Page, Place, Row, Snippet, Table
from bntool.reports.page.from_blocks import read_blocks
from bntool.reports.text import plural
from bntool.shells import join_words

_OTHERS = 400  # tensors that are listed


def make_comparison_page(comparison: Comparison, *, path_a: str, path_b: str) -> Page:
    """Make the page of two files."""
    anchors = {layer.name: f"l{number}" for number, layer in enumerate(comparison.layers)}
    style, verdict = _judge(comparison)
    said = {*comparison.violations}
    parts = read_blocks(show_comparison(comparison, path_a=path_a, path_b=path_b))
    command = join_words(["bntool", "diff", path_a, path_b, *_list_options(comparison, one_file=path_a == path_b)])
    return Page(
        command="diff",
        subject=f"{path_a} and {path_b}",
        style=style,
        verdict=verdict,
        details=tuple(one for one in parts.lines if one.style is not Style.HEADING and one.text not in said),
        heading="Not as expected",
        entries=_list_violations(comparison, anchors),
        tables=tuple(_make_tables(comparison, anchors)),
        snippets=(Snippet("The same in a terminal", (command,)), *parts.snippets),
    )


def _list_options(comparison: Comparison, *, one_file: bool) -> list[str]:
    """Return the options that compare the same again; prefixes are found anew where the files are two."""
    options = ["--state-dict", comparison.a.key] if comparison.not_compared[0] and comparison.a.key else []
    if comparison.not_compared[1] and comparison.b.key not in {"", comparison.a.key}:
        options += ["--state-dict-b", comparison.b.key]
    if one_file and comparison.path_a != comparison.path_b:
        prefixes = (("--prefix", comparison.path_a), ("--prefix-b", comparison.path_b))
        options += [text for name, prefix in prefixes if prefix for text in (name, prefix)]
    if comparison.expectation is not None:
        options += ["--expect", comparison.expectation.value]
    return options


def _judge(comparison: Comparison) -> tuple[Style, str]:
    changed = sum(layer.changed for layer in comparison.layers)
    others = sum(change is not Change.SAME for change in comparison.others.values())
    text = f"{changed} of {plural(len(comparison.layers), 'BatchNorm layer')} changed"
    text += f", {others} of {plural(len(comparison.others), 'other tensor')}" if comparison.others else ""
    if comparison.expectation is None:
        return Style.PLAIN, text
    if comparison.violations:
        return Style.ERROR, f"not as expected: {text}"
    return Style.GOOD, f"as expected: {MEANINGS[comparison.expectation]}"


def _list_violations(comparison: Comparison, anchors: dict[str, str]) -> tuple[Entry, ...]:
    """List violations in one entry, with a place for each layer or tensor that contradicts what was expected."""
    if comparison.expectation is None or not comparison.violations:
        return ()
    text = f"expected was: {MEANINGS[comparison.expectation]}"
    if comparison.has_no_layers:
        return (Entry(Style.ERROR, comparison.expectation.value, "; ".join((text, *comparison.violations))),)
    split = (violation.partition(": ") for violation in comparison.violations)
    places = tuple(Place(name, anchors.get(name, ""), more) for name, _, more in split)
    return (Entry(Style.ERROR, comparison.expectation.value, text, places=places),)


def _make_tables(comparison: Comparison, anchors: dict[str, str]) -> list[Table]:
    tables = []
    if comparison.layers:
        columns = ChangeColumns([layer.statistics for layer in comparison.layers], before="A", after="B")
        own = (
            Column("layer"),
            Column("changed", "Which of its tensors and settings"),
            *columns.columns(),
            Column("scale", "How far the scale moved as a vector, relative to A", is_number=True),
            Column("shift", "How far the shift moved as a vector, relative to A", is_number=True, is_minor=True),
        )
        rows = tuple(_make_row(layer, columns, anchors[layer.name]) for layer in comparison.layers)
        note = "Those that moved most come first."
        tables.append(Table("BatchNorm layers", "layers", own, rows, note, marked="only changed"))
    changed = {name: change for name, change in comparison.others.items() if change is not Change.SAME}
    if changed:
        listed = list(changed.items())[:_OTHERS]
        note = f"and {len(changed) - _OTHERS} more" if len(changed) > _OTHERS else ""
        rows = tuple(Row((Item(name), Item(change.value))) for name, change in listed)
        tables.append(Table("Other tensors that differ", "tensors", (Column("tensor"), Column("how")), rows, note))
    return tables


def _make_row(layer: LayerComparison, columns: ChangeColumns, anchor: str) -> Row:
    style = Style.WARNING if layer.changed else Style.PLAIN
    items = (
        Item(layer.name),
        Item(describe_changes(layer)),
        *columns.items(layer.statistics),
        number_item(None if layer.scale_change is None else 100 * layer.scale_change, " %"),
        number_item(None if layer.shift_change is None else 100 * layer.shift_change, " %"),
    )
    return Row(items, anchor, style)
