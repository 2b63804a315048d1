"""The callbacks of bntool in Lightning, MMEngine, ultralytics and transformers themselves.

Run by ``make oracles`` in an environment of its own: the tests that the suite skips where a framework is missing.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile

from tests.places import ROOT

REQUIREMENTS = [
    "torch==2.13.0",
    "torchvision==0.28.0",
    "lightning==2.6.6",
    "mmengine==0.10.7",
    "ultralytics==8.4.190",
    "transformers==5.24.0",
    "accelerate==1.15.0",
    "Pillow",
    "pytest>=8",
    "safetensors",
    "typer<0.29",
    "rich",
    "Jinja2",
    "isal",
]
FRAMEWORKS = ("lightning", "mmengine", "ultralytics", "transformers")


def main() -> int:
    """Run the tests of each framework in a process of its own: importing one changes the others."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in FRAMEWORKS:
            importlib.import_module(name)  # else its tests would be skipped
            tests = str(ROOT / "tests" / "integrations" / f"test_{name}.py")
            environment = {**os.environ, "YOLO_CONFIG_DIR": folder, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", tests]
            if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all callbacks hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
