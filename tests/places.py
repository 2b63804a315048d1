"""Where the tests find files, and where nothing else has to know."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "sample_ckpts"
FIXTURES = ROOT / "tests" / "fixtures"
INTEROP = FIXTURES / "interop"
# larger real files, which not every machine has
SHARED = Path(os.environ.get("BNTOOL_SHARED", ROOT.parent / "shared"))


def copy_samples(folder: Path) -> Path:
    """A copy of the sample checkpoints, to be written to."""
    return Path(shutil.copytree(SAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__")))
