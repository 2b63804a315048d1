"""Names of layers: what a glob that selects nothing probably meant."""

import numpy as np
import pytest
import torch
from torch import nn

import bntool
from bntool.batchnorm import check_globs, selects
from bntool.errors import UsageError
from tests.places import SAMPLES

NAMES = ["stem.bn", "layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1"]


@pytest.mark.parametrize(
    ("glob", "meant"),
    [
        ("layer1", "'layer1.*' would select 2"),
        ("layer1.", "'layer1.*' would select 2"),
        ("module.layer2.0.bn1", "'layer2.0.bn1' would select 1"),
        ("model.layer1", "'layer1.*' would select 2"),
        ("bn1", "'*.bn1' would select 3"),
        ("layer1/0/bn1", "'layer1.0.bn1' would select 1"),
        ("layer1.0.bnl", "'layer1.0.bn1' would select 1"),
        ("ayer2", "'*ayer2*' would select 1"),
    ],
)
def test_what_a_glob_probably_meant(glob, meant):
    with pytest.raises(UsageError, match="selects none of the 4 BatchNorm layers") as caught:
        check_globs([glob], NAMES)
    assert meant in str(caught.value)
    assert "there are: stem.bn, layer1.0.bn1" in str(caught.value)


def test_every_glob_must_select_something_and_without_layers_there_is_nothing_to_say():
    check_globs(["layer1.*", "stem.bn"], NAMES)
    check_globs(["anything"], [])
    with pytest.raises(UsageError, match="'qqq' selects none") as caught:
        check_globs(["layer1.*", "qqq"], NAMES)
    assert "would select" not in str(caught.value)


@pytest.mark.parametrize("verb", ["inspect", "diff", "freeze", "fold", "convert", "live freeze", "live fold"])
def test_every_verb_refuses_a_glob_that_selects_nothing(verb):
    path, layers = SAMPLES / "digits.pt", ["layer1"]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    calls = {
        "inspect": lambda: bntool.inspect(path, layers=layers),
        "diff": lambda: bntool.diff(path, path, layers=layers),
        "freeze": lambda: bntool.freeze_checkpoint(path, layers=layers),
        "fold": lambda: bntool.fold_checkpoint(path, pairs={"bn1": "conv1"}, eps=1e-5, layers=layers),
        "convert": lambda: bntool.convert(path, to="frozen-batchnorm", eps=1e-5, layers=layers),
        "live freeze": lambda: bntool.freeze(model, layers=layers),
        "live fold": lambda: bntool.fold(model, torch.randn(2, 3, 4, 4), layers=layers),
    }
    with pytest.raises(UsageError, match="--layers 'layer1' selects none of the"):
        calls[verb]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_a_layer_are_arrays(dtype, tmp_path):
    bn = nn.BatchNorm2d(5).to(dtype)
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    torch.save({"bn." + name: tensor for name, tensor in bn.state_dict().items()}, tmp_path / "bn.pt")
    with bntool.open_checkpoint(tmp_path / "bn.pt") as checkpoint:
        (layer,) = bntool.find_batchnorms(checkpoint.state_dicts[0])
        for name, tensor in bn.state_dict().items():
            array = getattr(layer, name)
            assert isinstance(array, np.ndarray)
            assert array.shape == tuple(tensor.shape)
            assert array.dtype == ("float32" if dtype is torch.bfloat16 and tensor.ndim else str(array.dtype))
            np.testing.assert_array_equal(array.astype("f8"), tensor.double().numpy())
        assert layer.read("no such role") is None
        assert len(repr(layer)) < 200


def test_the_name_of_a_layer_selects_it_letter_by_letter():
    names = ["blocks[0].bn", "blocks[1].bn", "blocks0.bn"]
    check_globs(["blocks[0].bn"], names)
    assert [name for name in names if selects(["blocks[1].bn"], name)] == ["blocks[1].bn"]
    with pytest.raises(UsageError, match=r"'\*blocks\*'|'blocks"):
        check_globs(["blocks[7].bn"], names)
