"""Selecting layers by their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def selects(globs: Sequence[str], name: str) -> bool:
    """Whether a layer is selected: by any of the globs, or by there being none; a text alone is one glob."""
    globs = (globs,) if isinstance(globs, str) else globs
    return not globs or any(fnmatchcase(name, glob) for glob in globs)
