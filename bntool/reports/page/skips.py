"""The layers that a plan leaves alone, as entries of a page."""

from __future__ import annotations

from bntool.plan import Plan
from bntool.reports.blocks import Style
from bntool.reports.page.document import Entry, Place
from bntool.reports.text import plural


def list_skips(plan: Plan) -> tuple[Entry, ...]:
    """List skips in one entry for each reason, with its layers."""
    places: dict[str, list[Place]] = {}
    for skip in plan.skips:
        places.setdefault(skip.reason.value, []).append(Place(skip.layer, more=skip.detail))
    return tuple(
        Entry(Style.NOTICE, reason, plural(len(listed), "layer"), places=tuple(listed))
        for reason, listed in places.items()
    )
