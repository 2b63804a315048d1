"""Results as a notebook shows them: the parts of their page, made when a result is shown."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bntool.batchnorm import STATISTICS, LayerArrays
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.origin import describe_origin
from bntool.errors import BntoolError
from bntool.inspection.results import Inspection, LayerInspection, StateDictInspection
from bntool.plan import Plan, describe_step
from bntool.reports.blocks import Block, Style
from bntool.reports.page.cells import describe_channels, draw_item, range_item
from bntool.reports.page.document import Column, Entry, Item, Page, Place, Row, Table
from bntool.reports.page.from_blocks import make_table, read_blocks
from bntool.reports.page.inspection import make_inspection_page, make_state_dict_page
from bntool.reports.page.skips import list_skips
from bntool.reports.page.strips import Mark, scale_sizes
from bntool.reports.severities import SEVERITY_STYLES
from bntool.reports.text import format_size, plural
from bntool.representation import format_number

if TYPE_CHECKING:
    from bntool.averaging.checkpoint import Average
    from bntool.batchnorm import BatchNorm
    from bntool.checkpoints.checkpoint import Checkpoint, StateDict
    from bntool.comparison.checkpoint import Comparison
    from bntool.conversion.checkpoint import Conversion
    from bntool.folding.live import FoldResult
    from bntool.folding.state_dict import CheckpointFold
    from bntool.freezing.checkpoint import CheckpointFreeze, FreezePlan
    from bntool.freezing.policy import FreezePolicy
    from bntool.inspection.run import Run
    from bntool.recalibration.new_statistics import Recalibration
    from bntool.recalibration.partials import Partial
    from bntool.recalibration.results import CheckpointRecalibration

_ROLES = ("weight", "bias", *STATISTICS)


def draw(value: Any) -> str | None:
    """Draw a result as HTML; None for what is none, and where Jinja2 is missing."""
    make = next((_PAGES[kind.__name__] for kind in type(value).__mro__ if kind.__name__ in _PAGES), None)
    if make is None or importlib.util.find_spec("jinja2") is None:
        return None
    from bntool.reports.page.rendering import render_part

    return render_part(make(value))


def _make(room: str, function: str, *arguments: Any, **options: Any) -> Page:
    """Make a page by a module that imports a verb: only where a result of that verb is there already."""
    page: Page = getattr(importlib.import_module(f"bntool.reports.page.{room}"), function)(*arguments, **options)
    return page


def _of_inspection(inspection: Inspection) -> Page:
    return make_inspection_page(str(inspection.checkpoint.path), inspection)


def _of_run(run: Run) -> Page:
    return _make("run", "make_run_page", run)


def _of_state_dict_inspection(one: StateDictInspection) -> Page:
    return make_state_dict_page(one)


def _of_layer_inspection(layer: LayerInspection) -> Page:
    marks = [
        Mark(SEVERITY_STYLES[finding.severity], finding.channels) for finding in layer.findings if finding.channels
    ]
    entries = tuple(
        Entry(
            SEVERITY_STYLES[finding.severity],
            finding.code.value,
            finding.message,
            finding.advice,
            (Place(describe_channels(finding.channels)),) if finding.channels else (),
        )
        for finding in layer.findings
    )
    style = Style.GOOD if layer.worst is None else SEVERITY_STYLES[layer.worst]
    verdict = "nothing found" if layer.worst is None else ", ".join(finding.short for finding in layer.findings)
    return _make_layer_page(layer.layer, layer, style=style, verdict=verdict, entries=entries, marks=marks)


def _of_batchnorm(layer: BatchNorm) -> Page:
    return _make_layer_page(layer, layer, style=Style.PLAIN, verdict=layer.kind.value)


def _make_layer_page(
    layer: BatchNorm,
    arrays: LayerArrays,
    *,
    style: Style,
    verdict: str,
    entries: tuple[Entry, ...] = (),
    marks: Sequence[Mark] = (),
) -> Page:
    """Make the page of one layer: a strip for each of its tensors."""
    numbers = {role: found for role in _ROLES if (found := _read(arrays, role))}
    scale = scale_sizes(abs(value) for values in numbers.values() for value in values)
    columns = (
        Column("tensor"),
        Column("magnitude by channel", "The same colours in all rows", scale=scale),
        Column("min to max", is_number=True),
    )
    rows = tuple(
        Row(
            (
                Item(role),
                draw_item(values if role == "running_var" else [*map(abs, values)], scale, marks, what=role),
                range_item(values),
            )
        )
        for role, values in numbers.items()
    )
    eps = "not known" if layer.eps is None else f"{format_number(layer.eps)} ({layer.eps_source.value})"
    facts = {
        "Channels": "not known" if layer.num_features is None else str(layer.num_features),
        "eps": eps,
        "momentum": "" if layer.momentum is None else format_number(layer.momentum),
        "Tensors": ", ".join(layer.tensors),
    }
    return Page(
        command="layer",
        subject=layer.name,
        style=style,
        verdict=verdict,
        facts={name: text for name, text in facts.items() if text},
        entries=entries,
        tables=(Table("Tensors", "tensors", columns, rows),) if rows else (),
    )


def _read(arrays: LayerArrays, role: str) -> list[float]:
    """Read the numbers of a tensor; none where the layer has none, or its file is closed."""
    try:
        values = arrays.read(role)
    except (BntoolError, ValueError):
        return []
    return [] if values is None or values.ndim != 1 else [float(value) for value in values]


def _of_checkpoint(checkpoint: Checkpoint) -> Page:
    columns = (
        Column("state dict"),
        Column("tensors", is_number=True),
        Column("BatchNorm layers", is_number=True),
        Column("prefix"),
        Column("done by bntool"),
    )
    rows = []
    for one in checkpoint.state_dicts:
        done = ", ".join(str(entry.get("operation", "?")) for entry in checkpoint.records.get(one.key, ()))
        counts = (len(one.tensors), len(find_batchnorms(one)))
        numbers = (Item(f"{count:,}", sort=count) for count in counts)
        rows.append(Row((Item(one.key or "(the whole file)"), *numbers, Item(one.prefix), Item(done))))
    names = ", ".join(list(checkpoint.entries)[:12])
    facts = {"Format": checkpoint.format.title, "Origin": describe_origin(checkpoint), "Entries": names}
    changes = plural(len(checkpoint.edits), "change")
    details = (Item(f"{changes} against the file, not written yet"),) if checkpoint.edits else ()
    return Page(
        command="checkpoint",
        subject=str(checkpoint.path),
        style=Style.PLAIN,
        verdict=plural(len(checkpoint.state_dicts), "state dict"),
        details=details,
        facts={name: text for name, text in facts.items() if text},
        tables=(Table("State dicts", "state dicts", columns, tuple(rows)),) if rows else (),
    )


def _of_state_dict(one: StateDict) -> Page:
    columns = (
        Column("tensor"),
        Column("dtype"),
        Column("shape"),
        Column("bytes", is_number=True, is_minor=True),
    )
    rows = []
    for name, tensor in one.tensors.items():
        size = getattr(tensor, "nbytes", None)
        shown = Item("", sort=-1) if size is None else Item(format_size(size), sort=size)
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        rows.append(Row((Item(one.strip(name)), Item(tensor.dtype.name), Item(shape), shown)))
    return Page(
        command="state dict",
        subject=one.key,
        style=Style.PLAIN,
        verdict=f"{plural(len(one.tensors), 'tensor')}, {plural(len(find_batchnorms(one)), 'BatchNorm layer')}",
        facts={"Prefix": one.prefix} if one.prefix else {},
        tables=(Table("Tensors", "tensors", columns, tuple(rows)),),
    )


def _of_plan(plan: Plan) -> Page:
    """Make a page of steps and skips, as they would be done."""
    rows = []
    for step in plan.steps:
        facts = describe_step(step)
        kind, name = facts.pop("step"), facts.pop("name", facts.pop("module", ""))
        facts.pop("payload", None)  # of a record: the plan itself, once more
        rest = ", ".join(f"{key} {value}" for key, value in facts.items() if value not in (None, False, ""))
        rows.append(Row((Item(str(name)), Item(kind), Item(rest))))
    columns = (Column("tensor or module"), Column("step"), Column("details"))
    return Page(
        command=plan.operation.value,
        subject=plan.state_dict,
        style=Style.NOTICE if plan.skips else Style.PLAIN,
        verdict=f"a plan of {plural(len(plan.steps), 'step')} for {plural(len(plan.layers), 'layer')}",
        details=tuple(Item(f"assumed: {text}", Style.WARNING) for text in plan.assumptions),
        heading="Left alone",
        entries=list_skips(plan),
        tables=(Table("Steps", "steps", columns, tuple(rows)),) if rows else (),
    )


def _of_comparison(comparison: Comparison) -> Page:
    names = (f"A {comparison.a.key}".rstrip(), f"B {comparison.b.key}".rstrip())
    return _make("comparison", "make_comparison_page", comparison, path_a=names[0], path_b=names[1])


def _of_checkpoint_fold(result: CheckpointFold) -> Page:
    return _make("folding", "make_fold_page", str(result.source.path), result)


def _of_fold_result(result: FoldResult) -> Page:
    return _make("folding", "make_live_fold_page", result)


def _of_checkpoint_recalibration(outcome: CheckpointRecalibration) -> Page:
    return _make("recalibration", "make_recalibration_page", str(outcome.checkpoint.path), outcome)


def _of_recalibration(result: Recalibration) -> Page:
    return _make("recalibration", "make_live_recalibration_page", result)


def _from_blocks(command: str, subject: str, shown: Sequence[Block]) -> Page:
    """Make a page of a result that has no pictures: what its command prints."""
    parts = read_blocks(shown)
    first, *rest = parts.lines or (Item(""),)
    worst = max((one.style for one in parts.lines), key=_RANKS.index, default=Style.PLAIN)
    tables = tuple(make_table(table, title="Details", noun="rows") for table in parts.tables)
    style = worst if worst in (Style.WARNING, Style.ERROR) else Style.PLAIN
    return Page(command, subject, style, first.text, tuple(rest), tables=tables, snippets=parts.snippets)


_RANKS = (Style.PLAIN, Style.HEADING, Style.MUTED, Style.GOOD, Style.NOTICE, Style.WARNING, Style.ERROR)


def _of_checkpoint_freeze(result: CheckpointFreeze) -> Page:
    from bntool.reports.freezing import show_freeze

    return _from_blocks("freeze", str(result.source.path), show_freeze(result))


def _of_freeze_plan(freeze: FreezePlan) -> Page:
    return _of_plan(freeze.plan)


def _of_freeze_policy(policy: FreezePolicy) -> Page:
    words = {True: "yes", False: "no", None: "as the model has it"}
    facts = {
        "Statistics stay (norm_eval)": words[policy.norm_eval],
        "weight and bias train": words[policy.requires_grad],
    }
    if policy.skips:
        facts["left alone"] = "; ".join(f"{skip.layer}: {skip.detail}" for skip in policy.skips)
    rows = tuple(Row((Item(name),)) for name in policy.layers)
    return Page(
        command="freeze",
        subject="",
        style=Style.PLAIN,
        verdict=plural(len(policy.layers), "BatchNorm layer"),
        facts=facts,
        tables=(Table("Layers", "layers", (Column("layer"),), rows),) if rows else (),
    )


def _of_conversion(conversion: Conversion) -> Page:
    from bntool.reports.conversion import show_conversion

    return _from_blocks("convert", str(conversion.source.path), show_conversion(conversion))


def _of_average(average: Average) -> Page:
    from bntool.reports.averaging import show_average

    return _from_blocks("average", str(average.sources[0].path), show_average(average))


def _of_partial(partial: Partial) -> Page:
    from bntool.reports.partials import show_partial

    return _from_blocks("recalibrate", partial.path or "", show_partial(partial))


# by the name of the class: to compare classes they would have to be imported, and torch with some of them
_PAGES: dict[str, Any] = {
    "Inspection": _of_inspection,
    "Run": _of_run,
    "StateDictInspection": _of_state_dict_inspection,
    "LayerInspection": _of_layer_inspection,
    "BatchNorm": _of_batchnorm,
    "Checkpoint": _of_checkpoint,
    "StateDict": _of_state_dict,
    "Plan": _of_plan,
    "Comparison": _of_comparison,
    "CheckpointFold": _of_checkpoint_fold,
    "FoldResult": _of_fold_result,
    "CheckpointRecalibration": _of_checkpoint_recalibration,
    "Recalibration": _of_recalibration,
    "CheckpointFreeze": _of_checkpoint_freeze,
    "FreezePlan": _of_freeze_plan,
    "FreezePolicy": _of_freeze_policy,
    "Conversion": _of_conversion,
    "Average": _of_average,
    "Partial": _of_partial,
}
