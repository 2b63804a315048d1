"""Zip archives as other software writes them, and as attackers do."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path


def rezip(
    path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None] = lambda n, d: (n, d), *, deflate: bool = False
) -> bytes:
    """The archive written again by Python's zipfile, with records renamed, changed or left out."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for info in source.infolist():
            changed = change(info.filename, source.read(info))
            if changed is not None:
                target.writestr(changed[0], changed[1])
    return buffer.getvalue()
