"""The representation of results, in one line and in notebooks as HTML, and of numbers and lists in sentences.

What draws HTML lies many floors above the results. It is named here when bntool is imported, and imported when a
notebook shows a result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_LONGEST = 60  # characters of one field
_ITEMS = 4
_PATH = 100  # characters of a path, its last ones
_drawers: list[Callable[[Any], str | None]] = []


def draw_html_by(drawer: Callable[[Any], str | None]) -> None:
    """Name what draws results as HTML; it gives None for what it does not know."""
    _drawers[:] = [drawer]


def html_repr(value: Any) -> str | None:
    """Return what a notebook shows of a result, as a ``_repr_html_``; None leaves it to ``repr``."""
    return next((drawer(value) for drawer in _drawers), None)


def format_number(value: float, digits: int = 3) -> str:
    """Format a number in a few significant digits, as short as it stays readable."""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" in text and 1 <= abs(value) < 1e5:  # 660, not 6.6e2
        return f"{value:.0f}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        return f"{mantissa}e{int(exponent)}"
    return text


def list_first(names: Sequence[str], most: int = 3, *, separator: str = ", ") -> str:
    """Join the first names, at most so many, and say how many more there are: ``a, b and 3 more``.

    Args:
        separator: "; " where the names are clauses: ``a; b; and 3 more``.
    """
    more = f"{separator.lstrip(',')}and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def repr_of_change(
    result: object, path: object, *, changed: int, left_alone: int = 0, more: str = "", output: object = None
) -> str:
    """Return the ``repr`` of what was done to a file: in how many layers, and what was written.

    Args:
        more: what else is worth saying, in a few words.
    """
    parts = [f"{changed} BatchNorm layer{'s' * (changed != 1)}"] if changed or not more else []
    parts += [f"{left_alone} left alone"] if left_alone else []
    parts += [more] if more else []
    parts.append(f"wrote {str(output)[-_PATH:]}" if output is not None else "nothing written")
    return f"<{type(result).__name__} of {str(path)[-_PATH:]}: {', '.join(parts)}>"


def short_repr(value: Any) -> str:
    """Return the ``repr`` of a dataclass or named tuple with long fields as a count; for use as ``__repr__``."""
    names = getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value) if field.repr]
    shown = (f"{name}={_shorten(getattr(value, name))}" for name in names)
    return f"{type(value).__name__}({', '.join(shown)})"


def _shorten(value: object) -> str:
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):  # a named tuple is a value like those
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str | bytes):
        if len(value) > _ITEMS:
            return f"<{len(value)} items>"
        if isinstance(value, Mapping):
            return _cut("{" + ", ".join(f"{key!r}: {_shorten(item)}" for key, item in value.items()) + "}")
        inner = ", ".join(map(_shorten, value))
        return _cut(f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})")
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST and "\n" not in text else f"{text[: _LONGEST - 3].splitlines()[0]}..."
