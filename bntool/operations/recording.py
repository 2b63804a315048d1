"""The note that bntool leaves in every file it writes."""

from __future__ import annotations

from typing import Any

from bntool.plan import Plan
from bntool.version import __version__


def make_record(plan: Plan, **details: Any) -> dict[str, Any]:
    """What bntool did to a file, as JSON data for :meth:`bntool.plan.Plan.with_record`.

    Args:
        plan: what was done.
        details: facts of the operation, e.g. where statistics came from or what a freeze is to mean.
    """
    return {
        "bntool": __version__,
        "operation": plan.operation.value,
        "state_dict": plan.state_dict,
        "layers": list(plan.layers),
        "assumptions": list(plan.assumptions),
        **details,
    }
