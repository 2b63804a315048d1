"""``torchrun --max-restarts 1 -m bntool recalibrate --resume``, of which one rank is killed: the bytes of one process.

What the ranks do when they are started again is in the suite; here torchrun itself sees that one is gone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.places import ROOT

REQUIREMENTS = ["torch==2.13.0", "numpy", "safetensors>=0.4", "typer>=0.26,<0.29", "rich>=13.9", "Jinja2>=3.1"]


def main() -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = ["-m", "bntool", "recalibrate", "in.pt", "--model", "killed_rank.py:Counted"]
    command += ["--model-arg", "num_features=2", "--data", "killed_rank.py:batches"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment,
                check=True,
                timeout=300,
                stdout=subprocess.PIPE,
                text=True,
            )

        shutil.copy(ROOT / "tests" / "programs" / "user_code" / "killed_rank.py", folder)
        run("-c", "import torch; torch.save(torch.nn.BatchNorm1d(2).state_dict(), 'in.pt')")
        kept = ["--resume", "kept.safetensors", "--resume-every", "0", "-o", "several.pt"]
        done = run(*torchrun, *command, *kept)
        once = (folder / "killed").exists() and done.stdout.count("wrote several.pt") == 1
        left = sorted(path.name for path in folder.glob("kept*"))
        run(*command, "-o", "one.pt")
        same = (folder / "several.pt").read_bytes() == (folder / "one.pt").read_bytes()
        print(f"two ranks, one of them killed and started again: {'the same bytes' if same else 'DIFFER'}")
        return 0 if once and same and not left else 1


if __name__ == "__main__":
    sys.exit(main())
