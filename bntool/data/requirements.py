"""What ``--data`` needs, apart from the code that needs torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bntool.errors import MissingExtraError


def check_data(spec: str) -> None:
    """Find out before torch is imported, which takes seconds, whether the package is there that a spec needs.

    Raises:
        MissingExtraError: it is not.
    """
    if Path(spec).is_dir() and importlib.util.find_spec("PIL") is None:
        raise MissingExtraError("images need Pillow: pip install 'bntool[images]' (No module named 'PIL')")
