"""The note that bntool leaves in every file it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bntool.plan import Operation, Plan
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


def find_recorded_eps(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The eps that the tensors of each layer belong to, as the last conversion or freeze that knew it recorded."""
    found: dict[str, Any] = {}
    for record in history:
        layers, modules = record.get("layers"), record.get("modules")
        if record.get("operation") == Operation.CONVERT.value and isinstance(modules, dict):
            found.update({name: facts.get("eps") for name, facts in modules.items() if isinstance(facts, dict)})
        eps = record.get("target_eps", record.get("eps"))
        if eps is not None and isinstance(layers, list):
            found.update({name: eps for name in layers if isinstance(name, str)})
    return {name: eps for name, eps in found.items() if isinstance(eps, float)}
