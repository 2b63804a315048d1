"""Reading what torch.save writes: which state dicts are found, and tensors that are only shown."""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bntool.checkpoints.checkpoint import GlobalTrust
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.checkpoints.tensors import StoredTensor
from bntool.errors import RefusedError, UsageError
from tests.checkpoints.samples import WRITERS, assert_holds, tiny_net, to_torch


class Net(nn.Module):
    """A model that is pickled as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("transient", torch.zeros(2), persistent=False)
        self.register_parameter("absent", None)
        self.hidden_size = 64


class Sequence(list[Any]):
    """A list of a class of its own."""


class Inert:
    """Something that bntool has never heard of."""

    def __init__(self, value: object) -> None:
        self.value = value


def _save(value: Any, folder: Path, **options: Any) -> Path:
    torch.save(value, folder / "file.pt", **options)
    return folder / "file.pt"


def _keys(path: Path) -> list[str]:
    return [state_dict.key for state_dict in open_checkpoint(path).state_dicts]


STATE = functools.partial(lambda: tiny_net().state_dict())


@pytest.mark.parametrize(
    ("layout", "keys", "chosen"),
    [
        (lambda sd: sd, [""], ""),
        (lambda sd: {"state_dict": sd, "epoch": 3}, ["state_dict"], "state_dict"),
        (lambda sd: {"model": {"net": sd}}, ["model.net"], "model.net"),
        (lambda sd: [1, {"weights": sd}], ["1.weights"], "1.weights"),
        (lambda sd: {"ema": sd, "model": copy.deepcopy(sd)}, ["ema", "model"], "model"),
        (
            lambda sd: {"state_dict_ema": sd, "state_dict": copy.deepcopy(sd)},
            ["state_dict_ema", "state_dict"],
            "state_dict",
        ),
        (lambda sd: {"params_ema": sd, "params": copy.deepcopy(sd)}, ["params_ema", "params"], "params"),
        (lambda sd: {"params_ema": sd}, ["params_ema"], "params_ema"),
        (lambda sd: {"net_d": {"a.weight": torch.ones(2)}, "net_g": sd}, ["net_d", "net_g"], "net_g"),
        (lambda sd: {"loss": {"weight": torch.ones(3)}, "model": sd}, ["loss", "model"], "model"),
        (lambda sd: {"stats": {"mean": torch.ones(3)}, "model": sd}, ["model"], "model"),
        (lambda sd: {"stats": {"mean": torch.ones(3), "n": torch.tensor(1)}}, ["stats"], "stats"),
        (lambda sd: {"stats": {"n": torch.tensor(1)}}, [], None),
        (lambda sd: {"a.b": sd, "a": {"b": copy.deepcopy(sd)}}, ["a.b", "a.b#2"], "a.b"),
        (lambda sd: {"model": sd, "same": sd}, ["model"], "model"),
        (lambda sd: {"holder": Inert(sd)}, ["holder.value"], "holder.value"),
        (dict, [""], ""),
        (lambda sd: defaultdict(list, sd), [""], ""),
        (lambda sd: {"epoch": 1, 7: sd}, ["7"], "7"),
        (lambda sd: {0: sd, 1: copy.deepcopy(sd)}, ["0", "1"], "0"),
        (lambda sd: {0: sd, "0": copy.deepcopy(sd)}, ["0", "0#2"], "0"),
        (lambda sd: {-1: sd, 0.999: copy.deepcopy(sd)}, ["-1", "0.999"], "-1"),
        (lambda sd: {"ema": {0.9: sd}, "nets": {3: copy.deepcopy(sd)}}, ["ema.0.9", "nets.3"], "nets.3"),
        (lambda sd: {2: {"state_dict": sd, "epoch": 1}, 1: 5}, ["2.state_dict"], "2.state_dict"),
        (lambda sd: {("a", 1): sd}, [], None),
        (lambda sd: {number: {"weight": torch.ones(1)} for number in range(257)}, [], None),
        (lambda sd: {"by_image": {number: [{}] for number in range(2000)}, "model": sd}, ["model"], "model"),
        (lambda sd: {0: torch.ones(3), 1: torch.ones(3)}, [], None),
        (lambda sd: [sd, copy.deepcopy(sd)], ["0", "1"], "0"),
        (lambda sd: (sd, 3), ["0"], "0"),
        (lambda sd: {"snapshots": (sd, copy.deepcopy(sd))}, ["snapshots.0", "snapshots.1"], "snapshots.0"),
        (lambda sd: {"kept": deque([sd, copy.deepcopy(sd)], 5)}, ["kept.0", "kept.1"], "kept.0"),
        (lambda sd: Sequence([sd]), ["0"], "0"),
        (lambda sd: {}, [], None),
        (lambda sd: torch.ones(3), [], None),
        (lambda sd: None, [], None),
    ],
)
def test_state_dicts_are_found_and_one_is_chosen(
    layout: Any, keys: list[str], chosen: str | None, tmp_path: Path
) -> None:
    path = _save(layout(STATE()), tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert [state_dict.key for state_dict in checkpoint.state_dicts] == keys
        if chosen is None:
            with pytest.raises(RefusedError):
                choose_state_dict(checkpoint)
        else:
            assert choose_state_dict(checkpoint).key == chosen
            assert choose_state_dict(checkpoint, keys[-1]).key == keys[-1]
        with pytest.raises(UsageError, match="no state dict 'other'"):
            choose_state_dict(checkpoint, "other")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_state_is_no_state_dict(optimizer: Any, tmp_path: Path) -> None:
    net = tiny_net()
    stepper = optimizer(net.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    stepper.step()
    state = stepper.state_dict()
    path = _save({"optimizer": state, "optimizers": [state], "model": net.state_dict(), "o": {"d": state}}, tmp_path)
    assert _keys(path) == ["model"]


class _Outer(nn.Module):
    pass


def _compiled(net: nn.Module) -> nn.Module:
    outer = _Outer()
    outer._orig_mod = net  # what torch.compile's OptimizedModule has in its state_dict
    return outer


def _lightning(net: nn.Module) -> nn.Module:
    outer = _Outer()
    outer.model = net
    return outer


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (nn.DataParallel, "module."),
        (_compiled, "_orig_mod."),
        (lambda net: nn.DataParallel(_compiled(net)), "module._orig_mod."),
        (_lightning, "model."),
        (AveragedModel, "module."),
        (lambda net: net, ""),
    ],
)
def test_the_prefix_of_wrappers_is_known(wrap: Any, prefix: str, tmp_path: Path) -> None:
    net = tiny_net()
    path = _save(wrap(net).state_dict(), tmp_path)
    with open_checkpoint(path) as checkpoint:
        state_dict = checkpoint.state_dict("")
        assert state_dict.prefix == prefix
        assert torch.equal(to_torch(state_dict.tensor("1.running_var")), net.state_dict()["1.running_var"])
        stripped = [state_dict.strip(name) for name in state_dict.tensors]
        assert [name for name in stripped if name != "n_averaged"] == list(net.state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_whole_modules_give_tensors_and_attributes(protocol: int, zipped: bool, tmp_path: Path) -> None:
    net = Net()
    net.blocks.eval()
    path = _save(net, tmp_path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as checkpoint:
        (state_dict,) = checkpoint.state_dicts
        assert state_dict.is_module
        assert_holds(checkpoint, net.state_dict())
        assert set(state_dict.modules) == {name for name, _ in net.named_modules()}
        assert state_dict.modules[""].class_path == f"{__name__}.Net"
        assert state_dict.modules[""].attributes["hidden_size"] == 64
        norm = state_dict.modules["norm"]
        assert norm.class_path == "torch.nn.modules.batchnorm.BatchNorm2d"
        assert (norm.attributes["eps"], norm.attributes["momentum"]) == (1e-3, 0.03)
        assert norm.attributes["training"] is True
        assert norm.attributes["track_running_stats"] is True
        assert state_dict.modules["blocks.1"].attributes["training"] is False
        assert state_dict.modules["conv"].attributes["padding"] == (1, 0)
        weight = state_dict.tensors["conv.weight"]
        assert isinstance(weight, StoredTensor)
        assert weight.is_parameter
        assert weight.requires_grad is True


def test_modules_beside_other_things(tmp_path: Path) -> None:
    path = _save({"epoch": 1, "model": Net(), "ema": Net(), "args": argparse.Namespace(lr=1)}, tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert [(s.key, s.is_module) for s in checkpoint.state_dicts] == [("model", True), ("ema", True)]
        assert choose_state_dict(checkpoint).key == "model"
        assert checkpoint.entries["epoch"] == 1
        unknown = {name.path for name in checkpoint.globals if name.trust is GlobalTrust.UNKNOWN}
        assert unknown == {f"{__name__}.Net"}


def test_a_module_used_twice_names_its_tensors_twice(tmp_path: Path) -> None:
    shared = nn.BatchNorm1d(3)
    net = nn.Sequential(shared, nn.Linear(3, 3), shared)
    with open_checkpoint(_save(net, tmp_path)) as checkpoint:
        assert_holds(checkpoint, net.state_dict())


def test_things_that_weights_only_refuses(tmp_path: Path) -> None:
    extras = {
        "numpy": np.float64(0.5),
        "path": pathlib.PurePosixPath("/x"),
        "args": argparse.Namespace(a=1),
        "part": functools.partial(print, 1),
        "rng": (np.random.default_rng(0).bit_generator.state, torch.get_rng_state()),
        "inert": Inert([1, 2]),
        "array": np.arange(30_000.0),
    }
    for protocol in (2, 4):
        path = _save({"state_dict": STATE(), **extras}, tmp_path, pickle_protocol=protocol)
        with open_checkpoint(path) as checkpoint:
            assert [s.key for s in checkpoint.state_dicts] == ["state_dict"]
            assert_holds(checkpoint, STATE(), "state_dict")


def test_versions_come_from_metadata(tmp_path: Path) -> None:
    with open_checkpoint(_save(STATE(), tmp_path)) as checkpoint:
        versions = checkpoint.state_dict("").versions
        assert versions is not None
        assert (versions["1"], versions["0"]) == (2, 1)
    with open_checkpoint(_save(dict(STATE()), tmp_path)) as checkpoint:
        assert checkpoint.state_dict("").versions is None


class Labelled(torch.Tensor):
    """A subclass of Tensor."""


SPECIAL = {
    "conj.weight": (lambda: torch.tensor([1 + 2j]).conj(), "conjugate or negative view"),
    "neg.weight": (lambda: torch.tensor([1 + 2j]).conj().imag, "conjugate or negative view"),
    "sparse.weight": (lambda: torch.eye(3, dtype=torch.float64).to_sparse(), "sparse"),
    "csr.weight": (lambda: torch.eye(3, dtype=torch.float16).to_sparse_csr(), "sparse"),
    "meta.weight": (lambda: torch.empty(2, 3, dtype=torch.bfloat16, device="meta"), "meta"),
    "sub.weight": (lambda: torch.arange(4.0).as_subclass(Labelled), f"{__name__}.Labelled"),
    "quant.weight": (lambda: torch.quantize_per_tensor(torch.arange(3.0), 0.1, 2, torch.quint8), "quantized"),
    "channel.weight": (
        lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        "quantized",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:torch.quantize_per")
@pytest.mark.parametrize("name", SPECIAL)
def test_tensors_that_are_only_shown(name: str, tmp_path: Path) -> None:
    make, wrapper = SPECIAL[name]
    tensor = make()
    with open_checkpoint(_save({name: tensor, "a.bias": torch.ones(2)}, tmp_path)) as checkpoint:
        shown = checkpoint.state_dict("").tensors[name]
        assert isinstance(shown, StoredTensor)
        assert shown.wrapper == wrapper
        assert shown.shape == tuple(tensor.shape)
        assert shown.dtype.name == str(tensor.dtype).removeprefix("torch.")


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex_and_other_dtypes_of_torch_alone(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.complex(torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)).to(torch.complex128).t(),
        "b.weight": torch.tensor([1 + 2j, 3j], dtype=torch.complex32),
    }
    with open_checkpoint(_save(tensors, tmp_path)) as checkpoint:
        assert_holds(checkpoint, tensors)


def test_bare_storages_are_passed_by(tmp_path: Path) -> None:
    tensor = torch.arange(4, dtype=torch.uint8)
    with open_checkpoint(_save({"a.weight": tensor, "raw": tensor.untyped_storage()}, tmp_path)) as checkpoint:
        assert_holds(checkpoint, {"a.weight": tensor})


def test_old_files_rebuild_tensors_without_hooks(tmp_path: Path) -> None:
    class Old:
        def __reduce__(self) -> Any:
            tensor = torch.arange(6.0)
            return torch._utils._rebuild_tensor, (tensor._typed_storage(), 1, (2, 2), (2, 1))

    for zipped in (True, False):
        path = _save(OrderedDict([("a.weight", Old())]), tmp_path, _use_new_zipfile_serialization=zipped)
        with open_checkpoint(path) as checkpoint:
            assert_holds(checkpoint, {"a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})


@pytest.mark.parametrize("name", ["torch-zip", "torch-legacy"])
def test_big_endian_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a.weight": torch.tensor([1.5, -2.0]), "b.count": torch.tensor([1, 2**40]), "c.on": torch.tensor(True)}
    swapped = {
        key: torch.frombuffer(bytearray(value.numpy().byteswap().tobytes()), dtype=value.dtype).reshape(value.shape)
        for key, value in tensors.items()
    }
    path = WRITERS[name](swapped, tmp_path)
    data = path.read_bytes()
    if name == "torch-zip":
        path.write_bytes(_rezip(path, {"byteorder": b"big"}))
    else:
        marked = data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
        assert marked != data
        path.write_bytes(marked)
    with open_checkpoint(path) as checkpoint:
        assert_holds(checkpoint, tensors)


def _rezip(path: Path, changes: dict[str, bytes]) -> bytes:
    from tests.checkpoints.foreign import rezip

    return rezip(path, lambda name, data: (name, changes.get(name.rpartition("/")[2], data)))


def test_real_files(fixtures: Path) -> None:
    expected = {
        "torch_tiny.pth": [("", "")],
        "torch_tiny_ddp.pth": [("state_dict", "module.")],
        "d2_like_frozenbn_v3.pth": [("", "")],
        "mmengine_epoch_1.pth": [("state_dict", ""), ("ema_state_dict", "module.")],
        "mmengine_published_legacyfmt.pth": [("state_dict", "")],
        "torch_tiny.safetensors": [("", "")],
    }
    for file, state_dicts in expected.items():
        with open_checkpoint(fixtures / file) as checkpoint:
            assert [(s.key, s.prefix) for s in checkpoint.state_dicts] == state_dicts
    loaded = torch.load(fixtures / "mmengine_published_legacyfmt.pth", weights_only=True)
    with open_checkpoint(fixtures / "mmengine_published_legacyfmt.pth") as checkpoint:
        assert_holds(checkpoint, loaded["state_dict"], "state_dict")


def test_resnet20(shared: Path) -> None:
    path = shared / "weights" / "resnet20-12fca82f.th"
    loaded = torch.load(path, weights_only=True, map_location="cpu")
    with open_checkpoint(path) as checkpoint:
        assert_holds(checkpoint, loaded["state_dict"], "state_dict")
