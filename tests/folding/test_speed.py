"""Measuring speed: both models run in turn, the models are given back."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from bntool.errors import UserCodeError
from bntool.folding.speed import Timing, measure_speed


class Sleepy(nn.Module):
    def __init__(self, seconds: float, log: list[str]) -> None:
        super().__init__()
        self.bn, self.seconds, self.note = nn.BatchNorm1d(3), seconds, log.append

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.note("slow" if self.seconds else "fast")
        assert not self.training
        time.sleep(self.seconds)
        return self.bn(x)


def test_models_run_in_turn_and_are_given_back() -> None:
    log: list[str] = []
    slow, fast = Sleepy(0.005, log).train(), Sleepy(0.0, log)
    speed = measure_speed(slow, fast, torch.randn(2, 3), seconds=0)
    assert log[6:] == ["slow", "fast", "fast", "slow"] * 5
    assert (speed.rounds, speed.shapes, speed.device) == (10, ((2, 3),), "cpu")
    assert speed.wall.before >= 0.005  # it slept
    assert speed.cpu.before < speed.wall.before
    assert slow.training
    assert fast.training
    assert not torch.any(slow.bn.running_mean)


def test_a_model_that_raises() -> None:
    with pytest.raises(UserCodeError):
        measure_speed(nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(2, 3), seconds=0)


def test_differences_within_the_spread_are_noise() -> None:
    assert Timing(1.0, 1.0, ratio=1.05, low=0.9, high=1.2).is_noise
    assert not Timing(1.0, 0.8, ratio=1.25, low=1.1, high=1.3).is_noise
    assert not Timing(0.8, 1.0, ratio=0.8, low=0.7, high=0.9).is_noise
