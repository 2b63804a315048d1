"""Matching the names of two state dicts when one model is a part of the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection


def align_names(a: Collection[str], b: Collection[str]) -> tuple[str, str]:
    """Find what each side puts before the names of the other, e.g. ``backbone.``; at least one of the two is "".

    A path is taken only where it brings more names together than no path does, and at least half of the smaller side.
    Names below another path are then left to the side that has them.
    """
    one, two = set(a), set(b)
    common = len(one & two)
    best = ("", "")
    for inner, outer, place in ((one, two, 1), (two, one, 0)):
        path, count = _most_frequent_path(inner, outer)
        if count > common and 2 * count >= min(len(one), len(two)):
            common = count
            best = ("", path) if place else (path, "")
    return best


def _most_frequent_path(inner: set[str], outer: set[str]) -> tuple[str, int]:
    """Return the path that most often stands in ``outer`` before a name of ``inner``."""
    found: Counter[str] = Counter()
    for name in outer:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            rest = ".".join(parts[cut:])
            if rest in inner and rest not in outer:
                found[".".join(parts[:cut]) + "."] += 1
    return max(found.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))
