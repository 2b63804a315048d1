"""Expanding globs that no shell has expanded: in quotes, or on Windows, where shells leave that to programs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path


def match_glob(text: str) -> list[str] | None:
    """Return the files that a glob names, sorted; None for a text that is no glob, or the name of a file."""
    if re.search(r"[*?[]", text) is None or os.path.lexists(text):
        return None
    import glob  # most names are none

    return sorted(glob.glob(text))  # noqa: PTH207 a path of any kind


def expand_globs(places: Iterable[os.PathLike[str]]) -> list[os.PathLike[str]]:
    """Return the places with the files that globs among them name; a glob that names none stays, and is no file."""
    expanded: list[os.PathLike[str]] = []
    for place in places:
        found = match_glob(str(place)) if isinstance(place, Path) else None
        expanded += map(Path, found) if found else [place]
    return expanded
