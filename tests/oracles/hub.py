"""Addresses of the hub, read through huggingface_hub itself from an endpoint on this machine.

Run by ``make oracles`` in an environment of its own: the tests that the suite skips where the package is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REQUIREMENTS = [
    "torch==2.13.0",
    "huggingface_hub==2.4.0",
    "pytest>=8",
    "numpy",
    "safetensors",
    "typer<0.29",
    "rich",
    "Jinja2",
    "h5py",
    "isal",
]
ROOT = Path(__file__).parents[2]


if __name__ == "__main__":
    import huggingface_hub  # noqa: F401  without it the tests would be skipped

    sys.exit(
        pytest.main([str(ROOT / "tests" / "checkpoints" / "remote" / "test_hub.py"), "-q", "-p", "no:cacheprovider"])
    )
