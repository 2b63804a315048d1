"""The structure that a fold changes in a model besides elements, as JSON data for the record and back; imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bntool.errors import UsageError
from bntool.plan import AddTensor, RemoveModule, Step, Values


def describe_structure(steps: tuple[Step, ...]) -> dict[str, Any]:
    """Describe what steps change besides elements, as JSON data for the record."""
    return {
        "removed_modules": [step.module for step in steps if isinstance(step, RemoveModule)],
        "copying_modules": [step.module for step in steps if isinstance(step, RemoveModule) and step.copies],
        "added_parameters": [
            {"name": step.name, "shape": list(step.value.shape), "dtype": step.dtype}
            for step in steps
            if isinstance(step, AddTensor) and isinstance(step.value, Values)
        ],
    }


def structure_of(record: Mapping[str, Any]) -> tuple[Step, ...]:
    """Return the steps that :func:`describe_structure` described.

    Raises:
        UsageError: the record is not what bntool writes.
    """
    try:
        added = [
            AddTensor(
                str(entry["name"]),
                Values((), tuple(int(extent) for extent in entry["shape"])),
                dtype=str(entry["dtype"]),
                after="",
            )
            for entry in record["added_parameters"]
        ]
        copying = record.get("copying_modules", ())
        return (*added, *(RemoveModule(str(name), copies=name in copying) for name in record["removed_modules"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the record of the fold in the file is damaged ({error!r})") from error
