"""``recalibrate --method exact --memory``: CPU time and memory beside an eval forward and ``exact`` with all it wants.

A ResNet-50, 96 images of 128x128 in 12 batches, one thread; each way in a process of its own, interleaved. Memory is
the peak beyond that of a process that makes the model and the batches and runs nothing; bounded memory is given a third
of what ``exact`` takes. What the forecast says before it starts is printed beside what it took.
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tests.benchmarks.measuring import python

_BATCHES, _SIZE, _PIXELS, _ROUNDS = 12, 8, 128, 5
_NOTHING, _PEER, _EXACT, _BOUNDED = "nothing", "eval forward", "exact", "exact, bounded"


@dataclass(frozen=True)
class Spent:
    """What one way took, in a process of its own.

    Attributes:
        cpu, wall: seconds of the work alone.
        peak: resident memory, in bytes.
        statistics: SHA-256 of all running statistics.
        forecast: what was said before it started.
    """

    cpu: float
    wall: float
    peak: int
    statistics: str
    forecast: str


def run() -> None:
    floor = statistics.median(_measure(_NOTHING).peak for _ in range(3))
    third = int(statistics.median(_measure(_EXACT).peak - floor for _ in range(3)) / 3)
    rounds = [{way: _measure(way, third) for way in (_PEER, _EXACT, _BOUNDED)} for _ in range(_ROUNDS)]
    print(f"{'':16}{'CPU best':>10}{'median':>10}{'of forward, rounds':>32}{'memory beyond model and data':>40}")
    for way in (_PEER, _EXACT, _BOUNDED):
        seconds = [found[way].cpu for found in rounds]
        ratios = sorted(found[way].cpu / found[_PEER].cpu for found in rounds)
        peaks = sorted((found[way].peak - floor) / 1e6 for found in rounds)
        middle = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        memory = f"{statistics.median(peaks):.0f} MB ({peaks[0]:.0f} to {peaks[-1]:.0f})"
        print(f"{way:16}{min(seconds):>8.2f} s{statistics.median(seconds):>8.2f} s{middle:>32}{memory:>40}")
    print(f"{_BOUNDED} was given {third / 1e6:.0f} MB, a third of what exact took")
    for found in rounds:
        took = f"{found[_BOUNDED].wall:.1f} s and {(found[_BOUNDED].peak - floor) / 1e6:.0f} MB"
        print(f"it took {took}; forecast: {found[_BOUNDED].forecast}")
    same = all(found[_EXACT].statistics == found[_BOUNDED].statistics for found in rounds)
    print(f"statistics of both: {'the same bits' if same else 'DIFFER'}")


def _measure(way: str, memory: int = 0) -> Spent:
    command = python("-m", "tests.benchmarks.calibration_bounded", way, str(memory))
    return Spent(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _run_alone(way: str, memory: int) -> Spent:
    from bntool.recalibration.live import recalibrate
    from tests.benchmarks.recalibration import build_resnet50

    torch.set_num_threads(1)
    model = build_resnet50()
    batches = [torch.randn(_SIZE, 3, _PIXELS, _PIXELS) for _ in range(_BATCHES)]
    said: list[str] = []
    ways: dict[str, Callable[[], object]] = {
        _NOTHING: lambda: None,
        _PEER: lambda: _forward(model, batches),
        _EXACT: lambda: recalibrate(model, batches, method="exact"),
        _BOUNDED: lambda: recalibrate(model, batches, method="exact", memory=memory, on_forecast=said.append),
    }
    cpu, wall = time.process_time(), time.perf_counter()
    ways[way]()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "running" in name:
            digest.update(tensor.numpy().tobytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Spent(cpu, wall, peak, digest.hexdigest(), " ".join(said))


def _forward(model: nn.Module, batches: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)


if __name__ == "__main__":
    print(json.dumps(vars(_run_alone(sys.argv[1], int(sys.argv[2])))))
