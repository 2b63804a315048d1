"""Pairs from the command line and from files, and pairs that names suggest."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.errors import CorruptFileError, RefusedError, UnreadableFileError, UsageError
from bntool.folding.options import FoldOptions
from bntool.folding.planning import plan_fold
from bntool.graphs.declared import declare, read_pairs, suggest_pairs
from bntool.modules.application import read_state
from bntool.plan import SkipReason


def test_pairs_are_read_from_a_file_and_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_bytes("\ufeff# stem\r\nconv1 = bn1\r\n\r\nlayer.0=layer.1\r\n".encode())
    assert read_pairs([f"@{path}", "fc=norm"]) == {"bn1": "conv1", "layer.1": "layer.0", "norm": "fc"}


@pytest.mark.parametrize(
    ("content", "message"), [(b"conv1\n", "of the form"), (b"a=b\nc=b", "another pair"), (b"\xff\xfe", "UTF-8")]
)
def test_a_bad_file_of_pairs_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pairs.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_pairs([f"@{path}"])


def test_an_absent_file_of_pairs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"absent\.txt"):
        read_pairs([f"@{tmp_path / 'absent.txt'}"])


def test_names_suggest_only_what_channels_allow() -> None:
    block = nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 4, 1),
            "bn1": nn.BatchNorm2d(4),
            "conv2": nn.Conv2d(4, 5, 1),
            "bn2": nn.BatchNorm2d(4),  # reads something else
            "stem": nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)),
            "neck": nn.Linear(4, 8),
            "neck_bn": nn.BatchNorm1d(8),
            "alone": nn.BatchNorm1d(8),
        }
    )
    assert suggest_pairs(read_state(block)) == {"bn1": "conv1", "stem.1": "stem.0", "neck_bn": "neck"}


@pytest.mark.parametrize("part", ["conv.weight", "bn.weight"])
def test_a_tensor_that_lies_under_two_names_is_left_alone(tmp_path: Path, part: str) -> None:
    """Both names would be loaded into the one parameter of the module, and the old elements last."""
    tensors = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)}).state_dict()
    torch.save({**tensors, "again": tensors[part]}, tmp_path / "tied.pt")
    torch.save({**tensors, "again": tensors[part].clone()}, tmp_path / "apart.pt")
    torch.save({"model": tensors, "model_ema": {**tensors}}, tmp_path / "averaged.pt")
    reasons = {}
    for name in ("tied", "apart", "averaged"):
        with open_checkpoint(tmp_path / f"{name}.pt") as checkpoint:
            state_dict = choose_state_dict(checkpoint)
            plan = plan_fold(state_dict, declare(state_dict, {"bn": "conv"}), FoldOptions(eps=1e-5))
            reasons[name] = [skip.reason for skip in plan.skips]
    assert reasons == {"tied": [SkipReason.REUSED], "apart": [], "averaged": []}


@pytest.mark.parametrize("part", ["conv.bias", "bn.weight", "bn.bias"])
@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_what_the_model_computes_is_left_alone(tmp_path: Path, part: str, how: str) -> None:
    """The tensor is not in the file: folded as if it were 1 or 0, the result would be wrong."""
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)})
    layer, role = part.split(".")
    if how == "pruned":
        prune.l1_unstructured(model[layer], role, 0.5)
    else:
        parametrize.register_parametrization(model[layer], role, nn.Softplus())
    torch.save(model.state_dict(), tmp_path / "computed.pt")
    with open_checkpoint(tmp_path / "computed.pt") as checkpoint:
        state_dict = choose_state_dict(checkpoint)
        plan = plan_fold(state_dict, declare(state_dict, {"bn": "conv"}), FoldOptions(eps=1e-5))
    (skip,) = plan.skips
    assert skip.reason is SkipReason.COMPUTED_WEIGHT
    assert not plan.steps


@pytest.mark.parametrize(
    "other",
    [
        "conv.lora_A",  # loralib: W + B A
        "conv.weight_orig",
        "conv.parametrizations.weight.original",
        "conv.u0",  # BigGAN: W / sigma(W)
        "conv.alpha",  # LSQ: rounded by a scale
        "conv.gain",
        "conv.weight_fake_quant.scale",
        "conv.activation_post_process.scale",
        "conv.routing_fn.weight",
        "bn.weight_orig",
        "bn.alpha",
        "bn.embed.weight",  # conditional BatchNorm
    ],
)
def test_what_else_belongs_to_a_layer_may_change_what_it_computes(other: str) -> None:
    """A weight that is scaled beside them would not scale what the model computes from both."""
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)})
    state_dict = read_state(model)
    tensors = {**state_dict.tensors, other: state_dict.tensors["bn.weight"]}
    changed = dataclasses.replace(state_dict, tensors=tensors)
    plan = plan_fold(changed, declare(changed, {"bn": "conv"}), FoldOptions(eps=1e-5))
    assert [(skip.reason, other in skip.detail) for skip in plan.skips] == [(SkipReason.COMPUTED_WEIGHT, True)]
    assert not plan.steps


@pytest.mark.parametrize("adapter", ["lora_A.default.weight", "modules_to_save.default.weight"])
def test_a_layer_inside_of_an_adapter_is_left_alone(adapter: str) -> None:
    inner = "base_layer" if adapter.startswith("lora") else "original_module"
    wrapped = nn.ModuleDict({inner: nn.Conv2d(3, 4, 1)})
    state_dict = read_state(nn.ModuleDict({"conv": wrapped, "bn": nn.BatchNorm2d(4)}))
    tensors = {**state_dict.tensors, f"conv.{adapter}": state_dict.tensors["bn.weight"]}
    changed = dataclasses.replace(state_dict, tensors=tensors)
    plan = plan_fold(changed, declare(changed, {"bn": f"conv.{inner}"}), FoldOptions(eps=1e-5))
    assert [skip.reason for skip in plan.skips] == [SkipReason.COMPUTED_WEIGHT]


def test_what_runs_around_a_layer_or_never_is_in_no_way() -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.norm = nn.BatchNorm2d(4)  # as detectron2 has it
    conv.activation = nn.PReLU()
    conv.conv_offset = nn.Conv2d(3, 18, 3)
    conv.register_buffer("mask", torch.ones(4, 3, 3, 3))
    conv.register_buffer("total_ops", torch.zeros(1))
    state_dict = read_state(nn.ModuleDict({"conv": conv}))
    plan = plan_fold(state_dict, declare(state_dict, {"conv.norm": "conv"}), FoldOptions(eps=1e-5))
    assert not plan.skips
    assert plan.steps


@pytest.mark.parametrize(
    ("name", "shape", "refused"),
    [
        ("deconv_layers.3", (4, 4, 3, 3), True),
        ("up1.up", (4, 4, 3, 3), True),
        ("neck.4", (4, 4, 4, 4), True),
        ("upsample.conv_transpose", (4, 2, 2, 2), True),  # in two groups
        ("neck.4", (4, 4, 3, 3), False),
        ("up1.double_conv.3", (4, 4, 3, 3), False),
        ("up", (4, 8, 3, 3), False),
        ("deconv", (4, 1, 4, 4), False),  # each channel by itself
    ],
)
def test_a_weight_that_may_be_a_transposed_one_is_refused(name: str, shape: tuple[int, ...], refused: bool) -> None:
    """Its output channels would lie on the other axis, and the shapes do not tell."""
    state_dict = read_state(nn.BatchNorm2d(4))
    tensors = {f"bn.{role}": tensor for role, tensor in state_dict.tensors.items()}
    (weight,) = read_state(nn.ParameterDict({"weight": torch.ones(shape)})).tensors.values()
    changed = dataclasses.replace(state_dict, tensors={**tensors, f"{name}.weight": weight})
    with pytest.raises(RefusedError, match="transposed") if refused else contextlib.nullcontext():
        declare(changed, {"bn": name})


@pytest.mark.parametrize("name", ["bn.running_var", "conv.bias"])
def test_vectors_of_different_lengths_are_named(tmp_path: Path, name: str) -> None:
    tensors = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)}).state_dict()
    torch.save({**tensors, name: torch.ones(5)}, tmp_path / "uneven.pt")
    with open_checkpoint(tmp_path / "uneven.pt") as checkpoint, pytest.raises(CorruptFileError, match="4 and 5"):
        declare(choose_state_dict(checkpoint), {"bn": "conv"})
