"""The schemas of what commands print with ``--json``, and documents held against them."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import pytest

from tests.places import ROOT

SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "schema").glob("*.json")}


def read_document(text: str, command: str) -> Any:
    """A document that fits the schema of the command; NaN is no JSON."""
    document = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    _find_validator(command).validate(document)
    return document


@functools.cache
def _find_validator(command: str) -> Any:
    """Made once: looking at the schema takes longer than looking at a document."""
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[command])
    return jsonschema.Draft202012Validator(SCHEMAS[command])
