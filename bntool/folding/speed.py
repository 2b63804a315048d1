"""Measuring how much faster a folded model is than the original: both run in turn on the same input, so that noise hits
both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from bntool.data.batches import find_placement
from bntool.modules.borrowing import borrow
from bntool.modules.calling import call, tensors_in

_WARM_UP, _LEAST, _MOST = 3, 10, 300  # rounds
_SECONDS = 6.0  # for all rounds after the least

_Clocks: TypeAlias = tuple[float, float]  # wall and CPU seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward by one clock, original and folded model beside each other.

    Attributes:
        before: of the original, the median over all rounds.
        after: of the folded model.
        ratio: median over rounds of before / after: above 1 the folded model is faster.
        low, high: quartiles of the same.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether rounds differ by more than the models do."""
        return self.low <= 1 <= self.high


@dataclass(frozen=True)
class Speed:
    """A folded model beside its original, as torch runs them in eval mode.

    Attributes:
        shapes: of the input.
        device: where they ran.
        threads: of torch on the CPU.
        rounds: how often each ran.
        wall: by the clock on the wall.
        cpu: CPU time of all threads, which other programs on the machine disturb less.
    """

    shapes: tuple[tuple[int, ...], ...]
    device: str
    threads: int
    rounds: int
    wall: Timing
    cpu: Timing


def measure_speed(model: nn.Module, folded: nn.Module, inputs: Any, *, seconds: float = _SECONDS) -> Speed:
    """Run two models in turn, who is first alternating, and compare them round by round.

    Args:
        model, folded: given back as they were.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        seconds: for how long, beyond the ten rounds that are always run.

    Raises:
        UserCodeError: one raised.
    """
    device, _ = find_placement(model)
    kind = "cpu" if device is None else str(device)
    found: list[tuple[_Clocks, _Clocks]] = []
    with borrow(model), borrow(folded), torch.no_grad():
        for each in (model, folded):
            each.eval()
            for _ in range(_WARM_UP):
                call(each, inputs)
        start = time.perf_counter()
        while len(found) < _LEAST or (len(found) < _MOST and time.perf_counter() - start < seconds):
            first, second = (model, folded) if len(found) % 2 == 0 else (folded, model)
            one, other = _time(first, inputs, kind), _time(second, inputs, kind)
            found.append((one, other) if first is model else (other, one))
    return Speed(
        shapes=tuple(tuple(tensor.shape) for tensor in tensors_in(inputs)),
        device=kind,
        threads=torch.get_num_threads(),
        rounds=len(found),
        wall=_summarise([(before[0], after[0]) for before, after in found]),
        cpu=_summarise([(before[1], after[1]) for before, after in found]),
    )


def _time(model: nn.Module, inputs: Any, device: str) -> _Clocks:
    _finish(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call(model, inputs)
    _finish(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _finish(device: str) -> None:
    """Wait for a GPU, which works on after a call has returned."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _summarise(pairs: Sequence[tuple[float, float]]) -> Timing:
    low, ratio, high = statistics.quantiles((before / max(after, 1e-9) for before, after in pairs), n=4)
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Timing(before, after, ratio=ratio, low=low, high=high)
