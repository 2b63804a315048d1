"""Counters of BatchNorms beside those of real optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bntool
from bntool.inspection.findings import Finding, FindingCode, Severity


def train(
    path: Path, *, steps: int = 30, forwards: int = 1, checkpointing: bool = False, **changes: Any
) -> list[Finding]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    optimizer = changes.get("optimizer", torch.optim.AdamW)(net.parameters())
    for step in range(steps):
        net.train(step >= changes.get("in_eval_mode", 0))
        for _ in range(forwards):
            x = torch.randn(8, 3, 8, 8, requires_grad=True)
            y = checkpoint(net, x, use_reentrant=False) if checkpointing else net(x)
            (y.square().mean() / forwards).backward()
        optimizer.step()
        optimizer.zero_grad()
    net[1].num_batches_tracked += changes.get("before", 0)
    state = optimizer.state_dict()
    if changes.get("in_list"):
        state = [state]
    said = changes.get("said", {})
    torch.save({"state_dict": net.state_dict(), changes.get("key", "optimizer"): state, **said}, path / "c.pt")
    return list(bntool.inspect(path / "c.pt").state_dicts[0].findings)


@pytest.mark.parametrize("key", ["optimizer", "optimizer_states", "opt"])
def test_checkpointing_counts_twice(key: str, tmp_path: Path) -> None:
    (finding,) = train(tmp_path, checkpointing=True, key=key, in_list=key == "optimizer_states")
    assert (finding.code, finding.severity) == (FindingCode.COUNTER_AGAINST_STEPS, Severity.NOTICE)
    assert finding.facts == {"num_batches_tracked": 60, "steps": 30}
    assert "two forwards for each" in finding.message
    assert finding.layers == ("1",)


def test_accumulated_gradients(tmp_path: Path) -> None:
    (finding,) = train(tmp_path, forwards=4)
    assert "4 forwards for each" in finding.message


@pytest.mark.parametrize("before", [0, 17, 100_001])
def test_a_training_of_one_forward_a_step_has_none(before: int, tmp_path: Path) -> None:
    """Also where it goes on from a pretrained model, whose counter it has."""
    assert train(tmp_path, before=before) == []


def test_sgd_counts_no_steps(tmp_path: Path) -> None:
    assert train(tmp_path, checkpointing=True, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)) == []


def test_statistics_that_did_not_move_in_all_steps(tmp_path: Path) -> None:
    (finding,) = train(tmp_path, in_eval_mode=5)
    assert (finding.code, finding.severity) == (FindingCode.COUNTER_AGAINST_STEPS, Severity.NOTICE)
    assert "fewer than the 30 steps" in finding.message


def test_advice_for_checkpointing_gives_the_statistics_of_one_forward(tmp_path: Path) -> None:
    once, twice = nn.BatchNorm1d(4, momentum=0.1), nn.BatchNorm1d(4, momentum=1 - 0.9**0.5)
    for _ in range(20):
        x = torch.randn(16, 4) * 3 + 1
        once(x), twice(x), twice(x)
    torch.testing.assert_close(once.running_var, twice.running_var)
    torch.testing.assert_close(once.running_mean, twice.running_mean)


@pytest.mark.parametrize("said", [{"global_step": 30, "epoch": 1}, {"iteration": 30}, {"meta": {"iter": 30}}])
def test_steps_that_only_the_file_counts(said: dict[str, Any], tmp_path: Path) -> None:
    (finding,) = train(tmp_path, optimizer=lambda p: torch.optim.SGD(p, 0.01), checkpointing=True, said=said)
    assert finding.facts == {"num_batches_tracked": 60, "steps": 30}
    assert "30: two forwards for each" in finding.message
    assert train(tmp_path, optimizer=lambda p: torch.optim.SGD(p, 0.01), said=said) == []
    file = torch.load(tmp_path / "c.pt")
    file["state_dict"]["1.num_batches_tracked"] *= 2
    del file["optimizer"]
    torch.save(file, tmp_path / "c.pt")
    assert [one.code for one in bntool.inspect(tmp_path / "c.pt").state_dicts[0].findings] == [finding.code]
    halved = {key: {"iter": 60} if key == "meta" else 60 for key in said}
    assert train(tmp_path, optimizer=lambda p: torch.optim.SGD(p, 0.01), said=halved) == []
