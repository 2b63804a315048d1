"""The recipe for Ray of docs/recalibration.md, run as it stands there: the bytes of one run without Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = [
    "torch==2.13.0", "numpy", "pandas", "pyarrow", "ray[data]==2.60.0", "safetensors>=0.4", "typer>=0.26,<0.29",
    "rich>=13.9", "Jinja2>=3.1",
]  # fmt: skip
ROOT = Path(__file__).parents[2]
NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
"""
ONE_RUN = """
import bntool, numpy, torch
from net import build

torch.set_num_threads(1)
images = torch.from_numpy(numpy.load("calibration.npz")["images"])
bntool.recalibrate_checkpoint("ckpt.pt", "one.pt", model=build(), data=images.split(32))
"""


def make_inputs(folder: Path) -> None:
    """Network, checkpoint, and 300 images as rows of five Parquet files and as one archive."""
    import numpy as np
    import torch

    (folder / "net.py").write_text(NET)
    namespace: dict[str, object] = {}
    exec(NET, namespace)
    torch.save(namespace["build"]().state_dict(), folder / "ckpt.pt")  # type: ignore[operator]
    images = np.random.default_rng(0).normal(size=(300, 3, 12, 12)).astype("float32")
    np.savez(folder / "calibration.npz", images=images)
    import ray

    rows = ray.data.from_numpy(np.array_split(images, 5)).rename_columns({"data": "image"})
    rows.write_parquet(f"{folder}/rows")


def main() -> int:
    page = (ROOT / "docs" / "recalibration.md").read_text()
    (recipe,) = re.findall(r"```python\n(import .*?ray\..*?)```", page, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for number, program in enumerate((recipe, ONE_RUN)):
            (folder / f"program{number}.py").write_text(program)
            command = [sys.executable, f"program{number}.py"]
            subprocess.run(command, cwd=folder, env=environment, check=True, timeout=300)
        same = (folder / "out.pt").read_bytes() == (folder / "one.pt").read_bytes()
        print(f"four shards on Ray and one run: {'the same bytes' if same else 'DIFFER'}")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
