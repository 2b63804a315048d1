"""Telling norms apart: the real modules of torch, and the key sets of foreign ones."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.nn.intrinsic import qat

from bntool.batchnorm import EpsSource, NormKind
from bntool.checkpoints.batchnorms import find_batchnorms, find_norms
from bntool.checkpoints.formats import open_checkpoint

C = 6


def _norms(value: Any, folder: Path) -> dict[str, NormKind]:
    torch.save(value, folder / "m.pt")
    with open_checkpoint(folder / "m.pt") as checkpoint:
        return {norm.name: norm.kind for norm in find_norms(checkpoint.state_dict(""))}


MODULES = {
    "BatchNorm1d": (nn.BatchNorm1d(C), NormKind.BATCH_NORM),
    "BatchNorm2d": (nn.BatchNorm2d(C), NormKind.BATCH_NORM),
    "BatchNorm3d": (nn.BatchNorm3d(C), NormKind.BATCH_NORM),
    "SyncBatchNorm": (nn.SyncBatchNorm(C), NormKind.BATCH_NORM),
    "one channel": (nn.BatchNorm1d(1), NormKind.BATCH_NORM),
    "without affine": (nn.BatchNorm2d(C, affine=False), NormKind.BATCH_NORM),
    "without statistics": (nn.BatchNorm2d(C, track_running_stats=False), NormKind.NORM_WITHOUT_STATISTICS),
    "LayerNorm": (nn.LayerNorm(C), NormKind.LAYER_OR_GROUP_NORM),
    "GroupNorm": (nn.GroupNorm(2, C), NormKind.LAYER_OR_GROUP_NORM),
    "Linear": (nn.Linear(C, C), None),
    "Conv2d": (nn.Conv2d(C, C, 1), None),
    "Embedding": (nn.Embedding(C, C), None),
}
if "bias" in signature(nn.BatchNorm2d).parameters:  # since torch 2.13
    MODULES["without bias"] = (nn.BatchNorm2d(C, bias=False), NormKind.BATCH_NORM)


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch_by_their_state_dict(name: str, tmp_path: Path) -> None:
    module, kind = MODULES[name]
    expected = {} if kind is None else {"n": kind}
    assert _norms(nn.ModuleDict({"n": module}).state_dict(), tmp_path) == expected


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch_pickled_as_a_whole(name: str, tmp_path: Path) -> None:
    module, kind = MODULES[name]
    expected = {} if kind is None else {"n": kind}
    assert _norms(nn.ModuleDict({"n": module, "other": nn.Linear(2, 2)}), tmp_path) == expected


@pytest.mark.parametrize("whole", [True, False])
def test_instance_norm_is_known_by_its_class_only(whole: bool, tmp_path: Path) -> None:
    net = nn.ModuleDict({"n": nn.InstanceNorm2d(C, affine=True, track_running_stats=True)})
    expected = NormKind.INSTANCE_NORM if whole else NormKind.BATCH_NORM
    assert _norms(net if whole else net.state_dict(), tmp_path) == {"n": expected}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_quantized_and_quantization_aware_layers(whole: bool, tmp_path: Path) -> None:
    aware = nn.ModuleDict({"c": qat.ConvBn2d(3, C, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm"))})
    found = _norms(aware.state_dict(), tmp_path)
    assert found == {"c.bn": NormKind.FUSED_CONV_BATCH_NORM}
    quantized = {**nn.BatchNorm2d(C).state_dict(), "scale": torch.tensor(1.0), "zero_point": torch.tensor(0)}
    assert _norms({f"q.{k}": v for k, v in quantized.items()}, tmp_path) == {"q": NormKind.QUANTIZED_BATCH_NORM}


def _bn(**more: Any) -> dict[str, torch.Tensor]:
    return {**{key: value.clone() for key, value in nn.BatchNorm2d(C).state_dict().items()}, **more}


def _v(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


FOREIGN = {
    "SwitchNorm": (_bn(mean_weight=_v(3), var_weight=_v(3)), NormKind.SWITCH_NORM),
    "BatchRenorm": (
        {
            "weight": _v(C),
            "bias": _v(C),
            "running_mean": _v(C),
            "running_std": _v(C),
            "num_batches_tracked": torch.tensor(1),
        },
        NormKind.BATCH_RENORM,
    ),
    "EvoNormB0": ({"weight": _v(C), "bias": _v(C), "v": _v(C), "running_var": _v(C)}, NormKind.EVO_NORM),
    "FilterResponseNorm": ({"weight": _v(C), "bias": _v(C), "tau": _v(C)}, NormKind.FILTER_RESPONSE_NORM),
    "GraphNorm": ({"weight": _v(C), "bias": _v(C), "mean_scale": _v(C)}, NormKind.GRAPH_NORM),
    "HeteroBatchNorm": (
        {"weight": _v(3, C), "bias": _v(3, C), "running_mean": _v(3, C), "running_var": _v(3, C)},
        NormKind.HETERO_BATCH_NORM,
    ),
    "GhostBatchNorm": (
        {"weight": _v(C), "bias": _v(C), "running_mean": _v(4 * C), "running_var": _v(4 * C)},
        NormKind.GHOST_BATCH_NORM,
    ),
    "BatchNorm before torch 0.4.1": (
        {k: v for k, v in _bn().items() if k != "num_batches_tracked"},
        NormKind.BATCH_NORM,
    ),
    "PyG BatchNorm": ({f"module.{k}": v for k, v in _bn().items()}, NormKind.BATCH_NORM),
    "weight norm": ({"weight_g": _v(C, 1), "weight_v": _v(C, C), "bias": _v(C)}, None),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_layers_by_their_keys(name: str, tmp_path: Path) -> None:
    keys, kind = FOREIGN[name]
    state = {"stem.weight": torch.ones(C, 3, 3, 3), **{f"block.n.{key}": value for key, value in keys.items()}}
    layer = "block.n.module" if name == "PyG BatchNorm" else "block.n"
    assert _norms(state, tmp_path) == ({} if kind is None else {layer: kind})


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision (version 1) and detectron2 (version 3)."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self._version = version
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(C))


@pytest.mark.parametrize(("version", "kind"), [(1, "FrozenBatchNorm"), (3, "FrozenBatchNorm"), (2, "BatchNorm")])
def test_frozen_norms_by_the_version_in_metadata(version: int, kind: str, tmp_path: Path) -> None:
    net = nn.ModuleDict({"n": FrozenBatchNorm2d(version)})
    assert _norms(net.state_dict(), tmp_path) == {"n": NormKind(kind)}
    assert _norms(net, tmp_path) == {"n": NormKind.FROZEN_BATCH_NORM}
    assert _norms(dict(net.state_dict()), tmp_path) == {"n": NormKind.BATCH_NORM}


def test_detectron2s_frozen_norm(fixtures: Path) -> None:
    with open_checkpoint(fixtures / "d2_like_frozenbn_v3.pth") as checkpoint:
        (norm,) = find_norms(checkpoint.state_dict(""))
        assert (norm.kind, norm.version) == (NormKind.FROZEN_BATCH_NORM, 3)


def test_facts_of_a_layer(tmp_path: Path) -> None:
    net = nn.DataParallel(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C, eps=1e-3, momentum=None)))
    torch.save(net.state_dict(), tmp_path / "s.pt")
    torch.save(net, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "s.pt") as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        assert (norm.name, norm.num_features, norm.eps, norm.eps_source) == ("1", C, None, EpsSource.UNKNOWN)
        assert (norm.momentum, norm.class_path, norm.version) == (None, "", 2)
        assert list(norm.tensors) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
        assert norm.affine
        assert norm.has_statistics
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        assert (norm.name, norm.eps, norm.eps_source) == ("1", 1e-3, EpsSource.MODULE)
        assert norm.class_path == "torch.nn.modules.batchnorm.BatchNorm2d"
        assert norm.attributes["num_features"] == C


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_is_one_norm(whole: bool, tmp_path: Path) -> None:
    net = nn.BatchNorm1d(C)
    assert _norms(net if whole else net.state_dict(), tmp_path) == {"": NormKind.BATCH_NORM}
    wrapped = nn.DataParallel(net)
    assert _norms(wrapped if whole else wrapped.state_dict(), tmp_path) == {"": NormKind.BATCH_NORM}


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_norms_are_not_initialised(tmp_path: Path) -> None:
    net = nn.ModuleDict({"n": nn.LazyBatchNorm2d()})
    torch.save(net.state_dict(), tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        (norm,) = find_norms(checkpoint.state_dict(""))
        assert norm.tensors["running_mean"].wrapper == "uninitialized"


@pytest.mark.parametrize("number", [10**400, -(10**400), float("nan"), float("inf"), "1e-3", None])
def test_numbers_that_no_layer_can_have(number: object, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    net[0].eps = net[0].momentum = number  # type: ignore[assignment]
    torch.save(net, tmp_path / "net.pt")
    with open_checkpoint(tmp_path / "net.pt") as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dicts[0])
    assert (norm.eps, norm.eps_source, norm.momentum) == (None, EpsSource.UNKNOWN, None)
