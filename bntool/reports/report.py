"""What a command did, as data with a version: the JSON document is this, the table another view of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quote
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from bntool.errors import BntoolError

if TYPE_CHECKING:
    from bntool.reports.blocks import Block

SCHEMA_VERSION = 1


class FileReport(NamedTuple):
    """What a command found or did with one file.

    Attributes:
        path: the file, as it was given.
        facts: JSON data; floats may be NaN or infinite here, they become null in the document.
        blocks: the same for people.
        error: why nothing was done, or None.
        encoded: the entry of the JSON document, where the facts are not kept.
    """

    path: str
    facts: Mapping[str, Any] = MappingProxyType({})
    blocks: Sequence[Block] = ()
    error: BntoolError | None = None
    encoded: str = ""

    def encode(self) -> FileReport:
        """The same with its facts as text, which takes a tenth of the memory."""
        return self._replace(facts={}, encoded=_encode_file(self))


class Report(NamedTuple):
    """What a command did.

    Attributes:
        command: its name.
        files: one for each file, in the order given.
        run: what several files say together, as JSON data; None for one.
        blocks: the same for people.
        fail_on: the least severity of findings that fail a gate.
    """

    command: str
    files: tuple[FileReport, ...]
    run: Mapping[str, Any] | None = None
    blocks: Sequence[Block] = ()
    fail_on: str = "error"

    def to_json(self) -> str:
        """The JSON document: ``{"schema_version", "command", "files": [...]}``, and ``"run"`` where there is one.

        Numbers that JSON does not have become null.
        """
        entries = {
            "schema_version": str(SCHEMA_VERSION),
            "command": _quote(self.command),
            "files": _bracket("[", [file.encoded or _encode_file(file) for file in self.files], "]", line="\n  "),
        }
        if self.run is not None:
            entries["run"] = _encode(self.run, "\n  ")
        return _bracket("{", [f"{_quote(key)}: {text}" for key, text in entries.items()], "}", line="\n")


def _encode_file(file: FileReport) -> str:
    document: dict[str, Any] = {"file": file.path, **file.facts}
    if file.error is not None:
        document["error"] = describe_error(file.error)
    return _encode(document, "\n    ")


def describe_error(error: BntoolError) -> dict[str, Any]:
    """An error as JSON data."""
    facts: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.tensor:
        facts["tensor"] = error.tensor
    if error.remedy:
        facts["remedy"] = error.remedy
    return facts


def _encode(value: Any, line: str) -> str:
    """JSON as json.dumps writes it with two columns of indent, in a third of its time.

    Args:
        line: a newline and the indent at which the value stands.

    Raises:
        TypeError: it has something that is no JSON data.
    """
    if isinstance(value, float):
        return float.__repr__(value) if math.isfinite(value) else "null"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, Mapping):
        items = [f"{_quote(key)}: {_encode(item, line + '  ')}" for key, item in value.items()]
        return _bracket("{", items, "}", line=line)
    if isinstance(value, list | tuple):
        return _bracket("[", [_encode(item, line + "  ") for item in value], "]", line=line)
    return repr(value) if type(value) is int else json.dumps(value)


def _bracket(opening: str, items: Sequence[str], closing: str, *, line: str) -> str:
    return f"{opening}{line}  {f',{line}  '.join(items)}{line}{closing}" if items else opening + closing
