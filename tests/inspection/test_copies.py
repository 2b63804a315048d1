"""Averaged copies beside their model, made by torch's own averaging."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bntool
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.verdict import Health


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
    )


def batches(count: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 3, 7, 7) * 2 + 1 for _ in range(count)]


def train(model: nn.Sequential, average: AveragedModel, steps: int, *, every: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step, x in enumerate(batches(steps), start=1):
        optimizer.zero_grad()
        (model(x).mean((2, 3)) - x.mean((2, 3)).sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        if step % every == 0:
            average.update_parameters(model)


# what is trained once, no test changes


@functools.cache
def train_model() -> nn.Sequential:
    model = build()
    train(model, AveragedModel(model), 60)
    return model


@functools.cache
def train_with_average(decay: float) -> tuple[nn.Sequential, AveragedModel]:
    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    train(model, average, 150)
    return model, average


@functools.cache
def train_with_early_buffers() -> tuple[nn.Sequential, AveragedModel, nn.Sequential]:
    """A model, its average with buffers that were copied long before, and the model at that time."""
    model = build()
    train(model, AveragedModel(model), 40)
    early = copy.deepcopy(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, average, 60)
    average.module.load_state_dict(dict(early.named_buffers()), strict=False)
    return model, average, early


def found(source: object, path: Path, **options: object) -> list[Finding]:
    torch.save(source, path / "c.pt")
    return [f for s in bntool.inspect(path / "c.pt", **options).state_dicts for f in s.findings]


def lay_flat(model: nn.Module, average: nn.Module, prefixes: tuple[str, str]) -> dict[str, torch.Tensor]:
    return {
        prefix + name: tensor
        for prefix, module in zip(prefixes, (model, average), strict=True)
        for name, tensor in module.state_dict().items()
    }


FLAT = [("net.", "ema."), ("net.", "ema.module."), ("student.", "teacher."), ("", "ema_model.")]


@pytest.mark.parametrize("prefixes", FLAT, ids="-".join)
def test_an_average_without_buffers_in_one_flat_dict(prefixes: tuple[str, str], tmp_path: Path) -> None:
    model, average = train_model(), build()
    (finding,) = found(lay_flat(model, average, prefixes), tmp_path)
    assert (finding.code, finding.severity) == (FindingCode.EMA_STATISTICS_INITIAL, Severity.ERROR)
    assert finding.layers == (f"{prefixes[1]}1", f"{prefixes[1]}4")


@pytest.mark.parametrize("chosen", [None, "model_ema"])
def test_the_error_is_the_same_where_the_average_is_chosen(chosen: str | None, tmp_path: Path) -> None:
    model, average = train_model(), build()
    both = {"model": model.state_dict(), "model_ema": average.state_dict()}
    (finding,) = found(both, tmp_path, state_dict=chosen)
    assert finding.code is FindingCode.EMA_STATISTICS_INITIAL
    assert finding.layers == ("1", "4")


@pytest.mark.parametrize("prefixes", [None, *FLAT], ids=str)
def test_buffers_of_one_copy_that_the_other_lacks(prefixes: tuple[str, str] | None, tmp_path: Path) -> None:
    model = train_model()
    shadow = dict(model.named_parameters())
    if prefixes is None:
        source: object = {"model": model.state_dict(), "ema": shadow}
    else:
        parts = zip(prefixes, (model.state_dict(), shadow), strict=True)
        source = {prefix + name: tensor for prefix, part in parts for name, tensor in part.items()}
    (missing,) = found(source, tmp_path)
    prefix = "" if prefixes is None else prefixes[1]
    assert (missing.code, missing.severity) == (FindingCode.STATISTICS_MISSING, Severity.WARNING)
    assert missing.layers == (f"{prefix}1", f"{prefix}4")


@pytest.mark.parametrize("key", ["best", "ema"])
def test_buffers_that_another_state_dict_has(key: str, tmp_path: Path) -> None:
    model = train_model()
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    (missing,) = found({"model": model.state_dict(), key: parameters}, tmp_path)
    assert missing.layers == ("1", "4")
    assert "those of state dict 'model' have" in missing.message


@pytest.mark.parametrize("prefixes", [None, *FLAT], ids=str)
@pytest.mark.parametrize("decay", [0.9, 0.95])
def test_an_average_that_follows_its_model_has_no_findings(
    prefixes: tuple[str, str] | None, decay: float, tmp_path: Path
) -> None:
    model, average = train_with_average(decay)
    source = {"model": model.state_dict(), "ema": average.module.state_dict()}
    assert found(source if prefixes is None else lay_flat(model, average.module, prefixes), tmp_path) == []


@pytest.mark.parametrize("prefixes", [None, *FLAT], ids=str)
def test_an_average_whose_buffers_were_copied_long_before(prefixes: tuple[str, str] | None, tmp_path: Path) -> None:
    model, average, early = train_with_early_buffers()
    source = {"model": model.state_dict(), "ema": average.module.state_dict()}
    path = tmp_path / "c.pt"
    torch.save(source if prefixes is None else lay_flat(model, average.module, prefixes), path)
    inspection = bntool.inspect(path)
    (finding,) = [f for s in inspection.state_dicts for f in s.findings]
    assert not any(layer.findings for s in inspection.state_dicts for layer in s.layers)
    assert (finding.code, finding.severity) == (FindingCode.COUNTER_DISAGREES, Severity.NOTICE)
    assert finding.facts is not None
    assert (finding.facts["counter"], finding.facts["usual"]) == (40, 100)
    shifts = [
        ((old.running_mean - new.running_mean).square() / (new.running_var + new.eps)).mean().sqrt().item()
        for old, new in ((early[at], model[at]) for at in (1, 4))
    ]
    assert finding.facts["mean_shift"] in [pytest.approx(shift, rel=0.2) for shift in shifts]


def test_an_average_that_is_mostly_its_initial_values(tmp_path: Path) -> None:
    """The statistics of the first model, mean 0 and variance 1, have a share of 0.99 ** 100 = 0.37 in it."""
    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    average.n_averaged.fill_(1)  # else the first update copies the model
    train(model, average, 100)
    (finding,) = found({"model": model.state_dict(), "ema": average.module.state_dict()}, tmp_path)
    assert (finding.code, finding.severity) == (FindingCode.EMA_STATISTICS_LAG, Severity.WARNING)
    assert finding.facts is not None
    assert finding.facts["initial_share"] == pytest.approx(0.99**100, rel=0.25)
    assert "still the initial 0 and 1" in finding.message


def test_an_average_beside_its_model_with_the_statistics_of_that(tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model)
    train(model, average, 150, every=30)
    (finding,) = found({"model": model.state_dict(), "swa": average.state_dict()}, tmp_path)
    assert (finding.code, finding.severity) == (FindingCode.AVERAGE_NOT_RECOMPUTED, Severity.WARNING)
    assert "averaged 5 times" in finding.message
    update_bn(batches(40), average)
    assert found({"model": model.state_dict(), "swa": average.state_dict()}, tmp_path) == []


def test_an_average_alone_is_not_judged_where_nothing_tells(tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model)
    train(model, average, 150, every=30)
    (finding,) = found(average.state_dict(), tmp_path)
    assert (finding.code, finding.severity) == (FindingCode.AVERAGE_NOT_RECOMPUTED, Severity.NOTICE)
    verdict = bntool.inspect(tmp_path / "c.pt").verdict
    assert verdict.health is Health.NOT_JUDGED
    assert verdict.sentence == "not judged: whether the statistics of this average were recomputed"


def test_an_average_made_at_each_step_whose_statistics_were_recomputed(tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, average, 150)
    assert [f.code for f in found(average.state_dict(), tmp_path)] == [FindingCode.AVERAGE_NOT_RECOMPUTED]
    update_bn(batches(40), average)
    assert found(average.state_dict(), tmp_path) == []


def test_an_average_that_bntool_recalibrated_is_judged(tmp_path: Path) -> None:
    average = AveragedModel(build())
    train(build(), average, 150, every=30)
    torch.save(average.state_dict(), tmp_path / "c.pt")
    bntool.recalibrate_checkpoint(tmp_path / "c.pt", tmp_path / "r.pt", model=build(), data=batches(40))
    assert bntool.inspect(tmp_path / "r.pt").verdict.health is Health.HEALTHY


@pytest.mark.parametrize("flat", [False, True])
def test_an_average_whose_norms_are_those_of_the_model_is_not_called_healthy(flat: bool, tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model)
    for x in batches(40):
        model(x)
        with torch.no_grad():
            model[3].weight += 0.01 * torch.randn_like(model[3].weight)
        average.update_parameters(model)
    source = (
        lay_flat(model, average, ("model.", "swa."))
        if flat
        else {"model": model.state_dict(), "swa": average.state_dict()}
    )
    (finding,) = found(source, tmp_path)
    assert (finding.code, finding.severity) == (FindingCode.AVERAGE_NOT_RECOMPUTED, Severity.NOTICE)
    assert "averaged 40 times" in finding.message
    assert bntool.inspect(tmp_path / "c.pt").verdict.health is Health.NOT_JUDGED


def register_as_mmcv(model: nn.Module, average: nn.Module, *, buffers: bool) -> dict[str, torch.Tensor]:
    """As EMAHook of mmcv 1.7 does: ``self.param_ema_buffer[name] = f"ema_{name.replace('.', '_')}"``."""
    kept = average.state_dict() if buffers else dict(average.named_parameters())
    own = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    return own | {f"ema_backbone_{name}".replace(".", "_"): tensor.detach() for name, tensor in kept.items()}


@pytest.mark.parametrize("exchanged", [False, True])
def test_an_average_that_lies_in_buffers_of_the_model(exchanged: bool, tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    average.n_averaged.fill_(1)
    initial = copy.deepcopy(model)
    train(model, average, 60)
    layers = ("backbone.1", "backbone.4") if exchanged else ("ema_backbone_1", "ema_backbone_4")
    for copied, code in [
        (initial, FindingCode.EMA_STATISTICS_INITIAL),
        (average.module, FindingCode.EMA_STATISTICS_LAG),
    ]:
        pair = (copied, model) if exchanged else (model, copied)
        (finding,) = found(register_as_mmcv(*pair, buffers=True), tmp_path)
        assert (finding.code, finding.layers) == (code, layers)
    assert not found(register_as_mmcv(model, model, buffers=True), tmp_path)
    assert len(bntool.inspect(tmp_path / "c.pt").state_dicts[0].layers) == 4


def test_one_set_of_statistics_for_two_sets_of_weights(tmp_path: Path) -> None:
    model = build()
    average = copy.deepcopy(model)
    train(model, AveragedModel(model), 60)
    (finding,) = found(register_as_mmcv(model, average, buffers=False), tmp_path)
    assert finding.code is FindingCode.AVERAGE_NOT_RECOMPUTED
    assert bntool.inspect(tmp_path / "c.pt").verdict.health is Health.NOT_JUDGED
    assert not found(register_as_mmcv(model, model, buffers=False), tmp_path)
    assert bntool.inspect(tmp_path / "c.pt").verdict.health is Health.HEALTHY


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_without_statistics_is_held_against_its_average(flat: bool, tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model, use_buffers=True)
    train(model, average, 60)
    parts = {"net": dict(model.named_parameters()), "ema": average.module.state_dict()}
    file = {f"{part}.{n}": t.detach() for part, own in parts.items() for n, t in own.items()} if flat else parts
    (finding,) = found(file, tmp_path)
    assert (finding.code, finding.severity) == (FindingCode.STATISTICS_MISSING, Severity.WARNING)
    assert "ema" in finding.message
    assert finding.layers == (("net.1", "net.4") if flat else ("1", "4"))


def test_an_average_that_a_callback_of_lightning_keeps(tmp_path: Path) -> None:
    model = build()
    average = AveragedModel(model)
    train(model, average, 60, every=20)
    kept = {"n_averaged": 3, "average_model_state": average.module.state_dict()}
    file = {"state_dict": model.state_dict(), "callbacks": {"StochasticWeightAveraging": kept}}
    (finding,) = found(file, tmp_path)
    assert finding.code is FindingCode.AVERAGE_NOT_RECOMPUTED
