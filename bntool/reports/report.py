"""The report of a command, as data with a version: the JSON document is this, the table another view of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quote
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from bntool.errors import BntoolError

if TYPE_CHECKING:
    from bntool.reports.blocks import Block

SCHEMA_VERSION = 1
_NEWLINE = "\n"


class FileReport(NamedTuple):
    """The result of a command for one file.

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
        """Encode the facts as text, which takes a tenth of the memory."""
        return self._replace(facts={}, encoded=_encode_file(self))


class Report(NamedTuple):
    """The result of a command.

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
        """Return the JSON document: ``{"schema_version", "command", "files": [...]}``, and ``"run"`` where there is
        one.

        Numbers that JSON does not have become null.
        """
        return "".join(self.iterate_json())

    def iterate_json(self) -> Iterator[str]:
        """Yield the JSON in pieces, one for each file: of many files the whole would take several times its memory."""
        yield f'{{\n  "schema_version": {SCHEMA_VERSION},\n  "command": {_quote(self.command)},\n  "files": ['
        for index, file in enumerate(self.files):
            yield f"{',' if index else ''}\n    {file.encoded or _encode_file(file)}"
        yield "\n  ]" if self.files else "]"
        if self.run is not None:
            yield f',\n  "run": {_encode(self.run, _NEWLINE + "  ")}'
        yield "\n}"


def _encode_file(file: FileReport) -> str:
    document: dict[str, Any] = {"file": file.path, **file.facts}
    if file.error is not None:
        document["error"] = describe_error(file.error)
    return _encode(document, "\n    ")


def describe_error(error: BntoolError) -> dict[str, Any]:
    """Return an error as JSON data."""
    facts: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.tensor:
        facts["tensor"] = error.tensor
    if error.remedy:
        facts["remedy"] = error.remedy
    return facts


def _encode(value: Any, line: str) -> str:
    """Return JSON as json.dumps writes it with two columns of indent, in a third of its time.

    Args:
        line: a newline and the indent at which the value stands.

    Raises:
        TypeError: it has something that is no JSON data.
    """
    encode = _ENCODERS.get(type(value))
    if encode is not None:
        return encode(value)
    inner = line + "  "
    if type(value) is dict or isinstance(value, Mapping):
        items = [
            f"{_quote(key)}: {encode(item) if (encode := _ENCODERS.get(type(item))) else _encode(item, inner)}"
            for key, item in value.items()
        ]
        return _bracket("{", items, "}", line=line)
    if isinstance(value, list | tuple):
        texts = [encode(item) if (encode := _ENCODERS.get(type(item))) else _encode(item, inner) for item in value]
        return _bracket("[", texts, "]", line=line)
    if isinstance(value, float):
        return _encode_float(value)
    return _quote(value) if isinstance(value, str) else json.dumps(value)


def _encode_float(value: float) -> str:
    return float.__repr__(value) if math.isfinite(value) else "null"


# of what has no items, by its class: nearly all of a document
_ENCODERS: dict[type, Callable[[Any], str]] = {
    str: _quote,
    int: repr,
    float: _encode_float,
    bool: lambda value: "true" if value else "false",
    type(None): lambda _: "null",
}


def _bracket(opening: str, items: Sequence[str], closing: str, *, line: str) -> str:
    return f"{opening}{line}  {f',{line}  '.join(items)}{line}{closing}" if items else opening + closing
