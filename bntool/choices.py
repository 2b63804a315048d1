"""Options of library calls: an enum, or the value of one of its members."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from bntool.errors import UsageError

Choice = TypeVar("Choice", bound=Enum)


def choose(kind: type[Choice], value: Choice | str, *, option: str) -> Choice:
    """Return the member that is meant.

    Args:
        option: what to call it in the error.

    Raises:
        UsageError: there is none of this value.
    """
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(repr(member.value) for member in kind)
        raise UsageError(f"{option} is {value!r}, which is none of {known}") from None
