"""What a second rank costs: CPU time of recalibration by one process and by two, with the same batches.

Only the work is counted, not the start of the processes: each rank warms up (the first forward makes the kernels) and
then measures itself, under ``torchrun``. Two processes at once slow each other down, by caches and memory, whatever
they run: "side by side" is two processes that each do half the batches and know nothing of each other. What two ranks
take beyond that is the price of working together.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from tests.places import ROOT

_BATCHES, _SIZE, _ROUNDS = 24, 8, 3
_METHODS = ("pooled", "exact")


def run() -> None:
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(_ROUNDS):
        rounds.append({"one": _add_up([_start(1, of=1)]), "two": _add_up([_start(2, of=1)])})
        rounds[-1]["side by side"] = _add_up([_start(1, of=2), _start(1, of=2)])
    for method in _METHODS:
        for way in ("one", "two", "side by side"):
            print(f"{method}, {way:14}{' '.join(f'{times[way][method]:6.2f}' for times in rounds)} s of CPU")
        for way, peer in (("two", "one"), ("side by side", "one"), ("two", "side by side")):
            ratio = statistics.median(times[way][method] / times[peer][method] for times in rounds)
            print(f"{method}: {way} / {peer}: {ratio:.2f}x (median of rounds)")


def _start(ranks: int, *, of: int) -> subprocess.Popen[str]:
    """Start a job that does one share of ``of``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.benchmarks.calibration_ranks", str(_BATCHES // of)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _add_up(jobs: list[subprocess.Popen[str]]) -> dict[str, float]:
    printed = [job.communicate()[0] for job in jobs]
    if any(job.returncode for job in jobs):
        raise RuntimeError("a job failed")
    times = [json.loads(text.splitlines()[-1]) for text in printed]
    return {method: sum(job[method] for job in times) for method in _METHODS}


def _measure_share(count: int) -> None:
    """One rank: its share of the batches, and the CPU time of all ranks, printed by the first."""
    from bntool.recalibration.live import recalibrate
    from bntool.recalibration.ranks import join_job
    from tests.benchmarks.recalibration import build_resnet50

    with join_job() as ranks:
        model = build_resnet50()
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(_SIZE, 3, 128, 128, generator=generator) for _ in range(count)]
        recalibrate(model, batches[:1])
        sums = {}
        for method in _METHODS:
            start = time.process_time()
            recalibrate(model, batches[ranks.rank :: ranks.world], method=method)
            spent = torch.tensor(time.process_time() - start, dtype=torch.float64)
            if ranks.world > 1:
                dist.all_reduce(spent)
            sums[method] = float(spent)
        if ranks.rank == 0:
            print(json.dumps(sums))


if __name__ == "__main__":
    _measure_share(int(sys.argv[1]))
