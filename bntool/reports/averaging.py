"""The result of `average`, for people and as JSON data."""

from __future__ import annotations

import math
from typing import Any

from bntool.averaging.checkpoint import Average, PooledLayer
from bntool.checkpoints.checkpoint import Loader
from bntool.plan import Record, describe_step
from bntool.reports.blocks import Block, Cell, Column, Style, Table, line, verbatim
from bntool.reports.loading import show_loading_code
from bntool.reports.text import plural
from bntool.representation import format_number
from bntool.shells import quote_word

_SHOWN = 6


def describe_average(average: Average) -> dict[str, Any]:
    """Return the facts as JSON data."""
    plan = average.plan
    return {
        "format": average.sources[0].format.name,
        "sources": [
            {"file": str(source.path), "weight": weight}
            for source, weight in zip(average.sources, average.weights, strict=True)
        ],
        "state_dict": plan.state_dict,
        "layers": list(plan.layers),
        "averaged": average.averaged,
        "statistics": "pooled" if average.statistics_from is None else "file",
        "statistics_from": average.statistics_from,
        "between": {layer.name: layer.between for layer in average.pooled},
        "worst_channels": {
            layer.name: {
                "between": layer.between_channel,
                "variance_ratio": layer.ratio,
                "variance_ratio_channel": layer.ratio_channel,
            }
            for layer in average.pooled
        },
        "kept": list(average.kept),
        "other_entries": list(average.other_entries),
        "steps": [describe_step(step) for step in plan.steps if not isinstance(step, Record)],
        "must_recalibrate": bool(plan.layers),
        "output": average.output,
    }


def show_average(average: Average) -> list[Block]:
    """Return lines and tables for people, with the code that loads what was written."""
    plan, first = average.plan, average.sources[0]
    files = plural(len(average.sources), "file")
    blocks: list[Block] = [line(f"{plural(average.averaged, 'tensor')} averaged over {files}", Style.HEADING)]
    if average.output is None:
        blocks.append(line("nothing was written", Style.MUTED))
    else:
        blocks += verbatim([f"wrote {average.output}"], Style.GOOD)
    if plan.layers:
        how = "pooled, variance = mean of variances + variance of means"
        if average.statistics_from is not None:
            how = f"those of {average.statistics_from}"
        blocks.append(line(f"running statistics of {plural(len(plan.layers), 'layer')}: {how}", indent=2))
        blocks += _advise(average)
    rows = [
        (Cell(str(source.path)), Cell(f"{weight:.4g}"))
        for source, weight in zip(average.sources, average.weights, strict=True)
    ]
    blocks += [line(), Table((Column("file", shrinks=True), Column("weight", right=True)), rows), *_layers(average)]
    if average.counters:
        blocks.append(line(f"num_batches_tracked: the largest of all files, in {plural(average.counters, 'layer')}"))
    if average.kept:
        listed = ", ".join(average.kept[:_SHOWN]) + (" ..." if len(average.kept) > _SHOWN else "")
        blocks.append(line(f"whole numbers that differ are those of {first.path}: {listed}", Style.NOTICE))
    if average.other_entries:
        listed = ", ".join(average.other_entries[:_SHOWN])
        blocks.append(line(f"everything else is that of {first.path}: {listed}", Style.NOTICE))
    if average.output is None or average.written is None:
        return blocks
    loading = show_loading_code(average.written, average.written.state_dict(plan.state_dict), average.output)
    return [
        *blocks,
        line(),
        *verbatim(["To load it without bntool:"]),
        *verbatim([f"    {text}" for text in loading]),
    ]


def _advise(average: Average) -> list[Block]:
    """Describe how the statistics become those of the averaged model."""
    said, loader = "They are those of no model that was run", average.sources[0].format.loader
    if loader is not Loader.TORCH:
        how = f"let {loader.value} run batches in training mode, with the weights kept"
        return [line(f"{said}: {how}, before this model is used.", Style.WARNING)]
    command = f"bntool recalibrate {quote_word(average.output or 'OUT')} --model SPEC --data SPEC -o recalibrated.pt"
    return [
        line(f"{said}: recalibrate before this model is used.", Style.WARNING),
        *verbatim([f"    {command}"]),
    ]


def _layers(average: Average) -> list[Block]:
    """Return the layers in which the files differ most."""
    apart = sorted((one for one in average.pooled if one.between > 0 or one.ratio > 1), key=_how_far, reverse=True)
    if not apart:
        return []
    columns = (
        Column("layer", shrinks=True),
        Column("between the files", right=True),
        Column("channel", right=True),
        Column("variances apart", right=True),
        Column("channel", right=True),
    )
    rows = [
        (
            Cell(one.name),
            Cell(f"{one.between:.1%}"),
            Cell(str(one.between_channel) if one.between > 0 else ""),
            Cell(f"x {format_number(one.ratio)}"),
            Cell(str(one.ratio_channel) if one.ratio > 1 else ""),
        )
        for one in apart[:_SHOWN]
    ]
    what = (
        "the layers in which the files differ most, in their worst channels: the share of the pooled variance that "
        "comes from means that differ, and the factor between the variances"
    )
    return [line(), line(what, Style.MUTED), Table(columns, rows), line()]


def _how_far(layer: PooledLayer) -> float:
    """Return the larger of how far means lie apart, in standard deviations, and the log of the factor between
    variances.
    """
    return max(math.sqrt(layer.between / max(1 - layer.between, 1e-300)), math.log(layer.ratio))
