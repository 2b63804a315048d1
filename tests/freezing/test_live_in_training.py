"""Real training with each switch: exactly the promised tensors change, bit by bit, as `diff --expect` sees it."""

import json

import pytest
import torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.comparison.checkpoint import Change, diff, find_violations
from bntool.comparison.options import Expectation
from bntool.freezing.checkpoint import plan_freeze
from bntool.freezing.live import apply_freeze, freeze
from tests import programs
from tests.fixtures.models.mmdet_resnet import detector
from tests.programs.job_training_frozen import CASES

STEPS = 20
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SWITCHES = {
    "nothing": {},
    "norm_eval": {"norm_eval": True},
    "norm_eval of the backbone": {"norm_eval": True, "layers": ["backbone.*"]},
    "requires_grad": {"norm_eval": False, "requires_grad": False},
    "both": {"norm_eval": True, "requires_grad": False},
    "both and stage 1": {"norm_eval": True, "requires_grad": False, "layers": ["neck.*"], "frozen_stages": 1},
}
EXPECTED = {
    "nothing": set(),
    "norm_eval": {"norm-eval"},
    "norm_eval of the backbone": set(),
    "requires_grad": set(),
    "both": {"norm-eval", "frozen"},
    "both and stage 1": set(),
}


def make_optimizer(name, model):
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(model, optimizer, *, first=0, steps=STEPS):
    for step in range(first, first + steps):
        model.train()  # as training loops do, every time
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 32, 32, generator=generator) + 0.5
        target = torch.randn(4, 7, generator=generator)
        loss = torch.nn.functional.mse_loss(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def promised(model, switches):
    """The tensors that may not change, by name: written down apart from the code under test."""
    kept = set()
    in_layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        and (not switches.get("layers") or name.startswith(switches["layers"][0].removesuffix("*")))
    }
    for name in in_layers:
        if switches.get("norm_eval"):
            kept |= {f"{name}.{role}" for role in STATISTICS}
        if switches.get("requires_grad") is False:
            kept |= {f"{name}.weight", f"{name}.bias"}
    if "frozen_stages" in switches:
        kept |= {
            key
            for key in model.state_dict()
            if key.startswith(("backbone.conv1.", "backbone.bn1.", "backbone.layer1."))
        }
    return kept


def changed_tensors(before, after):
    with open_checkpoint(before) as a, open_checkpoint(after) as b:
        comparison = diff(a, b)
    changed = {name for name, change in comparison.others.items() if change is not Change.SAME}
    for layer in comparison.layers:
        changed |= {f"{layer.name}.{role}" for role, change in layer.changes.items() if change is not Change.SAME}
    met = {e.value for e in Expectation if not find_violations(comparison, e)}
    return changed, met


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_exactly_the_promised_tensors_change(optimizer, switch, tmp_path):
    torch.manual_seed(0)
    model = detector()
    model(torch.randn(8, 3, 32, 32)).sum().backward()  # statistics that are not initial, and stale gradients
    torch.save(model.state_dict(), tmp_path / "before.pt")
    if SWITCHES[switch]:
        freeze(model, **SWITCHES[switch])
    train(model, make_optimizer(optimizer, model))
    torch.save(model.state_dict(), tmp_path / "after.pt")
    changed, met = changed_tensors(tmp_path / "before.pt", tmp_path / "after.pt")
    assert changed == set(model.state_dict()) - promised(model, SWITCHES[switch])
    assert met == EXPECTED[switch]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("way", ["state_dict and apply_freeze", "whole module"])
def test_after_save_reload_and_resume(optimizer, way, tmp_path):
    """Ten steps, save, reload in another model, ten more: as twenty in one go, and the frozen tensors as at first."""
    torch.manual_seed(0)
    start = detector()
    start(torch.randn(8, 3, 32, 32))
    torch.save(start.state_dict(), tmp_path / "before.pt")
    with open_checkpoint(tmp_path / "before.pt") as checkpoint:
        planned = plan_freeze(checkpoint, requires_grad=False, layers=["neck.*", "reg_head.*"], frozen_stages=1)
        save_checkpoint(apply_plan(checkpoint, planned.plan), tmp_path / "frozen.pt")

    straight = detector()
    straight.load_state_dict(torch.load(tmp_path / "frozen.pt"), strict=True)
    apply_freeze(straight, tmp_path / "frozen.pt")
    train(straight, make_optimizer(optimizer, straight))

    model = detector()
    model.load_state_dict(torch.load(tmp_path / "frozen.pt"), strict=True)
    apply_freeze(model, tmp_path / "frozen.pt")
    first = make_optimizer(optimizer, model)
    train(model, first, steps=10)
    whole = way == "whole module"
    torch.save({"model": model if whole else model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "mid.pt")
    content = torch.load(tmp_path / "mid.pt", weights_only=False)
    if whole:
        resumed = content["model"]
    else:
        resumed = detector()
        resumed.load_state_dict(content["model"], strict=True)
        apply_freeze(resumed, tmp_path / "frozen.pt")
    second = make_optimizer(optimizer, resumed)
    second.load_state_dict(content["optimizer"])
    train(resumed, second, first=10, steps=10)
    torch.save(resumed.state_dict(), tmp_path / "after.pt")

    assert all(torch.equal(value, straight.state_dict()[key]) for key, value in resumed.state_dict().items())
    changed, _ = changed_tensors(tmp_path / "before.pt", tmp_path / "after.pt")
    kept = {
        key
        for key in resumed.state_dict()
        if key.startswith(("backbone.conv1.", "backbone.bn1.", "backbone.layer1.", "neck.1.", "reg_head.1."))
    }
    assert changed == set(resumed.state_dict()) - kept


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_under_ddp_on_two_ranks(tmp_path):
    """Two processes, gloo, no network: each rank has other images; what is frozen is as at first on both."""
    programs.run_ranks("job_training_frozen", tmp_path)
    for case in CASES:
        results = [tmp_path / f"{case}-{rank}.pt" for rank in range(2)]
        with open_checkpoint(results[0]) as a, open_checkpoint(results[1]) as b:
            assert diff(a, b).identical, case
        changed, met = changed_tensors(tmp_path / "before.pt", results[0])
        assert met == ({"norm-eval", "frozen"} if "both" in case else {"norm-eval"}), case
        assert "cls_head.weight" in changed
    report = json.loads((tmp_path / "refused.json").read_text())
    assert "freeze first" in report["message"]
    assert report["synchronises"], "a SyncBatchNorm that asks nobody proves nothing here"
