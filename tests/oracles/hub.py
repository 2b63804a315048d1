"""Addresses of the hub, read through huggingface_hub itself from an endpoint on this machine.

Run by ``make oracles`` in an environment of its own: the tests that the suite skips where the package is missing.
"""

from __future__ import annotations

import sys

import pytest

from tests.places import ROOT

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


if __name__ == "__main__":
    import huggingface_hub  # noqa: F401  without it the tests would be skipped

    sys.exit(
        pytest.main([str(ROOT / "tests" / "checkpoints" / "remote" / "test_hub.py"), "-q", "-p", "no:cacheprovider"])
    )
