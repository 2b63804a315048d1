"""Peak resident memory of ``recalibrate``, an eval forward, torch's update_bn and fvcore's update_bn_stats.

The ResNet-50 and the batches of the benchmark ``recalibration``, one thread, each way in a process of its own that
imports the same modules. "nothing" makes the model and the batches and runs none of them. What malloc keeps between
activations differs from run to run; with its threshold fixed (the last column, slower) every large tensor is given back
at once, and what is left is what is alive.
"""

from __future__ import annotations

import os
import statistics
import sys
from unittest import mock

import torch

from tests.benchmarks.measuring import python, run_command

_BATCHES, _SIZE, _PIXELS, _ROUNDS = 3, 16, 128, 5
_NOTHING, _PEER = "nothing", "eval forward"
_WAYS = (_NOTHING, _PEER, "bntool pooled", "bntool exact", "torch update_bn", "fvcore update_bn_stats")
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc


def run() -> None:
    from tests.benchmarks.recalibration import _find_contenders

    ways = [way for way in _WAYS if way == _NOTHING or way in _find_contenders()]
    peaks: dict[str, list[float]] = {way: [] for way in ways}
    alive: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for way in ways:
            peaks[way].append(_measure(way))
    for way in ways:
        alive[way] = _measure(way, **_GIVE_BACK)
    medians = {way: statistics.median(megabytes) for way, megabytes in peaks.items()}
    print(f"{'peak resident memory':24}{'median':>10}{'of rounds':>16}{'ratio':>8}{'alive':>10}{'ratio':>8}")
    for way, megabytes in peaks.items():
        spread = f"{min(megabytes):.0f} to {max(megabytes):.0f}"
        ratio, ratio_alive = medians[way] / medians[_PEER], alive[way] / alive[_PEER]
        print(f"{way:24}{medians[way]:>7.0f} MB{spread:>16}{ratio:>8.2f}{alive[way]:>7.0f} MB{ratio_alive:>8.2f}")
    print(f"ratio: to that of the {_PEER}; {_ROUNDS} rounds")


def _measure(way: str, **environment: str) -> float:
    with mock.patch.dict(os.environ, environment):
        _, megabytes, _ = run_command(python("-m", "tests.benchmarks.calibration_memory", way))
    return megabytes


def _run_alone(way: str) -> None:
    from tests.benchmarks.recalibration import _find_contenders, build_resnet50

    contenders = _find_contenders()
    model = build_resnet50()
    batches = [torch.randn(_SIZE, 3, _PIXELS, _PIXELS) for _ in range(_BATCHES)]
    if way != _NOTHING:
        contenders[way](model, batches)


if __name__ == "__main__":
    _run_alone(sys.argv[1])
