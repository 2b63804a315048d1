"""Recalibrating files: what they lack, what they were before, and what is said of their statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bntool
from bntool.cli.main import main
from bntool.errors import RefusedError
from bntool.folding.checkpoint import fold_checkpoint
from bntool.recalibration.checkpoint import recalibrate_checkpoint
from tests.programs import copy_user_code
from tests.programs.user_code import small_net


def build():
    torch.manual_seed(0)
    return small_net.build()


@pytest.fixture
def net(tmp_path):
    return f"{copy_user_code('small_net', tmp_path)}:build"


@pytest.fixture
def images():
    return torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(3)) * 2 + 1


def train_statistics(model, x):
    """What eval mode needs, layer by layer, by PyTorch alone."""
    model = copy.deepcopy(model).double().eval()
    x = x.double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.training = None, True
            module.reset_running_stats()
            module(x)
            module.training = False
        x = module(x).detach()
    return {name: t for name, t in model.state_dict().items() if "running" in name}


@pytest.mark.parametrize("kind", ["parameters", "tensors", "half", "partly", "safetensors"])
def test_a_file_without_statistics_is_given_them(kind, net, images, tmp_path):
    model = build()
    expected = train_statistics(model, images)
    tensors = (
        dict(model.named_parameters()) if kind == "parameters" else {n: p.data for n, p in model.named_parameters()}
    )
    if kind == "half":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if kind == "partly":
        tensors |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("4.")}
    path, out = tmp_path / "n.ckpt", tmp_path / "o.ckpt"
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    result = recalibrate_checkpoint(path, out, model=net, data=[images], method="exact")
    stored = load_file(out) if kind == "safetensors" else torch.load(out, weights_only=True)
    assert list(stored) == list(model.state_dict()) or kind in ("safetensors", "partly")
    build().load_state_dict(stored)
    tolerance = 2e-2 if kind == "half" else 1e-4
    for name, tensor in expected.items():
        torch.testing.assert_close(stored[name].double(), tensor, atol=tolerance, rtol=tolerance)
        assert stored[name].dtype is (torch.bfloat16 if kind == "half" else torch.float32)
        assert type(stored[name]) is torch.Tensor
    assert stored["1.num_batches_tracked"].dtype is torch.int64
    assert result.lacking == (("1",) if kind == "partly" else ("1", "4"))
    assert any("the file holds no statistics of" in warning for warning in result.warnings)
    assert all(
        torch.equal(stored[name], tensor.data)
        for name, tensor in tensors.items()
        if not name.startswith(("4.r", "4.n"))
    )


def test_what_is_not_selected_stays_missing_and_is_named(net, images, tmp_path):
    path, out = tmp_path / "n.pt", tmp_path / "o.pt"
    torch.save({name: p.data for name, p in build().named_parameters()}, path)
    result = recalibrate_checkpoint(path, out, model=net, data=[images], layers=["1"])
    assert "1.running_mean" in torch.load(out, weights_only=True)
    assert "4.running_mean" not in torch.load(out, weights_only=True)
    assert "the output does not hold those of 4 either" in result.warnings


@pytest.mark.parametrize("prior", [0, 100, 20000])
def test_the_verdict_is_about_data_and_stored_statistics(prior, net, images, tmp_path, capsys):
    model = build()
    model.load_state_dict({**model.state_dict(), **{n: t.float() for n, t in train_statistics(model, images).items()}})
    torch.save(model.state_dict(), tmp_path / "t.pt")
    torch.save(images * 0.7, tmp_path / "x.pt")
    options = ["--model", net, "--data", str(tmp_path / "x.pt"), "--prior", str(prior), "--dry-run"]
    assert main(["recalibrate", str(tmp_path / "t.pt"), *options]) == 0
    said = capsys.readouterr().out
    assert "within sampling error" not in said
    assert "its variance by a factor of 0.49" in said


def test_a_shift_beyond_sampling_error_is_not_called_that(net, images, tmp_path, capsys):
    model = build()
    state = {**model.state_dict(), **{n: t.float() for n, t in train_statistics(model, images).items()}}
    torch.save(images.repeat(4, 1, 1, 1), tmp_path / "x.pt")
    state["4.running_mean"] += 0.09 * state["4.running_var"].sqrt()
    torch.save(state, tmp_path / "t.pt")
    command = ["recalibrate", str(tmp_path / "t.pt"), "--model", net, "--data", str(tmp_path / "x.pt"), "--dry-run"]
    assert main([*command, "--batch-size", str(len(images))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "to 0.1 σ and a factor of 1.25, which is more than sampling error: 4 is off by 0.09 σ" in said
    assert main([*command, "--batch-size", str(4 * len(images))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "One batch does not tell how much of that is sampling error." in said


def test_the_layer_that_is_furthest_off_is_named(net, images, tmp_path, capsys):
    model = build()
    state = {**model.state_dict(), **{n: t.float() for n, t in train_statistics(model, images).items()}}
    torch.save(images, tmp_path / "x.pt")
    state["1.running_mean"] += 0.01 * state["1.running_var"].sqrt()
    state["1.running_var"][::2] *= 1.35
    state["1.running_var"][1::2] /= 1.35
    state["4.running_mean"] += state["4.running_var"].sqrt()
    torch.save(state, tmp_path / "t.pt")
    options = ["--model", net, "--data", str(tmp_path / "x.pt"), "--method", "exact", "--dry-run"]
    assert main(["recalibrate", str(tmp_path / "t.pt"), *options]) == 0
    said = capsys.readouterr().out
    assert "1 is off by 0.01 σ, its variances by factors of 0.741 to 1.35" in said
    assert "Furthest from it: 4 is off by 1 σ" in said


def test_diff_says_the_same_of_the_same_change(net, images, tmp_path):
    model, path, out = build(), tmp_path / "t.pt", tmp_path / "o.pt"
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    torch.save(model.state_dict(), path)
    result = recalibrate_checkpoint(path, out, model=net, data=[images])
    compared = {layer.name: layer.statistics for layer in bntool.diff(path, out).layers}
    for drift in result.recalibration.drifts:
        for name in ("mean_shift", "worst_mean_shift", "variance_ratio", "variance_spread"):
            assert getattr(compared[drift.layer], name) == pytest.approx(getattr(drift, name), rel=1e-5)


def test_a_folded_file_is_told_apart(net, images, tmp_path):
    path, folded = tmp_path / "t.pt", tmp_path / "f.pt"
    torch.save(build().state_dict(), path)
    fold_checkpoint(path, folded, model=net, input_shape=(2, 3, 9, 9))
    with pytest.raises(RefusedError, match=r"2 BatchNorms were folded away.*give --export with that fold"):
        fold_checkpoint(folded, tmp_path / "g.pt", model=net, input_shape=(2, 3, 9, 9))
    with pytest.raises(RefusedError, match="2 BatchNorms were folded away"):
        recalibrate_checkpoint(folded, model=net, data=[images])


def test_a_dead_channel_becomes_what_torch_makes_of_it(net, images, tmp_path, capsys):
    model = build()
    with torch.no_grad():
        model[0].weight[2] = 1e-30
    path, out = tmp_path / "t.pt", tmp_path / "o.pt"
    torch.save(model.state_dict(), path)
    torch.save(images, tmp_path / "x.pt")
    options = ["--model", net, "--data", str(tmp_path / "x.pt")]
    assert main(["recalibrate", str(path), *options, "--dry-run"]) == 0
    assert main(["recalibrate", str(path), *options, "-o", str(out)]) == 0
    reference = copy.deepcopy(model).train()
    reference[1].momentum = None
    reference(images)
    assert reference[1].running_var[2] == 0
    assert torch.load(out, weights_only=True)["1.running_var"][2] == 0


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_names_of_a_file_are_those_that_inspect_shows(wrapped, images, tmp_path, net):
    state = {wrapped + name: tensor for name, tensor in small_net.Holds().state_dict().items()}
    path, out = tmp_path / "t.pt", tmp_path / "o.pt"
    torch.save(state, path)
    holds = net.replace(":build", ":Holds")
    result = recalibrate_checkpoint(path, out, model=holds, data=[images], layers=["4"])
    assert result.recalibration.plan.layers == ("4",)
    changed = [name for name, t in torch.load(out, weights_only=True).items() if not torch.equal(t, state[name])]
    assert changed == [f"{wrapped}model.4.{role}" for role in ("running_mean", "running_var", "num_batches_tracked")]
    folds = fold_checkpoint(path, tmp_path / "f.pt", model=holds, input_shape=(2, 3, 9, 9), layers=["1"])
    assert [fold.layer for fold in folds.plan.folds] == ["1"]
    loaded = bntool.load_folded(small_net.Holds(), tmp_path / "f.pt")
    assert isinstance(loaded.model[1], nn.Identity)
