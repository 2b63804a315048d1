"""What a second rank costs: CPU time of recalibration by one process and by two, with the same batches.

Only the work is counted, not the start of the processes. Each of them measures itself, under ``torchrun``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

_BATCHES, _ROUNDS = 4, 3


def run() -> None:
    ratios: dict[str, list[float]] = {"pooled": [], "exact": []}
    for _ in range(_ROUNDS):
        one, two = _launch(1), _launch(2)
        for method, seconds in ratios.items():
            print(f"{method}: {one[method]:.2f} s by one rank, {two[method]:.2f} s by two together")
            seconds.append(two[method] / one[method])
    for method, values in ratios.items():
        print(f"{method}: two ranks take {statistics.median(values):.2f}x the CPU time of one (median)")


def _launch(ranks: int) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, "-m", "tests.benchmarks.calibration_ranks"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure_share() -> None:
    """One rank: its share of the batches, and the CPU time of all ranks, printed by the first."""
    from bntool.operations.ranks import join_job
    from bntool.operations.recalibration import recalibrate
    from tests.benchmarks.recalibration import build_resnet50

    torch.set_num_threads(1)
    with join_job() as ranks:
        model = build_resnet50()
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(8, 3, 128, 128, generator=generator) for _ in range(_BATCHES)]
        model.eval()(batches[0])
        sums = {}
        for method in ("pooled", "exact"):
            start = time.process_time()
            recalibrate(model, batches[ranks.rank :: ranks.world], method=method)
            spent = torch.tensor(time.process_time() - start, dtype=torch.float64)
            if ranks.world > 1:
                dist.all_reduce(spent)
            sums[method] = float(spent)
        if ranks.rank == 0:
            print(json.dumps(sums))


if __name__ == "__main__":
    _measure_share()
