"""The result of ``bntool fold``, as data and for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.folding.options import Layout
from bntool.plan import RemoveModule
from bntool.reports.blocks import Block, Cell, Column, Line, Style, Table, line, verbatim
from bntool.reports.loading import show_loading_code
from bntool.reports.pictures.channels import draw_sizes
from bntool.reports.text import plural
from bntool.representation import format_number

if TYPE_CHECKING:
    from bntool.folding.exporting import Program
    from bntool.folding.multiply_adds import Cost
    from bntool.folding.speed import Speed
    from bntool.folding.state_dict import CheckpointFold
    from bntool.plan import Skip


def describe_fold(result: CheckpointFold) -> dict[str, Any]:
    """Return the fold as JSON data."""
    plan = result.plan
    return {
        "operation": "fold",
        "state_dict": plan.state_dict,
        "layout": plan.layout.value,
        "padding": list(plan.padding),
        "folds": [fold.describe() for fold in plan.folds],
        "skips": [{"layer": s.layer, "reason": s.reason.value, "detail": s.detail} for s in plan.skips],
        "architectures": [architecture.describe() for architecture in result.architectures],
        "assumptions": list(plan.assumptions),
        "verification": None if result.agreement is None else asdict(result.agreement),
        "runtime": None if result.runtime is None else asdict(result.runtime),
        "weights": [weight.describe() for weight in result.ranges],
        "removed": asdict(result.removed),
        "cost": None if result.cost is None else asdict(result.cost),
        "speed": None if result.speed is None else asdict(result.speed),
        "dropped": list(result.dropped),
        "warnings": list(result.warnings),
        "export": _describe_program(result.program, result.export),
        "output": result.output,
    }


def _describe_program(program: Program | None, path: str | None) -> dict[str, Any] | None:
    if program is None:
        return None
    return {
        "format": program.kind.name.lower(),
        "runtime": program.runtime,
        "shapes": [list(shape) for shape in program.shapes],
        "any_batch": program.any_batch,
        "inputs": program.inputs,
        "error": program.error,
        "output": path,
    }


def show_fold(result: CheckpointFold, *, pictures: bool = True) -> list[Block]:
    """Return lines and tables for people: the result and its proof, what needs attention, each fold, and how to load
    it.

    Args:
        pictures: with those of the channels, whose drawing takes a fifth of the time of a large fold.
    """
    plan, output, export = result.plan, result.output, result.export
    total = len(plan.folds) + len(plan.skips)
    blocks: list[Block] = [line(f"fold {len(plan.folds)} of {plural(total, 'BatchNorm layer')}", Style.HEADING)]
    proof = _proof(result)
    blocks += [*proof[:1], *_runtime(result), *_program(result.program), *_say_written(output, export)]
    attention: list[Block] = [line(f"! {warning}", Style.WARNING) for warning in result.warnings]
    attention += [line(f"assumed: {text}", Style.WARNING) for text in plan.assumptions]
    attention += _skips(plan.skips)
    details = [*proof[1:], *_weights(result), *_speed(result.cost, result.speed)]
    details += [line(f"dropped {name}: optimizer state that no longer fits", Style.NOTICE) for name in result.dropped]
    table = [_fold_table(result, pictures=pictures)] if plan.folds else []
    for part in (attention, table, details):
        blocks += [line(), *part] if part else []
    if output is not None:
        blocks += _show_loading(result, output)
    if export is not None and result.program is not None:
        blocks += [line(), line("run it:"), *verbatim(_running_code(result.program, export), indent=2)]
    return blocks


def _say_written(*paths: str | None) -> list[Line]:
    written = [f"wrote {path}" for path in paths if path is not None]
    return verbatim(written, Style.GOOD) if written else [line("dry run: nothing was written", Style.MUTED)]


def _skips(skips: Sequence[Skip]) -> list[Block]:
    if not skips:
        return []
    counts = Counter(skip.reason.value for skip in skips)
    listed = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return [
        line(f"left alone: {listed} (bntool explain REASON)", Style.WARNING),
        *(
            Line((Cell(f"{s.layer}: {s.reason.value}"), Cell(f" ({s.detail})" * bool(s.detail), Style.MUTED)), indent=2)
            for s in skips
        ),
    ]


def _running_code(program: Program, path: str) -> list[str]:
    if program.kind.name == "ONNX":
        return ["import onnxruntime", f"session = onnxruntime.InferenceSession({path!r})"]
    return ["import torch", f"model = torch.export.load({path!r}).module()  # runs code of the file"]


def _fold_table(result: CheckpointFold, *, pictures: bool) -> Table:
    """Return each fold, the channels of the weight that takes it, and how well its output agrees where that was
    compared.

    That is in float64, and in the file's dtype.
    """
    folds = result.plan.folds
    known = {} if result.agreement is None else {agreement.layer: agreement for agreement in result.agreement.layers}
    columns = (
        Column("into", shrinks=True),
        Column("", pictures=True),
        Column("", pictures=True),
        Column("BatchNorm", shrinks=True),
        Column("how"),
        *((Column("float64", right=True, wide=80), Column("as stored", right=True, wide=80)) if known else ()),
    )
    ranges = {weight.name.rpartition(".")[0]: weight for weight in reversed(result.ranges)} if pictures else {}
    taken = [next((ranges[name] for name in fold.into if name in ranges), None) for fold in folds]
    drawn, caption = draw_sizes(
        (side.magnitudes for weight in taken if weight is not None for side in (weight.before, weight.after)),
        name="max|w| by output channel, before and after:",
    )
    sides = iter(drawn)
    rows = []
    for fold, weight in zip(folds, taken, strict=True):
        before_after = (Cell(""), Cell("")) if weight is None else (next(sides), next(sides))
        row = [Cell(", ".join(fold.into)), *before_after, Cell(fold.layer), Cell(fold.how, Style.MUTED)]
        if known:
            agreement = known.get(fold.layer)
            errors = (math.nan, math.nan) if agreement is None else (agreement.exact, agreement.stored)
            row += [Cell("-" if math.isnan(error) else format_number(error, 2), Style.MUTED) for error in errors]
        rows.append(tuple(row))
    return Table(columns, rows, caption)


def _proof(result: CheckpointFold) -> list[Block]:
    agreement = result.agreement
    if agreement is None:
        return []
    inputs = plural(agreement.inputs, "input")
    exact = f"{format_number(agreement.exact, 2)} in float64"
    if math.isnan(agreement.exact):  # the model does not run in float64
        exact = f"{format_number(agreement.stored, 2)} in the model's dtype"
        return [line(f"verified on {inputs}: outputs agree to {exact} (it does not run in float64)", Style.GOOD)]
    return [
        line(f"verified on {inputs}: outputs agree to {exact}", Style.GOOD),
        line(
            f"as written: {format_number(agreement.rounded, 2)} in float64, {format_number(agreement.stored, 2)} in "
            f"the file's dtype (the original's own noise is {format_number(agreement.noise, 2)}); "
            "relative to the largest output",
            Style.MUTED,
        ),
    ]


def _runtime(result: CheckpointFold) -> list[Block]:
    """Describe the proof of files that hold their graph, and what a runtime said."""
    run = result.runtime
    if run is None:
        return []
    if run.error is None:
        return [line(f"proven by the graph; not run: {run.reason}", Style.MUTED)]
    said = f"run by {run.runtime} on {plural(run.inputs, 'random input')}: outputs agree"
    noise = "" if run.noise is None else f" (the original's own noise is {format_number(run.noise, 2)})"
    return [line(f"proven by the graph, and {said} to {format_number(run.error, 2)} of the largest{noise}", Style.GOOD)]


def _program(program: Program | None) -> list[Block]:
    if program is None:
        return []
    shapes = ", ".join(str(list(shape)) for shape in program.shapes)
    batch = ", batches of any size" if program.any_batch else " only"
    if not program.any_batch and any(shape[:1] == (1,) for shape in program.shapes):
        batch += " (--input-shape with 2 or more first leaves the size of batches open)"
    text = (
        f"the exported program, run by {program.runtime}, agrees to {format_number(program.error, 2)} on "
        f"{plural(program.inputs, 'input')}"
    )
    return [line(f"{text}; it takes {shapes}{batch}", Style.GOOD)]


def _weights(result: CheckpointFold) -> list[Block]:
    blocks: list[Block] = []
    removed = result.removed
    if removed.parameters or removed.buffers:
        counts = f"{removed.parameters:,} parameters and {removed.buffers:,} elements of buffers"
        blocks.append(line(f"{counts} fewer", Style.MUTED))
    changed = [w for w in result.ranges if w.before.evenness > 0]
    if changed:
        worst = min(changed, key=lambda w: w.after.evenness / w.before.evenness)
        before, after = worst.before, worst.after
        blocks.append(
            line(
                f"weight ranges: the average channel fills {_percent(before.evenness)} of its tensor's range "
                f"before and {_percent(after.evenness)} after in {worst.name}, which changes most "
                f"(max|w| by channel {format_number(before.smallest, 2)} to {format_number(before.largest, 2)}, now "
                f"{format_number(after.smallest, 2)} to {format_number(after.largest, 2)})",
                Style.MUTED,
            )
        )
    return blocks


def _speed(cost: Cost | None, speed: Speed | None) -> list[Block]:
    blocks: list[Block] = []
    if cost is not None and cost.before:
        shapes = ", ".join(str(list(shape)) for shape in cost.shapes)
        share = _percent(cost.removed / cost.before)
        text = f"multiply-adds of a forward on {shapes}: {cost.before:,}, now {cost.removed:,} ({share}) fewer"
        blocks.append(line(text, Style.MUTED))
    if speed is not None:
        found = f"{speed.wall.ratio:.2f} times the original's"
        if speed.wall.is_noise:
            found = "no difference beyond noise"
        where = f"{speed.device}, {plural(speed.threads, 'thread')}, {speed.rounds} rounds in turn"
        good = speed.wall.ratio > 1 and not speed.wall.is_noise
        blocks.append(line(f"speed in torch ({where}): {found}", Style.GOOD if good else Style.NOTICE))
        blocks += [
            line(
                f"{clock}: {_milliseconds(timing.before)}, now {_milliseconds(timing.after)}; {timing.ratio:.2f} times "
                f"as fast, {timing.low:.2f} to {timing.high:.2f} in the middle half of the rounds",
                Style.MUTED,
                indent=2,
            )
            for clock, timing in (("time", speed.wall), ("CPU time", speed.cpu))
        ]
    return blocks


def _milliseconds(seconds: float) -> str:
    return f"{format_number(1000 * seconds, 3)} ms"


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{format_number(percent, 2)} %"


def _show_loading(result: CheckpointFold, output: str) -> list[Block]:
    assert result.checkpoint is not None
    edited = result.checkpoint.state_dict(result.state_dict.key)
    lines = show_loading_code(result.checkpoint, edited, output)
    if result.checkpoint.format.graph_reader:
        return [line(), line("run it:"), *verbatim(lines, indent=2)]
    if result.plan.layout is Layout.DEPLOY:
        into = "load it into the deploy model, which its own code makes (timm: timm.utils.reparameterize_model):"
        return [
            line(),
            line(into),
            *verbatim(lines, indent=2),
            line("or into the unmodified model, which takes that form:"),
            *verbatim([f"model = bntool.load_folded(model, {output!r})"], indent=2),
        ]
    if not any(isinstance(step, RemoveModule) for step in result.plan.steps):
        same = line("its keys are those of the original; load it into the unmodified model:")
        return [line(), same, *verbatim(lines, indent=2)]
    is_default = choose_state_dict(result.checkpoint) is edited
    which = "" if is_default else f", state_dict={edited.key!r}"
    copying = [step.module for step in result.plan.steps if isinstance(step, RemoveModule) and step.copies]
    return [
        line(),
        line("load it into the unmodified model, which becomes the folded one:"),
        *verbatim([f"model = bntool.load_folded(model, {output!r}{which})"], indent=2),
        line("or without bntool:"),
        *verbatim(show_folded_loading(lines, copying), indent=2),
    ]


def show_folded_loading(lines: list[str], copying: Sequence[str] = ()) -> list[str]:
    """Show plain torch that turns a model into the folded one and loads it; activations of combined modules are not
    kept.

    Args:
        lines: that load the state dict into ``model``.
        copying: modules whose place something takes that gives a copy.
    """
    head, _, argument = lines[-1].partition("model.load_state_dict(")
    if head or not argument:
        return lines
    imports = [] if "import torch" in lines else ["import torch"]
    return [
        *imports,
        *lines[:-1],
        *([f"state_dict = {argument.removesuffix(')')}"] if argument != "state_dict)" else []),
        'for key in [k for k in model.state_dict() if k.endswith(".running_mean") and k not in state_dict]:',
        '    path, _, name = key.removesuffix(".running_mean").rpartition(".")',
        "    setattr(model.get_submodule(path), name, torch.nn.Identity())",
        *_show_copying(copying),
        "for key in [k for k in state_dict if k not in model.state_dict()]:",
        '    path, _, name = key.rpartition(".")',
        "    setattr(model.get_submodule(path), name, torch.nn.Parameter(state_dict[key]))",
        "model.load_state_dict(state_dict)",
    ]


def _show_copying(modules: Sequence[str]) -> list[str]:
    """Show modules that copy, where something writes into what a BatchNorm gave and its input is still read."""
    if not modules:
        return []
    return [
        f"for key in {list(modules)!r}:  # something writes into what these give",
        '    path, _, name = key.rpartition(".")',
        "    setattr(model.get_submodule(path), name, torch.nn.Hardtanh(-torch.inf, torch.inf))",
    ]
