"""``--model-arg``: arguments of the factory, as text. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from bntool.errors import UsageError


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """Parse ``["width=8"]`` as a mapping.

    Raises:
        UsageError: one is not of the form name=value.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().replace(".", "_").isidentifier():
            raise UsageError(f"--model-arg {text!r} is not of the form NAME=VALUE")
        found[name.strip()] = value
    return found
