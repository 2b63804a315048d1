"""Where the tests find files, and where nothing else has to know."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "sample_ckpts"
FIXTURES = ROOT / "tests" / "fixtures"
INTEROP = FIXTURES / "interop"
# larger real files, which not every machine has
SHARED = Path(os.environ.get("BNTOOL_SHARED", ROOT.parent / "shared"))
