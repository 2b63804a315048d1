"""Tensors of files into live modules."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.errors import RefusedError
from bntool.models.loading import load_model
from bntool.modules.loading import load_state, to_torch
from tests.places import SAMPLES


def build():
    return load_model(f"{SAMPLES / 'digits_net.py'}:build", arguments={})


@pytest.mark.parametrize(
    "name",
    ["digits.pt", "digits.safetensors", "digits_legacy.pth", "digits_module.pt", "digits_training.pt", "drifted.pt"],
)
def test_all_layouts_load_what_torch_loads(name, monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    model = build()
    with open_checkpoint(SAMPLES / name) as checkpoint:
        load_state(model, choose_state_dict(checkpoint))
    if name.endswith(".safetensors"):
        from safetensors.torch import load_file

        expected = load_file(SAMPLES / name)
    else:
        sys.modules.pop("digits_net", None)
        expected = torch.load(SAMPLES / name, weights_only=False)
        expected = expected.state_dict() if isinstance(expected, nn.Module) else expected.get("state_dict", expected)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.get(key, expected.get("module." + key)))


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "uint8", "bool"],
)
def test_elements_and_dtype_are_exact(tmp_path, dtype):
    tensor = torch.arange(-3, 3).reshape(2, 3).to(getattr(torch, dtype))
    save_file({"a": tensor, "empty": tensor[:0].clone(), "scalar": tensor[0, 0].clone()}, tmp_path / "t.safetensors")
    with open_checkpoint(tmp_path / "t.safetensors") as checkpoint:
        found = {name: to_torch(t) for name, t in checkpoint.state_dicts[0].tensors.items()}
    assert found["a"].dtype is tensor.dtype
    assert torch.equal(found["a"].view(torch.uint8), tensor.view(torch.uint8))
    assert found["empty"].shape == (0, 3)
    assert found["scalar"].shape == ()


def save(tmp_path, tensors):
    path = tmp_path / "state.pt"
    torch.save(tensors, path)
    return open_checkpoint(path)


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


@pytest.mark.parametrize("outer", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_prefixes_on_either_side_are_aligned(tmp_path, outer, wrap):
    saved, model = net(), wrap(net())
    with save(tmp_path, {outer + key: value for key, value in saved.state_dict().items()}) as checkpoint:
        if isinstance(model, torch.optim.swa_utils.AveragedModel):
            # a counter of the wrapper, which the file of a plain model has not
            with pytest.raises(RefusedError, match="n_averaged"):
                load_state(model, checkpoint.state_dicts[0])
            return
        load_state(model, checkpoint.state_dicts[0])
    inner = model.module if hasattr(model, "module") else model
    assert all(torch.equal(a, b) for a, b in zip(inner.state_dict().values(), saved.state_dict().values(), strict=True))


def test_an_averaged_copy_loads_into_a_plain_model(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(net())
    model = net()
    with save(tmp_path, averaged.state_dict()) as checkpoint:
        load_state(model, checkpoint.state_dicts[0])
    assert torch.equal(model[0].weight, averaged.module[0].weight)


def test_a_file_without_counters_leaves_those_of_the_model(tmp_path):
    saved = {key: value for key, value in net().state_dict().items() if "tracked" not in key}
    model = net()
    model[1].num_batches_tracked.fill_(7)
    with save(tmp_path, saved) as checkpoint:
        load_state(model, checkpoint.state_dicts[0])
    assert torch.equal(model[0].weight, saved["0.weight"])
    assert int(model[1].num_batches_tracked) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), "the file lacks 0.bias"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "the model has no extra.weight"),
        (
            lambda s: s.update({"0.weight": torch.zeros(3, 1, 3, 3)}),
            r"0.weight is \[3, 1, 3, 3\] in the file, \[2, 1, 3, 3\]",
        ),
        (
            lambda s: [s.update({"backbone." + k: s.pop(k)}) for k in list(s)] and s.update(head=torch.zeros(1)),
            "the file's keys seem to have 'backbone.' in front",
        ),
    ],
)
def test_a_mismatch_is_explained(tmp_path, change, message):
    saved = dict(net().state_dict())
    change(saved)
    with save(tmp_path, saved) as checkpoint, pytest.raises(RefusedError, match=message):
        load_state(net(), checkpoint.state_dicts[0])


def test_half_precision_files_load_into_float32_models_exactly(tmp_path):
    saved = {k: v.half() if v.is_floating_point() else v for k, v in net().state_dict().items()}
    model = net()
    with save(tmp_path, saved) as checkpoint:
        load_state(model, checkpoint.state_dicts[0])
    assert torch.equal(model[0].weight, saved["0.weight"].float())


def test_modules_that_translate_old_keys_are_asked(tmp_path):
    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            if prefix + "kernel" in state_dict:
                state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel")
            super()._load_from_state_dict(state_dict, prefix, *args)

    with save(tmp_path, {"kernel": torch.ones(2, 3), "bias": torch.zeros(2)}) as checkpoint:
        model = Renamed(3, 2)
        load_state(model, checkpoint.state_dicts[0])
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_code_of_the_model_that_raises_while_it_loads_is_said_to(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    state_dict = model.state_dict()
    model.register_load_state_dict_pre_hook(lambda _module, state, *_: state["missing"])
    with (
        save(tmp_path, state_dict) as checkpoint,
        pytest.raises(RefusedError, match=r"does not take this state dict: KeyError: 'missing' \(.*test_loading.py:"),
    ):
        load_state(model, checkpoint.state_dicts[0])
