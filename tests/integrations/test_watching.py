"""What the hooks share, in a plain loop; each framework has tests of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bntool
from bntool.errors import UsageError
from bntool.integrations.freezing import FreezingHook
from bntool.integrations.watching import WatchingHook
from tests import programs


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))


def train(model: nn.Module, watch: WatchingHook, *, steps: int, spoil_at: int = 0) -> int:
    """How many steps were made before the hook stopped it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        model.train()
        loss = model(torch.randn(8, 3) * (math.inf if step == spoil_at else 1.0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch.must_stop(watch.watch(model, step)):
            return step
    return steps


def test_a_healthy_run_goes_on_and_has_numbers() -> None:
    model, watch = make_net(), WatchingHook(every=15)
    assert train(model, watch, steps=50) == 50
    assert watch.last is not None
    assert watch.last.step == 45
    assert watch.last.describe() == "BatchNorm after 45 steps: healthy"
    metrics, variances = watch.last.metrics, [model[at].running_var for at in (1, 4)]
    assert metrics["batchnorm/sick"] == metrics["batchnorm/suspicious"] == metrics["batchnorm/nonfinite"] == 0
    assert 0 < metrics["batchnorm/moved"] < 10
    watch.watch(model, 60)
    assert watch.last.metrics["batchnorm/largest_variance"] == max(v.max().item() for v in variances)
    assert watch.last.metrics["batchnorm/smallest_variance"] == min(v.min().item() for v in variances)


def test_a_sick_layer_stops_the_run_at_the_next_look_and_is_named() -> None:
    watch = WatchingHook(every=10)
    assert train(make_net(), watch, steps=100, spoil_at=33) == 40
    assert watch.last is not None
    assert "2 layers sick: 1, 4: NaN or infinite" in watch.last.describe()
    assert watch.last.metrics["batchnorm/sick"] == 2
    assert watch.last.metrics["batchnorm/nonfinite"] == 16
    assert all(map(math.isfinite, watch.last.metrics.values()))


def test_it_is_judged_as_inspect_judges() -> None:
    model, watch = make_net(), WatchingHook(every=1)
    train(model, watch, steps=3)
    assert watch.last is not None
    assert watch.last.summary.verdict == bntool.inspect(model).verdict
    assert watch.last.metrics["batchnorm/suspicious"] == 2  # few updates


def test_variances_that_explode_between_two_looks_are_a_jump() -> None:
    model, watch = make_net(), WatchingHook(every=30)
    train(model, watch, steps=60)
    with torch.no_grad():
        model[1].running_var *= 1e6
    look = watch.watch(model, 90)
    assert look is not None
    assert [found.finding.code.value for found in look.summary.findings] == ["statistics-jumped"]
    assert look.metrics["batchnorm/suspicious"] == 1


def test_a_run_that_is_not_to_be_stopped_is_not() -> None:
    watch = WatchingHook(every=10, stop=False, each_layer=True, layers="4")
    assert train(make_net(), watch, steps=40, spoil_at=33) == 40
    assert watch.last is not None
    assert watch.last.is_sick
    assert watch.last.metrics["batchnorm/sick"] == 1
    assert watch.last.metrics["batchnorm/4/nonfinite"] == 8


def test_a_sick_layer_on_one_rank_stops_all(tmp_path) -> None:
    programs.run_ranks("job_watched", tmp_path)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said == ["10 suspicious True", "10 sick True"]


def test_looking_changes_nothing() -> None:
    model = make_net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    WatchingHook(every=1).watch(model, 1)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert bntool.diff(before, model).identical


def test_a_freeze_by_the_base_holds_through_a_loop(tmp_path) -> None:
    model = make_net()
    torch.save(model.state_dict(), tmp_path / "before.pt")
    FreezingHook(requires_grad=False).freeze(model)
    train(model, WatchingHook(every=10), steps=20)
    torch.save(model.state_dict(), tmp_path / "after.pt")
    comparison = bntool.diff(tmp_path / "before.pt", tmp_path / "after.pt", expect="frozen")
    assert not comparison.violations
    assert not comparison.identical


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1, "layers": "absent"}])
def test_what_cannot_be_is_refused(options) -> None:
    with pytest.raises(UsageError):
        WatchingHook(**options).watch(make_net(), 1)
