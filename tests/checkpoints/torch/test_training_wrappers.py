"""State dicts as torch's own wrappers leave them: compiled, sharded, averaged, several in one file, small dtypes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.checkpoints.tensors import StoredTensor, read_numbers
from bntool.plan import Operation, Plan, SetTensor, Values
from tests.checkpoints.samples import tiny_net

STEP = SetTensor("1.running_mean", Values((1.0, 2.0, 3.0, 4.0), (4,)))


def _compiled() -> dict[str, Any]:
    return dict(torch.compile(tiny_net(), backend="eager").state_dict())


def _averaged() -> dict[str, Any]:
    return dict(torch.optim.swa_utils.AveragedModel(tiny_net(), use_buffers=True).state_dict())


def _parallel() -> dict[str, Any]:
    return dict(nn.DataParallel(torch.compile(tiny_net(), backend="eager")).state_dict())


def _sharded() -> dict[str, Any]:
    """The names that FullyShardedDataParallel shows where its hooks do not clean them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        try:
            wrapped = FullyShardedDataParallel(tiny_net(), device_id=torch.device("cpu"), use_orig_params=True)
            names = [name for name, _ in nn.Module.named_parameters(wrapped)]
        finally:
            torch.distributed.destroy_process_group()
    prefix = names[0].removesuffix("0.weight")
    return {prefix + name: tensor for name, tensor in tiny_net().state_dict().items()}


@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (_compiled, "_orig_mod."),
        (_averaged, "module."),
        (_parallel, "module._orig_mod."),
        (_sharded, "_fsdp_wrapped_module."),
    ],
)
def test_prefixes_are_left_out_of_names_and_kept_in_the_file(make: Any, prefix: str, tmp_path: Path) -> None:
    state = make()
    torch.save(state, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        state_dict = checkpoint.state_dict("")
        assert state_dict.prefix == prefix
        assert [norm.name for norm in find_batchnorms(state_dict)] == ["1"]
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=(STEP,))), tmp_path / "new.pt")
    found = torch.load(tmp_path / "new.pt", weights_only=True)
    assert list(found) == list(state)
    assert found[f"{prefix}1.running_mean"].tolist() == [1, 2, 3, 4]


def test_several_models_in_one_file(tmp_path: Path) -> None:
    models = {name: tiny_net().state_dict() for name in ("generator", "discriminator", "generator_ema")}
    torch.save({**models, "epoch": 5}, tmp_path / "gan.pt")
    with open_checkpoint(tmp_path / "gan.pt") as checkpoint:
        assert [s.key for s in checkpoint.state_dicts] == list(models)
        assert choose_state_dict(checkpoint).key == "generator"
        plan = Plan(Operation.RECALIBRATE, state_dict="discriminator", steps=(STEP,))
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.pt")
    found = torch.load(tmp_path / "new.pt", weights_only=True)
    for name, state in models.items():
        for key, tensor in state.items():
            changed = (name, key) == ("discriminator", "1.running_mean")
            assert torch.equal(found[name][key], tensor) != changed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype, tmp_path: Path) -> None:
    net = tiny_net().to(dtype)
    torch.save(net.state_dict(), tmp_path / "half.pt")
    with open_checkpoint(tmp_path / "half.pt") as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        assert read_numbers(norm.tensors["running_var"]) == tuple(net[1].running_var.double().tolist())
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=(STEP,))), tmp_path / "new.pt")
    assert torch.load(tmp_path / "new.pt", weights_only=True)["1.running_mean"].tolist() == [1, 2, 3, 4]


def test_small_floats_quantized_and_sparse_entries_are_shown_and_passed_through(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        state = {
            **tiny_net().state_dict(),
            "a.weight": torch.linspace(-2, 2, 8).to(torch.float8_e4m3fn),
            "b.weight": torch.quantize_per_tensor(torch.randn(3, 2), 0.1, 2, torch.qint8),
            "c.weight": torch.eye(3).to_sparse(),
        }
        torch.save(state, tmp_path / "mixed.pt")
        with open_checkpoint(tmp_path / "mixed.pt") as checkpoint:
            tensors = checkpoint.state_dict("").tensors
            shown = [(t.dtype.name, t.shape, t.wrapper) for t in tensors.values() if isinstance(t, StoredTensor)][-3:]
            assert shown == [
                ("float8_e4m3fn", (8,), None),
                ("qint8", (3, 2), "quantized"),
                ("float32", (3, 3), "sparse"),
            ]
            save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=(STEP,))), tmp_path / "new.pt")
        found = torch.load(tmp_path / "new.pt", weights_only=False)
        assert torch.equal(found["a.weight"].float(), state["a.weight"].float())
        assert torch.equal(found["b.weight"].int_repr(), state["b.weight"].int_repr())
        assert torch.equal(found["c.weight"].to_dense(), torch.eye(3))
