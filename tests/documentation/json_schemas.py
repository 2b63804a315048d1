"""Write what all schemas in docs/schema/ share: ``python -m tests.documentation.json_schemas``.

By hand one writes ``$defs.file``, what a document says of a file, and the definitions that it refers to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from bntool import errors, plan
from bntool.reports.report import SCHEMA_VERSION
from tests.places import ROOT

FOLDER = ROOT / "docs" / "schema"
_WIDTH = 120


def list_codes() -> list[str]:
    """The codes of all errors but FileError, which is raised as one of its subclasses only."""
    return list(dict.fromkeys(kind.code for kind in _subclasses(errors.BntoolError) if kind is not errors.FileError))


def _subclasses(kind: type[errors.BntoolError]) -> Iterator[type[errors.BntoolError]]:
    for inner in kind.__subclasses__():
        if inner.__module__ == errors.__name__:
            yield inner
            yield from _subclasses(inner)


def _describe_object(properties: dict[str, Any], *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


def make_shared() -> dict[str, Any]:
    """Definitions by name; a schema has those that it refers to."""
    text = {"type": "string"}
    remedy = {"type": "string", "description": "what to do, where the message does not say it"}
    error = {"code": {"enum": list_codes()}, "message": text, "tensor": text, "remedy": remedy}
    steps = [kind.__name__ for kind in get_args(plan.Step) if kind is not plan.Record]
    return {
        "failure": _describe_object({"file": text, "error": _describe_object(error, optional=("tensor", "remedy"))}),
        "step": {
            "type": "object",
            "description": "one step of the plan, without the numbers",
            "required": ["step"],
            "properties": {"step": {"enum": steps}},
        },
        "skip": _describe_object(
            {"layer": text, "reason": {"type": "string", "description": "see docs/skip-reasons.md"}, "detail": text}
        ),
    }


def write_schema(page: Path) -> str:
    """The schema of a command with what all have in common written anew."""
    found = json.loads(page.read_text())
    failure = {"$ref": "#/$defs/failure"}
    given = found.get("properties", {}).get("files", {}).get("items", {}).get("anyOf", [{"$ref": "#/$defs/file"}])
    entries = [*(entry for entry in given if entry != failure), failure]
    common = {
        "schema_version": {"const": SCHEMA_VERSION},
        "command": {"const": page.stem},
        "files": {"type": "array", "items": {"anyOf": entries}},
    }
    own = {name: value for name, value in found.get("properties", {}).items() if name not in common}
    shared = make_shared()
    definitions = {name: value for name, value in found["$defs"].items() if name not in shared}
    used = json.dumps([entries, definitions])
    definitions |= {name: value for name, value in shared.items() if f'"#/$defs/{name}"' in used}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"bntool {page.stem} --json"}
    document = {**head, **_describe_object({**common, **own}, optional=tuple(own)), "$defs": definitions}
    return _draw(document) + "\n"


def _draw(value: Any, indent: str = "", used: int = 0) -> str:
    """JSON with what fits into a line in one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + used + len(line) < _WIDTH or not isinstance(value, dict | list) or not value:
        return line
    inner = f"{indent}  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _draw(item, inner) for item in value) + f"\n{indent}]"
    items = ((json.dumps(key) + ": ", item) for key, item in value.items())
    return "{\n" + ",\n".join(inner + key + _draw(item, inner, len(key)) for key, item in items) + f"\n{indent}}}"


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.json")):
        path.write_text(write_schema(path))
