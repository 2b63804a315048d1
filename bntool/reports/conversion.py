"""The result of `convert`, for people and as JSON data."""

from __future__ import annotations

from typing import Any

from bntool.conversion.checkpoint import Conversion
from bntool.plan import Record, RenameTensor, describe_step
from bntool.reports.blocks import Block, Cell, Line, Style, line, verbatim
from bntool.reports.freezing import describe_skip
from bntool.reports.loading import show_loading_code
from bntool.reports.text import plural


def describe_conversion(conversion: Conversion) -> dict[str, Any]:
    """Return the facts as JSON data."""
    plan = conversion.plan
    others = [step for step in plan.steps if not isinstance(step, Record | RenameTensor)]
    return {
        "format": conversion.source.format.name,
        "to": None if conversion.target is None else conversion.target.value,
        "state_dict": plan.state_dict,
        "layers": list(plan.layers),
        "steps": [describe_step(step) for step in (*conversion.renames, *others)],
        "skips": [describe_skip(skip) for skip in plan.skips],
        "assumptions": list(plan.assumptions),
        "kept": list(conversion.kept),
        "losses": list(conversion.losses),
        "output": conversion.output,
    }


def show_conversion(conversion: Conversion) -> list[Block]:
    """Return lines and tables for people, with the code that loads what was written."""
    plan = conversion.plan
    text, target = "new names", "" if conversion.target is None else conversion.target.value
    if conversion.new is not None:
        text = f"{plural(len(conversion.new.tensors), 'tensor')} from {conversion.source.format.title} to {target}"
    elif target:
        text = f"{plural(len(plan.layers), 'layer')} to {target}"
    blocks: list[Block] = [line(text, Style.HEADING)]
    renames = conversion.renames
    if renames:
        first = f"the first {renames[0].name} to {renames[0].new_name}"
        blocks.append(line(f"{plural(len(renames), 'tensor')} renamed, {first}", indent=2))
    written = conversion.written
    if written is None:
        blocks.append(line("nothing was written", Style.MUTED))
    else:
        blocks += verbatim([f"wrote {conversion.output}"], Style.GOOD)
    blocks += [Line((Cell("lost ", Style.WARNING), Cell(text)), indent=2) for text in conversion.losses]
    blocks += [Line((Cell("assumed ", Style.WARNING), Cell(text)), indent=2) for text in plan.assumptions]
    blocks += [
        Line((Cell("left alone ", Style.WARNING), Cell(f"{s.layer}: {s.reason.value} ({s.detail})")), indent=2)
        for s in plan.skips
    ]
    blocks += [Line((Cell("recorded ", Style.GOOD), Cell(text)), indent=2) for text in conversion.kept]
    if written is None:
        return blocks
    state_dict = written.state_dict("" if conversion.new is not None else plan.state_dict)
    loading = show_loading_code(written, state_dict, conversion.output or "")
    return [*blocks, line(), line("To load it without bntool:", Style.MUTED), *verbatim(loading, Style.MUTED, indent=4)]
