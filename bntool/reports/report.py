"""What a command did, as data with a version: the JSON document is this, the table another view of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bntool.errors import BntoolError

if TYPE_CHECKING:
    from bntool.reports.blocks import Block

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class FileReport:
    """What a command found or did with one file.

    Attributes:
        path: the file, as it was given.
        facts: JSON data; floats may be NaN or infinite here, they become null in the document.
        blocks: the same for people.
        error: why nothing was done, or None.
    """

    path: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    blocks: Sequence[Block] = ()
    error: BntoolError | None = None


@dataclass(frozen=True)
class Report:
    """What a command did.

    Attributes:
        command: its name.
        files: one for each file, in the order given.
        run: what several files say together, as JSON data; None for one.
        blocks: the same for people.
    """

    command: str
    files: tuple[FileReport, ...]
    run: Mapping[str, Any] | None = None
    blocks: Sequence[Block] = ()

    def to_document(self) -> dict[str, Any]:
        """The JSON document: ``{"schema_version", "command", "files": [...]}``, and ``"run"`` where there is one."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "files": [_file_document(file) for file in self.files],
            **({} if self.run is None else {"run": self.run}),
        }


def _file_document(file: FileReport) -> dict[str, Any]:
    document: dict[str, Any] = {"file": file.path, **file.facts}
    if file.error is not None:
        document["error"] = describe_error(file.error)
    return document


def describe_error(error: BntoolError) -> dict[str, Any]:
    """An error as JSON data."""
    facts: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.tensor:
        facts["tensor"] = error.tensor
    if error.remedy:
        facts["remedy"] = error.remedy
    return facts


def to_json(document: Mapping[str, Any]) -> str:
    """Valid JSON: numbers that JSON does not have become null."""
    try:
        return json.dumps(document, indent=2, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nonfinite(document), indent=2, allow_nan=False)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return value
