"""The same as exported_programs.py, with another torch."""

from __future__ import annotations

import sys

from tests.oracles.exported_programs import main

REQUIREMENTS = ["torch==2.7.1", "numpy==1.26.4"]

if __name__ == "__main__":
    sys.exit(main())
