"""The recipe for Ray Data of docs/recalibration.md, run as it stands there: the bytes of one run without Ray."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.places import ROOT, SAMPLES

REQUIREMENTS = [
    "torch==2.13.0", "numpy", "pandas", "pyarrow", "ray[data]==2.60.0", "safetensors>=0.4", "typer>=0.26,<0.29",
    "rich>=13.9", "Jinja2>=3.1",
]  # fmt: skip


def main() -> int:
    page = (ROOT / "docs" / "recalibration.md").read_text()
    (recipe,) = re.findall(r"```python\n((?:(?!```).)*?import ray\n.*?)```", page, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for sample, wanted in (
            ("drifted.pt", "ckpt.pt"),
            ("digits_net.py", "net.py"),
            ("digits_train.npz", "calibration.npz"),
        ):
            shutil.copy(SAMPLES / sample, folder / wanted)
        (folder / "recipe.py").write_text(recipe)
        one_run = ["-m", "bntool", "recalibrate", "ckpt.pt", "--model", "net.py:build", "-o", "one.pt", "--quiet"]
        one_run += ["--data", str(folder / "calibration.npz")]  # as the recipe names them: the file says of what it was
        for arguments in (["recipe.py"], one_run):
            subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, timeout=540)
        partials = len(list(folder.glob("part-*")))
        same = (folder / "out.pt").read_bytes() == (folder / "one.pt").read_bytes()
        print(f"{partials} partials measured by Ray Data, and one run: {'the same bytes' if same else 'DIFFER'}")
        return 0 if same and partials > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
