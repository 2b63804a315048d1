"""Layers whose tensors are pickled, or named, as old versions and other frameworks do; what is not known is said."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn.parameter import Parameter

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.creation import NewFormat
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import StoredTensor
from bntool.cli.main import main
from bntool.errors import UnknownFormatError
from bntool.plan import Operation, Plan, SetTensor, Values
from tests.checkpoints.samples import assert_holds, to_torch

REDUCTIONS: dict[str, Any] = {
    "Parameter(tensor)": lambda self, protocol: (Parameter, (self.data,)),
    "Parameter(tensor, False)": lambda self, protocol: (Parameter, (self.data, False)),
    "with state": lambda self, protocol: (Parameter, (self.data,), (False, False, {})),
}


@pytest.mark.parametrize("name", ["Parameter(tensor)", "Parameter(tensor, False)", "with state"])
@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_of_old_versions_are_read_and_kept(
    name: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6))
    monkeypatch.setattr(Parameter, "__reduce_ex__", REDUCTIONS[name])
    torch.save(model, tmp_path / "old.pt", _use_new_zipfile_serialization=not legacy)
    monkeypatch.undo()
    loaded = torch.load(tmp_path / "old.pt", weights_only=False)
    with open_checkpoint(tmp_path / "old.pt") as checkpoint:
        state_dict = checkpoint.state_dict("")
        assert_holds(checkpoint, loaded.state_dict())
        for key, parameter in loaded.named_parameters():
            stored = state_dict.tensors[key]
            assert isinstance(stored, StoredTensor)
            assert stored.is_parameter
            assert stored.requires_grad is parameter.requires_grad
        (layer,) = find_batchnorms(state_dict)
        steps = (SetTensor(f"{layer.name}.weight", Values((2.0,) * 6, (6,))),)
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, state_dict="", steps=steps)), tmp_path / "new.pt")
    again = torch.load(tmp_path / "new.pt", weights_only=False)
    assert torch.equal(again[1].weight.data, torch.full((6,), 2.0))
    assert torch.equal(again[0].weight.data, loaded[0].weight.data)


def test_convert_keeps_parameters_of_old_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6))
    monkeypatch.setattr(Parameter, "__reduce_ex__", REDUCTIONS["Parameter(tensor)"])
    torch.save(model, tmp_path / "old.pt")
    monkeypatch.undo()
    target = tmp_path / "new.safetensors"
    assert main(["convert", str(tmp_path / "old.pt"), "--to", NewFormat.SAFETENSORS.value, "-o", str(target)]) == 0
    found = safetensors.torch.load_file(target)
    assert found.keys() == model.state_dict().keys()


def paddle_state() -> dict[str, Any]:
    return {
        "bn.weight": np.arange(1, 5, dtype="f"),
        "bn.bias": np.zeros(4, "f"),
        "bn._mean": np.arange(4, dtype="f"),
        "bn._variance": np.arange(2, 6, dtype="f"),
        "conv.weight": np.ones((4, 3, 3, 3), "f"),
    }


class PaddleTensor:
    """A tensor as paddle.save pickles it outside of a state dict: a pair of its name and its array."""

    def __init__(self, name: str, array: Any) -> None:
        self.pair = (name, array)

    def __reduce__(self) -> Any:
        return tuple, (self.pair,)


@pytest.mark.parametrize("as_pairs", [False, True])
def test_batchnorms_of_paddle_are_read_and_written(as_pairs: bool, tmp_path: Path) -> None:
    state = paddle_state()
    written = {name: PaddleTensor(name, array) for name, array in state.items()} if as_pairs else state
    names = {key: f"batch_norm2d_0.w_{number}" for number, key in enumerate(state)}
    path = tmp_path / "model.pdparams"
    path.write_bytes(pickle.dumps({**written, "StructuredToParameterName@@": names}, 4))
    with open_checkpoint(path) as checkpoint:
        (layer,) = find_batchnorms(checkpoint.state_dict(""))
        assert layer.name == "bn"
        assert torch.equal(to_torch(layer.tensors["running_mean"]), torch.arange(4.0))
        assert torch.equal(to_torch(layer.tensors["running_var"]), torch.arange(2.0, 6.0))
        assert not checkpoint.not_understood
        steps = (SetTensor("bn.running_mean", Values((5.0,) * 4, (4,))),)
        plan = Plan(Operation.RECALIBRATE, state_dict="", steps=steps)
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.pdparams")
    loaded = pickle.loads((tmp_path / "new.pdparams").read_bytes())
    mean = loaded["bn._mean"][1] if as_pairs else loaded["bn._mean"]
    assert np.array_equal(mean, np.full(4, 5, "f"))
    assert loaded["StructuredToParameterName@@"] == names


@pytest.mark.parametrize("layer", ["batch_norm_0", "batch_norm2d_12", "stem/batch_norm_1", "sync_batch_norm_3"])
def test_batchnorms_of_programs_of_paddle_are_read_and_written(layer: str, tmp_path: Path) -> None:
    """Named after the operator and counted, as ``StructuredToParameterName@@`` has them for models."""
    state = dict(zip(("w_0", "b_0", "w_1", "w_2"), paddle_state().values(), strict=False))
    path = tmp_path / "model.pdparams"
    kept = {"fc_0.w_0": np.ones((4, 4), "f"), "fc_0.b_0": np.ones(4, "f")}
    path.write_bytes(pickle.dumps({**kept, **{f"{layer}.{name}": array for name, array in state.items()}}, 4))
    with open_checkpoint(path) as checkpoint:
        (found,) = find_batchnorms(checkpoint.state_dict(""))
        assert found.name == layer
        assert torch.equal(to_torch(found.tensors["running_mean"]), torch.arange(4.0))
        assert torch.equal(to_torch(found.tensors["running_var"]), torch.arange(2.0, 6.0))
        assert not checkpoint.not_understood
        steps = (SetTensor(f"{layer}.running_mean", Values((5.0,) * 4, (4,))),)
        plan = Plan(Operation.RECALIBRATE, state_dict="", steps=steps)
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.pdparams")
    loaded = pickle.loads((tmp_path / "new.pdparams").read_bytes())
    assert np.array_equal(loaded.pop(f"{layer}.w_1"), np.full(4, 5, "f"))
    assert loaded.keys() == {*kept, *(f"{layer}.{name}" for name in state if name != "w_1")}


def test_tensors_that_paddle_cut_into_parts_are_said(tmp_path: Path) -> None:
    path = tmp_path / "model.pdparams"
    path.write_bytes(pickle.dumps({"fc.w": np.ones(3, "f"), "UnpackBigParamInfor@@": {}}, 4))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.not_understood


UNKNOWN: dict[str, list[str]] = {
    "moving": ["bn.gamma", "bn.beta", "bn.moving_mean", "bn.moving_variance"],
    "with slashes": ["net/bn/gamma", "net/bn/moving_mean", "net/bn/moving_variance"],
    "flax": ["params.bn.scale", "params.bn.bias", "batch_stats.bn.mean", "batch_stats.bn.var"],
    "bare": ["bn.weight", "bn.bias", "bn.mean", "bn.var"],
    "standard deviations": ["bn.weight", "bn.running_mean", "bn.running_inv_std"],
    "population": ["bn.scale", "bn.pop_mean", "bn.pop_var"],
    "torch7": ["bn.weight", "bn.runningMean", "bn.runningVar"],
    "darknet": ["bn.scales", "bn.rolling_mean", "bn.rolling_variance"],
    "neon": ["bn.gamma", "bn.gmean", "bn.gvar"],
    "cntk": ["bn.scale", "bn.aggregateMean", "bn.aggregateVariance"],
    "lasagne": ["bn.gamma", "bn.beta", "bn.mean", "bn.inv_std"],
    "caffe2": ["bn.s", "bn.b", "bn.rm", "bn.riv"],
    "behind": ["bn.weight", "bn.mean_ema", "bn.var_ema"],
    "underscores": ["layer1_0_bn1_weight", "layer1_0_bn1_running_mean", "layer1_0_bn1_running_var"],
    "torch's with slashes": ["layer1/bn1/weight", "layer1/bn1/running_mean", "layer1/bn1/running_var"],
    "two underscores": ["net.bn1__gamma", "net.bn1__moving_mean", "net.bn1__moving_variance"],
    "paddle before 2": ["bn1_scale", "bn1_offset", "bn1_mean", "bn1_variance"],
    "paddle in torch": ["bn.weight", "bn._mean", "bn._variance"],
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("as_numpy", [False, True])
def test_statistics_under_names_that_are_not_known_are_said(
    name: str, as_numpy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if as_numpy and name == "paddle in torch":
        pytest.skip("known in a pickle of numpy arrays")
    path = tmp_path / ("model.pkl" if as_numpy else "model.pt")
    if as_numpy:
        path.write_bytes(pickle.dumps({key: np.ones(4, "f") for key in UNKNOWN[name]}))
    else:
        torch.save({key: torch.ones(4) for key in UNKNOWN[name]}, path)
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.not_understood) == 1
    assert main(["inspect", str(path), "--fail-on", "error"]) == 1
    shown = capsys.readouterr().out
    assert "no BatchNorm layer was found" not in shown
    assert "not judged" in shown


@pytest.mark.parametrize(
    "names",
    [
        ["normalizer.mean", "normalizer.std", "fc.weight"],
        ["pixel_mean", "pixel_std", "fc.weight"],
        ["pixel_mean", "pixel_variance", "fc.weight"],
        ["pixel_mean", "pixel_variance", "pixel_scale", "fc.weight"],
        ["lstm_0.w_0", "lstm_0.b_0", "lstm_0.w_1", "lstm_0.w_2"],
        ["input.mean", "input.var", "fc.weight"],
        ["head.mean.weight", "head.var.weight"],
        ["0.weight", "0.bias", "0.running_mean", "0.running_var"],
        ["scaler.scale", "scaler.mean", "scaler.std"],
        ["head.mu", "head.sigma", "head.weight"],
        ["obs_running_mean", "obs_running_var", "fc.weight"],
        [
            "bn1.weight",
            "bn1.running_mean",
            "bn1.running_var",
            "ema_bn1_weight",
            "ema_bn1_running_mean",
            "ema_bn1_running_var",
        ],
        ["renorm.weight", "renorm.running_mean", "renorm.running_std"],
    ],
)
def test_what_is_known_or_none_of_a_layer_is_not_doubted(names: list[str], tmp_path: Path) -> None:
    torch.save({key: torch.ones(4) for key in names}, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert not checkpoint.not_understood


class Opaque:
    """Something in the place of a tensor."""


def test_a_statistic_that_is_no_tensor_is_said(tmp_path: Path) -> None:
    torch.save({"bn.weight": torch.ones(4), "bn.running_mean": Opaque(), "bn.running_var": Opaque()}, tmp_path / "a.pt")
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    model[0]._buffers["running_mean"] = Opaque()  # type: ignore[assignment]
    torch.save(model, tmp_path / "b.pt")
    for name, count in (("a.pt", 2), ("b.pt", 1)):
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert len(checkpoint.not_understood) == count
        assert main(["inspect", str(tmp_path / name), "--fail-on", "error"]) == 1
        assert (
            main(["convert", str(tmp_path / name), "--to", "safetensors", "-o", str(tmp_path / "o.safetensors")]) == 4
        )
        assert not (tmp_path / "o.safetensors").exists()


def test_what_is_not_understood_is_among_the_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a.weight", "a.bias", "a.running_mean", "a.running_var", "c.weight", "b.gamma", "b.mean", "b.var"]
    torch.save(
        {key: torch.ones(3, 3, 1, 1) if key == "c.weight" else torch.ones(3) for key in names}, tmp_path / "m.pt"
    )
    path, out = str(tmp_path / "m.pt"), str(tmp_path / "out.pt")
    for command in (
        ["freeze"],
        ["fold", "--pair", "c=a", "--eps", "1e-5"],
        ["convert", "--to", "frozen-batchnorm", "--eps", "1"],
    ):
        run = [command[0], path, "-o", out, "--force", *command[1:]]
        assert main([*run, "--strict"]) == 4
        assert "b (not recognised)" in capsys.readouterr().err
        assert main([*run, "--layers", "a"]) == 0
        assert "not recognised" not in capsys.readouterr().out
        assert main(run) == 0
        assert "not recognised" in capsys.readouterr().out
    assert main(["convert", path, "--to", "safetensors", "-o", str(tmp_path / "m.safetensors")]) == 0  # nothing is lost


def test_a_conversion_from_paddle_loses_no_statistics_and_says_what_it_assumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {**paddle_state(), "fc.weight": np.ones((4, 4), "f")}
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps(state))
    command = ["convert", str(tmp_path / "m.pdparams"), "--to", "torch", "-o", str(tmp_path / "o.pt")]
    assert main([*command, "--strict"]) == 4
    assert "Linear" in capsys.readouterr().err
    assert main(command) == 0
    shown = "".join(capsys.readouterr())
    assert "_mean" not in shown
    assert "_variance" not in shown
    assert "fc.weight is not of a Linear" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("key", "value", "protocol"),
    [
        (b"bn.running_mean", torch.ones(4), 2),
        (b"bn.running_mean", torch.ones(4), 5),
        ("bn.running_mean", [1.0, 2.0], 2),
        ("bn.running_mean", (1.0, 2.0), 2),
    ],
)
def test_statistics_in_no_form_of_tensors_are_said(key: object, value: object, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"net": {key: value}}, path, pickle_protocol=protocol)
    with open_checkpoint(path) as checkpoint:
        assert [one.name for one in checkpoint.not_understood] == ["net.bn.running_mean"]
    assert main(["inspect", str(path), "--fail-on", "error"]) == 1


def test_tensors_that_pickle_wrote_are_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(torch.nn.BatchNorm2d(4).state_dict()))
    with pytest.raises(UnknownFormatError, match=r"written by pickle, .* not by torch\.save"):
        open_checkpoint(path)
