"""The note that bntool leaves in every file it writes: a history, one record for each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from bntool.checkpoints.containers.json_texts import parse_json
from bntool.errors import RefusedError
from bntool.version import __version__

if TYPE_CHECKING:
    from bntool.plan import Plan  # plans are only needed to write

RECORD_KEY = "bntool"
History: TypeAlias = tuple[Mapping[str, Any], ...]


def make_record(plan: Plan, **details: Any) -> dict[str, Any]:
    """Describe what bntool did to a file, as JSON data for :meth:`bntool.plan.Plan.with_record`.

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


def find_recorded_momentum(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the momentum of each layer, as the last conversion that knew it recorded."""
    return {name: one for name, one in _list_converted(history, "momentum") if isinstance(one, float)}


def find_recorded_eps(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the eps that the tensors of each layer belong to, as the last conversion or freeze that knew it
    recorded.
    """
    from bntool.plan import Operation  # files that bntool did not write need none

    found: dict[str, Any] = {}
    for record in history:
        layers, modules = record.get("layers"), record.get("modules")
        if record.get("operation") == Operation.CONVERT.value and isinstance(modules, dict):
            found.update({name: facts.get("eps") for name, facts in modules.items() if isinstance(facts, dict)})
        eps = record.get("target_eps", record.get("eps"))
        if eps is not None and isinstance(layers, list):
            found.update({name: eps for name in layers if isinstance(name, str)})
    return {name: eps for name, eps in found.items() if isinstance(eps, float)}


def find_recorded_classes(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the path of the class of each layer, as the last conversion that knew it recorded."""
    return {name: one for name, one in _list_converted(history, "class") if isinstance(one, str)}


def _list_converted(history: Sequence[Mapping[str, Any]], fact: str) -> list[tuple[str, Any]]:
    """Return what the last conversion that knew a layer recorded of it."""
    from bntool.plan import Operation

    found: dict[str, Any] = {}
    for record in history:
        modules = record.get("modules")
        if record.get("operation") == Operation.CONVERT.value and isinstance(modules, dict):
            found.update({name: facts.get(fact) for name, facts in modules.items() if isinstance(facts, dict)})
    return list(found.items())


def check_not_folded(history: Sequence[Mapping[str, Any]], path: object) -> None:
    """Refuse a file that a fold took BatchNorms out of: it fits the folded model only.

    Raises:
        RefusedError: it is one.
    """
    for record in history:
        removed = record.get("removed_modules")
        if isinstance(removed, list) and removed:
            raise RefusedError(
                f"{len(removed):,} BatchNorm{'s were' if len(removed) > 1 else ' was'} folded away when this file was "
                "written, so it does not fit the model as its code builds it: use the file that was folded, and give "
                "--export with that fold; bntool.load_folded(model, path) loads this one",
                path=path,
            )


def parse_record(text: str | None) -> History:
    """Return a recorded history: a JSON array of objects; anything else counts as none."""
    return as_history(_parse(text)) if text else ()


def parse_records(text: bytes | None) -> dict[str, History]:
    """Parse recorded histories, a JSON object of them by key of the state dict; anything else counts as none."""
    found = _parse(text) if text else {}
    histories = {key: as_history(entries) for key, entries in found.items()} if isinstance(found, dict) else {}
    return {key: history for key, history in histories.items() if history}


def _parse(text: bytes | str) -> Any:
    try:
        return parse_json(text, allow_nan=True)
    except ValueError:
        return None


def as_history(entries: Any) -> History:
    """Return the entries that are records."""
    return tuple(entry for entry in entries if isinstance(entry, dict)) if isinstance(entries, list) else ()
