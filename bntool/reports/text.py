"""Text for people: numbers in few digits, sizes, and names from files made harmless."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

# categories that can move the cursor, hide or reorder text, or have no glyph: controls, formats (bidi marks, zero
# width), surrogates, private use, unassigned, line and paragraph separators
_UNSHOWN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
MAX_NAME = 300
MAX_SENTENCE = 2000


def sanitize(text: str, *, limit: int | None = MAX_NAME) -> str:
    """Return the text with everything that a terminal could obey written as an escape: backslash, x, two digits.

    Text from a file is data: it never reaches the terminal raw.

    Args:
        limit: characters of the text; what is longer loses its middle, as the ends of names tell them apart, and
            those of sentences say what to do. None for all of them.
    """
    if limit is not None and len(text) > limit:
        half = limit // 2
        return f"{sanitize(text[:half], limit=None)}…{sanitize(text[half - limit :], limit=None)}"
    return text if text.isascii() and text.isprintable() else "".join(map(_show, text))


def _show(character: str) -> str:
    if unicodedata.category(character) not in _UNSHOWN:
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shorten_names(names: Sequence[str], width: int, *, measure: Callable[[str], int] = len) -> list[str] | None:
    """Shorten dotted names, or paths, to so many columns at most, none like another; None where that is not possible.

    What all begin with goes first, then the middle of those that are too long still.

    Args:
        measure: how many columns a text takes.
    """
    if max(map(measure, names), default=0) <= width:
        return list(names)
    separator = "/" if any("/" in name for name in names) else "."
    split = [name.split(separator)[:-1] for name in names]
    shared = sum(len(part) + 1 for part in split[0][: count_shared(split)]) if len(names) > 1 else 0
    if shared > 1:
        names = [f"…{name[shared:]}" for name in names]
    room, different = width - 1, len(set(names))
    for head in sorted(range(1, room), key=lambda head: abs(head - room // 2)):
        cut = [n if measure(n) <= width else _leave_out_middle(n, head, room - head, measure) for n in names]
        if len(set(cut)) == different:
            return cut
    return None


def _leave_out_middle(name: str, head: int, tail: int, measure: Callable[[str], int]) -> str:
    """Return the first and the last characters of a name, in at most so many columns each."""
    start, end = name[:head], name[len(name) - tail :]
    while measure(start) > head:
        start = start[:-1]
    while measure(end) > tail:
        end = end[1:]
    return f"{start}…{end}"


def count_shared(paths: Sequence[Sequence[str]]) -> int:
    """Count the leading parts that all paths share."""
    first, last = min(map(tuple, paths), default=()), max(map(tuple, paths), default=())
    count = 0
    while count < min(len(first), len(last)) and first[count] == last[count]:
        count += 1
    return count


def format_size(size: int) -> str:
    """Format bytes in a unit that keeps the number small, as disk tools do (1 kB = 1000 B)."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.{1 if value < 99.95 else 0}f} {unit}"


def plural(count: int, noun: str, plural_form: str = "") -> str:
    """Count in words: ``1 layer``, ``2 layers``."""
    return f"{count:,} {noun if count == 1 else plural_form or noun + 's'}"
