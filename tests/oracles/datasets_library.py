"""What the library ``datasets`` saved, or reads from an endpoint of the hub: its tests, with the library installed."""

from __future__ import annotations

import subprocess
import sys

from tests.places import ROOT

TESTS = ["tests/data/test_datasets.py", "tests/data/test_datasets_on_hub.py"]
REQUIREMENTS = [
    "torch==2.13.0", "numpy", "Pillow", "datasets>=4", "webdataset>=0.2.100", "pytest>=8", "typer>=0.26,<0.29",
    "rich>=13.9", "Jinja2>=3.1", "safetensors>=0.4",
]  # fmt: skip


def main() -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    print(done.stdout)
    return 1 if done.returncode or "skipped" in done.stdout else 0


if __name__ == "__main__":
    sys.exit(main())
