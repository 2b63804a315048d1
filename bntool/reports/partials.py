"""The measurement of a share of a recalibration, for people and as JSON data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bntool.reports.blocks import Block, Style, line, verbatim
from bntool.reports.recalibration import show_left_out
from bntool.reports.text import plural

if TYPE_CHECKING:
    from bntool.recalibration.partials import Partial


def describe_partial(partial: Partial) -> dict[str, Any]:
    """Return the facts as JSON data."""
    return {
        "partial": {
            "shard": partial.share.shard + 1,
            "shards": partial.share.shards,
            "method": partial.origin.method.value,
            "precision": partial.origin.precision.value,
            "data": partial.origin.data_name,
            "preprocessing": partial.origin.preprocessing,
            "batches": partial.batches,
            "batches_of_all": partial.count,
            "samples": partial.samples,
            "left_out": [left_out.reason for left_out in partial.left_out],
            "left_out_samples": sum(left_out.samples for left_out in partial.left_out),
            "layers": [facts.name for facts in partial.layers.values()],
            "skips": [{"layer": s.layer, "reason": s.reason.value, "detail": s.detail} for s in partial.skips],
            "output": partial.path,
        }
    }


def show_partial(partial: Partial) -> list[Block]:
    """Show a partial in lines for people."""
    share, origin = partial.share, partial.origin
    title = f"shard {share.shard + 1} of {share.shards:,}: {origin.method.value} moments of "
    title += f"{plural(len(partial.layers), 'BatchNorm layer')} from {plural(partial.samples, 'sample')} in "
    title += f"{partial.batches:,} of {plural(partial.count or 0, 'batch', 'batches')}"
    blocks: list[Block] = [line(title, Style.HEADING)]
    if origin.preprocessing is not None:
        blocks.append(line(f"preprocessing: {origin.preprocessing} ({origin.preprocessing_origin})", Style.MUTED))
    blocks += show_left_out(partial.left_out)
    blocks += [line(), *verbatim([f"wrote {partial.path}"], Style.GOOD)]
    blocks.append(line("With the partials of all shards: bntool recalibrate CKPT --from-partials 'PARTS' -o OUT"))
    return blocks
