"""Averages of checkpoints; the oracles are torch's AveragedModel, and BatchNorms that saw all the data themselves."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import bntool
from bntool.cli.main import main
from bntool.errors import RefusedError, UnreadableFileError, UsageError
from tests.places import INTEROP, SAMPLES

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def build() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))


@pytest.fixture
def models() -> list[nn.Sequential]:
    torch.manual_seed(0)
    models = [build() for _ in range(3)]
    for number, model in enumerate(models, start=1):
        for _ in range(number):
            model(torch.randn(8, 3, 6, 6) * number + number)
    return models


def save(models: list[nn.Module], folder: Path) -> list[Path]:
    paths = [folder / f"{number}.pt" for number in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        torch.save(model.state_dict(), path)
    return paths


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def test_parameters_are_those_of_torchs_averaged_model(models: list[nn.Sequential], tmp_path: Path) -> None:
    paths = save(models, tmp_path)
    averaged = AveragedModel(copy.deepcopy(models[0]).double())
    for model in models:
        averaged.update_parameters(copy.deepcopy(model).double())
    result = bntool.average_checkpoints(paths, tmp_path / "out.pt")
    written = load(tmp_path / "out.pt")
    for name, parameter in averaged.module.named_parameters():
        # AveragedModel divides once for each model: the last bit may differ
        torch.testing.assert_close(written[name].double(), parameter.detach(), rtol=2.0**-24 + 1e-12, atol=0)
    assert result.averaged == sum(1 for _ in models[0].parameters())
    assert list(written) == list(models[0].state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_are_ratios_and_the_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    values = [torch.randn(40, 1000).to(dtype) for _ in range(2)]
    for number, value in enumerate(values):
        torch.save({"weight": value}, tmp_path / f"{number}.pt")
    bntool.average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt", weights=[3, 1])
    exact = values[0].double() * 0.75 + values[1].double() * 0.25
    assert torch.equal(load(tmp_path / "out.pt")["weight"], exact.to(dtype))


def test_statistics_are_those_of_all_data(tmp_path: Path) -> None:
    """Each layer saw its own data; together they are a BatchNorm that saw all of it, up to torch's n / (n - 1)."""
    torch.manual_seed(0)
    data = [torch.randn(50_000, 3) * scale + shift for scale, shift in ((1.0, -2.0), (3.0, 0.0), (0.5, 4.0))]
    layers = [nn.BatchNorm1d(3, momentum=1.0) for _ in data]
    for layer, seen in zip(layers, data, strict=True):
        layer(seen)
    everything = nn.BatchNorm1d(3, momentum=1.0)
    everything(torch.cat(data))
    result = bntool.average_checkpoints(save(layers, tmp_path), tmp_path / "out.pt")
    written = load(tmp_path / "out.pt")
    torch.testing.assert_close(written["running_mean"], everything.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(written["running_var"], everything.running_var, rtol=1e-4, atol=0)
    as_numbers = torch.stack([layer.running_var for layer in layers]).mean(0)
    assert (written["running_var"] > 2 * as_numbers).all()  # what an average of the numbers would have been
    assert 0.5 < result.pooled[0].between < 1


def test_equal_files_give_the_same_bytes(models: list[nn.Sequential], tmp_path: Path) -> None:
    state_dict = {
        name: value.double() if value.is_floating_point() else value for name, value in models[1].state_dict().items()
    }
    state_dict["mask"] = torch.tensor([0.1, -torch.inf, torch.inf])
    for name in ("a.pt", "b.pt", "c.pt"):
        torch.save(state_dict, tmp_path / name)
    paths = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    bntool.average_checkpoints(paths, tmp_path / "out.pt", weights=[1, 1, 5])
    assert bntool.diff(paths[0], tmp_path / "out.pt").identical


def test_counters_are_the_largest_and_other_whole_numbers_are_named(tmp_path: Path) -> None:
    layer = nn.BatchNorm1d(2)
    for number, count in enumerate((7, 100, 3)):
        layer.num_batches_tracked.fill_(count)
        torch.save(
            {**layer.state_dict(), "steps": torch.tensor(number), "size": torch.tensor(5)}, tmp_path / f"{number}.pt"
        )
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    result = bntool.average_checkpoints(paths, tmp_path / "out.pt")
    assert load(tmp_path / "out.pt")["num_batches_tracked"] == 100
    assert load(tmp_path / "out.pt")["num_batches_tracked"].dtype == torch.int64
    assert result.kept == ("steps",)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("conv.weight", [torch.ones(2, 2, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.int8)]),  # times its scale
        ("mask", [torch.eye(2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)]),
        ("conv.weight_mask", [torch.eye(2), torch.ones(2, 2)]),
    ],
)
def test_what_is_no_number_by_itself_is_not_averaged(tmp_path: Path, name: str, tensors: list[torch.Tensor]) -> None:
    """Quantised weights are numbers with their scale, pruned ones with their mask."""
    for number, tensor in enumerate(tensors):
        others = {"conv.weight_orig": torch.rand(2, 2), **nn.BatchNorm1d(2).state_dict()}
        torch.save({**others, name: tensor}, tmp_path / f"{number}.pt")
    with pytest.raises(RefusedError, match=name):
        bntool.average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_statistics_of_one_file(models: list[nn.Sequential], tmp_path: Path) -> None:
    paths = save(models, tmp_path)
    result = bntool.average_checkpoints(paths[:2], tmp_path / "out.pt", statistics_from=paths[2])
    written, own = load(tmp_path / "out.pt"), models[2].state_dict()
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert torch.equal(written[name], own[name])
    assert result.statistics_from == str(paths[2])
    assert not result.pooled


def test_files_of_other_formats_and_prefixes_go_together(models: list[nn.Sequential], tmp_path: Path) -> None:
    save_file(models[0].state_dict(), tmp_path / "a.safetensors")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in models[1].state_dict().items()}}, tmp_path / "b.pt"
    )
    torch.save(models[2].state_dict(), tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    paths = [tmp_path / name for name in ("a.safetensors", "b.pt", "c.pth")]
    bntool.average_checkpoints(paths, tmp_path / "out.safetensors")
    want = bntool.average_checkpoints(save(models, tmp_path), tmp_path / "want.pt")
    assert want.output is not None
    for name, value in load(tmp_path / "want.pt").items():
        assert torch.equal(load_file(tmp_path / "out.safetensors")[name], value), name
    result = bntool.average_checkpoints(paths[::-1][1:], tmp_path / "b_out.pt")
    assert result.other_entries == ("epoch",)
    assert torch.load(tmp_path / "b_out.pt", weights_only=True)["epoch"] == 3


def test_tied_tensors_stay_one(tmp_path: Path) -> None:
    for number in range(2):
        weight = torch.full((2, 2), float(number))
        torch.save({"a.weight": weight, "b.weight": weight, "c": torch.ones(1)}, tmp_path / f"{number}.pt")
    bntool.average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    written = load(tmp_path / "out.pt")
    assert written["a.weight"].data_ptr() == written["b.weight"].data_ptr()
    assert torch.equal(written["a.weight"], torch.full((2, 2), 0.5))
    torch.save({"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(2, 2), "c": torch.ones(1)}, tmp_path / "loose.pt")
    with pytest.raises(RefusedError, match="shares memory"):
        bntool.average_checkpoints([tmp_path / "0.pt", tmp_path / "loose.pt"], tmp_path / "none.pt")
    assert not (tmp_path / "none.pt").exists()


def spoil(state_dict: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    changed = {name: value.clone() for name, value in state_dict.items()}
    if how == "lacks":
        del changed["3.weight"]
    elif how == "more":
        changed["5.weight"] = torch.ones(1)
    elif how == "shape":
        changed["0.bias"] = torch.ones(7)
    elif how == "nan":
        changed["1.running_var"][2] = torch.nan
    elif how == "negative":
        changed["4.running_var"][0] = -1
    elif how == "float8":
        changed["0.weight"] = changed["0.weight"].to(torch.float8_e4m3fn)
    return changed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("lacks", r"it lacks '3.weight' of"),
        ("more", r"it lacks '5.weight' of"),
        ("shape", r"its shape is \[7\]"),
        ("nan", "not finite"),
        ("negative", "negative"),
        ("float8", "not averaged"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    how: str, message: str, models: list[nn.Sequential], tmp_path: Path
) -> None:
    paths = save(models[:1], tmp_path)
    torch.save(spoil(models[1].state_dict(), how), tmp_path / "b.pt")
    with pytest.raises(RefusedError, match=message):
        bntool.average_checkpoints([*paths, tmp_path / "b.pt"], tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("weights", [[1], [1, -1], [1, 0], [1, float("nan")], [1, 2, 3]])
def test_weights_that_are_none(weights: list[float], models: list[nn.Sequential], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        bntool.average_checkpoints(save(models[:2], tmp_path), weights=weights)
    with pytest.raises(UsageError, match="at least two"):
        bntool.average_checkpoints([tmp_path / "0.pt"])


def test_a_file_that_changes_meanwhile_is_noticed(
    models: list[nn.Sequential], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bntool.averaging import checkpoint as module

    paths, write = save(models[:2], tmp_path), module.write_checkpoint

    def change_and_write(*arguments: object) -> None:
        write(*arguments)
        torch.save({"other": torch.ones(3)}, paths[1])

    monkeypatch.setattr(module, "write_checkpoint", change_and_write)
    with pytest.raises(UnreadableFileError):
        bntool.average_checkpoints(paths, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_graphs_are_no_state_dicts(tmp_path: Path) -> None:

    model = next(INTEROP.glob("*.onnx"))
    with pytest.raises(RefusedError, match="no state dicts"):
        bntool.average_checkpoints([model, model])


def test_the_command_says_that_statistics_must_be_recalibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.pt"
    assert (
        main(["average", str(SAMPLES / "digits.pt"), str(SAMPLES / "drifted.pt"), "-o", str(out), "--weights", "3,1"])
        == 0
    )
    shown = capsys.readouterr().out
    assert f"bntool recalibrate {out} --model SPEC --data SPEC" in shown
    assert main(["inspect", str(out), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["files"][0]["state_dicts"][0]["recorded"]
    assert record["operation"] == "average"
    assert (
        main(["average", str(SAMPLES / "digits.pt"), str(SAMPLES / "drifted.pt"), "-o", str(out), "--weights", "a"])
        == 2
    )


def test_nans_of_every_kind_stay_nans_and_nobody_warns(tmp_path: Path) -> None:
    """Those called signalling, too, of which numpy warns when it casts them."""
    for number in range(2):
        bits = torch.full((8,), 0x7F800001 + number, dtype=torch.int32)
        half = torch.full((8,), 0x7C01 + number, dtype=torch.int16)
        state_dict = {
            "a": bits.view(torch.float32),
            "b": half.view(torch.float16),
            "c": torch.full((8,), float(number)),
        }
        torch.save(state_dict, tmp_path / f"{number}.pt")
    bntool.average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    written = load(tmp_path / "out.pt")
    assert written["a"].isnan().all()
    assert written["b"].isnan().all()
    assert torch.equal(written["c"], torch.full((8,), 0.5))


def test_one_channel_that_differs_among_many_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.BatchNorm2d(64)) for _ in range(2)]
    for one in layers:
        one[0].load_state_dict(layers[0][0].state_dict())
    layers[1][1].running_var[7] *= 1e6
    layers[1][2].running_mean[9] += 1000
    paths = save(layers, tmp_path)
    assert main(["average", *map(str, paths), "-o", str(tmp_path / "out.pt")]) == 0
    said = [" ".join(text.split()) for text in capsys.readouterr().out.splitlines()]
    assert "2 100.0% 9 x 1" in said
    assert "1 0.0% x 1e6 7" in said


def test_what_to_do_about_the_statistics_is_what_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bntool recalibrate runs models of PyTorch."""
    for ending, words in ((".keras", "let keras run batches in training mode"), (".pt", "bntool recalibrate")):
        source = SAMPLES / "digits.pt" if ending == ".pt" else INTEROP / "keras_2.12_nested_models.keras"
        out = tmp_path / f"average{ending}"
        assert main(["average", str(source), str(source), "-o", str(out)]) == 0
        printed = capsys.readouterr().out
        assert words in printed
        assert ("bntool recalibrate" in printed) == (ending == ".pt")
