"""What a command does is one call of the library: the same files, and results that a notebook can show."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import bntool
from bntool.cli.main import main
from bntool.errors import UsageError
from tests.places import SAMPLES

DIGITS = SAMPLES / "digits.pt"


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Net()
    for _ in range(30):
        model(torch.randn(16, 3, 9, 9) * 2 + 1)
    return model.eval()


@pytest.fixture
def path(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def equal_files(a, b):
    one, two = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_freeze_is_the_command(path, tmp_path):
    result = bntool.freeze_checkpoint(path, tmp_path / "a.pt", requires_grad=False)
    assert main(["freeze", str(path), "-o", str(tmp_path / "b.pt"), "--no-requires-grad", "-q"]) == 0
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert result.output == str(tmp_path / "a.pt")
    assert result.freeze.policy.layers == ("1", "4")
    assert bntool.freeze_checkpoint(path).output is None
    assert "def freeze(model" in bntool.freeze_checkpoint(path, emit="python").code


def test_pairs_are_taken_in_each_form(model, path, tmp_path):
    for name, pairs in (("a", {"1": "0"}), ("b", ["0=1"]), ("c", "0=1")):
        bntool.fold_checkpoint(path, tmp_path / f"{name}.pt", pairs=pairs, eps=1e-5)
        assert (tmp_path / f"{name}.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()
    assert [fold.layer for fold in bntool.fold(model, torch.randn(2, 3, 9, 9), pairs="0=1").plan.folds] == ["1"]


def test_fold_is_the_command_and_takes_a_live_model(model, path, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    phases = []
    result = bntool.fold_checkpoint(
        path, tmp_path / "a.pt", model=model, input_shape=(2, 3, 9, 9), on_progress=lambda p: phases.append(p.phase)
    )
    assert [fold.layer for fold in result.plan.folds] == ["1", "4"]
    assert result.agreement.exact < 1e-12
    assert phases == ["loading the model", "tracing the model", "comparing outputs", "writing"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    folded = bntool.load_folded(Net(), tmp_path / "a.pt").eval()
    x = torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    # warnings and ranges were read while the file was open
    assert result.warnings == ()
    assert len(result.ranges) == 2


def test_recalibrate_is_the_command_and_takes_batches(model, path, tmp_path):
    torch.manual_seed(1)
    batches = [torch.randn(8, 3, 9, 9) - 1 for _ in range(4)]
    state = torch.get_rng_state()
    seen = []
    result = bntool.recalibrate_checkpoint(path, tmp_path / "a.pt", model=model, data=batches, on_progress=seen.append)
    assert torch.equal(state, torch.get_rng_state())
    live = Net()
    live.load_state_dict(torch.load(path, weights_only=True))
    bntool.recalibrate(live, batches)
    written = torch.load(tmp_path / "a.pt", weights_only=True)
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)
    assert {progress.phase for progress in seen} == {"before", "pooled statistics", "after"}
    assert all(progress.phases == ("before", "pooled statistics", "after") for progress in seen)
    assert result.recalibration.samples == 32
    record = bntool.open_checkpoint(tmp_path / "a.pt").records[""][0]
    assert record["data"] == "batches of list"
    with pytest.raises(UsageError, match="not an iterator"):
        bntool.recalibrate_checkpoint(path, model=model, data=iter(batches))


def test_convert_is_the_command(path, tmp_path):
    lost = []
    result = bntool.convert(path, tmp_path / "a.safetensors", to="safetensors", on_warning=lost.append)
    assert main(["convert", str(path), "--to", "safetensors", "-o", str(tmp_path / "b.safetensors"), "-q"]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert result.output == str(tmp_path / "a.safetensors")
    assert lost == [f"this will be lost: {loss}" for loss in result.losses]
    assert bntool.diff(path, tmp_path / "a.safetensors").identical


@pytest.mark.parametrize("kind", ["path", "checkpoint", "state dict", "arrays", "model"])
def test_inspect_and_diff_take_what_there_is(kind, model, path, capsys):
    state = model.state_dict()
    with bntool.open_checkpoint(path) as checkpoint:
        source = {
            "path": path,
            "checkpoint": checkpoint,
            "state dict": state,
            "arrays": {name: tensor.numpy() for name, tensor in state.items()},
            "model": model,
        }[kind]
        inspection = bntool.inspect(source)
        assert bntool.diff(path, source, expect="identical").violations == ()
        moved = {**state, "1.running_mean": state["1.running_mean"] + 1}
        comparison = bntool.diff(source, moved, expect="norm-eval")
    assert comparison.violations == ("1: running_mean changed",)
    assert [layer.name for layer in inspection.state_dicts[0].layers] == ["1", "4"]
    layer = inspection.state_dicts[0]["1"]
    np.testing.assert_array_equal(layer.running_var, state["1.running_var"].numpy())
    np.testing.assert_array_equal(layer.weight, state["1.weight"].numpy())
    assert (layer.layer.eps, layer.layer.training) == ((1e-5, False) if kind == "model" else (None, None))
    assert main(["inspect", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["files"][0]["state_dicts"][0]["layers"]
    assert [layer["tensors"]["running_var"]["mean"] for layer in printed] == [
        layer.tensors["running_var"].mean for layer in inspection.state_dicts[0].layers
    ]


def test_a_mapping_that_holds_state_dicts_is_not_taken_for_one(model):
    with pytest.raises(UsageError, match="such as the one under 'model'"):
        bntool.inspect({"model": model.state_dict(), "epoch": 3})


def test_lazy_and_meta_tensors_of_a_model_are_listed():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    assert bntool.inspect(model).state_dicts[0].layers[0].findings[0].short == "no elements"
    with torch.device("meta"):
        model = nn.BatchNorm2d(7)
    (layer,) = bntool.inspect(model).state_dicts[0].layers
    assert layer.layer.num_features == 7


def test_the_repr_of_every_result_fits_on_a_screen(tmp_path):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv1d(16, 16, 1), nn.BatchNorm1d(16)) for _ in range(15)]
    model = nn.Sequential(*blocks).eval()
    torch.save(model.state_dict(), tmp_path / "deep.pt")
    path, x = tmp_path / "deep.pt", torch.randn(4, 16, 3)
    inspection, frozen, folded = bntool.inspect(path), bntool.freeze_checkpoint(path), bntool.fold(model, x)
    results = [
        inspection,
        inspection.state_dicts[0],
        inspection.state_dicts[0].layers[0],
        bntool.diff(path, model),
        frozen,
        frozen.freeze,
        bntool.fold_checkpoint(path, model=model, input_shape=(2, 16, 3)),
        bntool.recalibrate_checkpoint(path, model=model, data=[x]),
        bntool.convert(path, to="safetensors"),
        folded,
        folded.plan,
        folded.report,
        bntool.recalibrate(model, [x]),
        bntool.freeze(model),
        bntool.open_checkpoint(path),
        bntool.open_checkpoint(path).state_dicts[0],
    ]
    for result in results:
        text = repr(result)
        assert len(text) < 1000, f"{type(result).__name__}: {len(text)} characters"
        assert type(result).__name__ in text or text.startswith("<")


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm])
@pytest.mark.parametrize("verb", ["recalibrate", "freeze", "fold"])
def test_other_norms_are_not_counted_as_skipped_batchnorms(norm, verb, tmp_path):
    other = {
        nn.InstanceNorm2d: lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.GroupNorm: lambda: nn.GroupNorm(2, 8),
        nn.LayerNorm: lambda: nn.LayerNorm([8, 7, 7]),
    }[norm]()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), other, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(16, 3, 9, 9)
    for _ in range(30):
        model(x + torch.randn_like(x))
    # a pickled module says which is which
    torch.save(model.eval() if verb == "freeze" else model.eval().state_dict(), tmp_path / "m.pt")
    path, output = tmp_path / "m.pt", tmp_path / "o.pt"
    if verb == "recalibrate":
        result = bntool.recalibrate_checkpoint(path, output, model=model, data=[x], strict=True)
        plan = result.recalibration.plan
    elif verb == "freeze":
        plan = bntool.freeze_checkpoint(path, output, strict=True).freeze.plan
    else:
        plan = bntool.fold_checkpoint(path, output, model=model, input_shape=(2, 3, 9, 9), strict=True).plan
    assert (plan.layers, plan.skips) == (("4",), ())
