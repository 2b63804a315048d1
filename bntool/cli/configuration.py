"""Finding the configuration of a project; imports nothing."""

from __future__ import annotations

import os
from pathlib import Path

OWN_FILE, SHARED_FILE = "bntool.toml", "pyproject.toml"
_TABLE = "[tool.bntool"


def find_file(folder: Path) -> Path | None:
    """Return the nearest ``bntool.toml``, or ``pyproject.toml`` with a table for bntool, up to the root of a
    repository.
    """
    for place in (folder, *folder.parents):
        own, shared = place / OWN_FILE, place / SHARED_FILE
        if own.is_file():
            return _shorten(own)
        if shared.is_file() and _TABLE in shared.read_text(encoding="utf-8", errors="replace"):
            return _shorten(shared)
        if (place / ".git").exists():
            break
    return None


def _shorten(path: Path) -> Path:
    """Return the path as seen from the current folder."""
    return Path(os.path.relpath(path))
