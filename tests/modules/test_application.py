"""Steps of a plan on a live module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bntool.errors import UsageError
from bntool.folding.live import fold
from bntool.modules.application import apply_plan, change_structure, read_state
from bntool.plan import AddTensor, Operation, Plan, RemoveModule, RemoveTensor, Scaled, SetAttribute, SetTensor, Values


def plan(*steps) -> Plan:
    return Plan(Operation.FOLD, steps=steps)


def test_each_kind_of_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    weight = model[0].weight.detach().clone()
    steps = (
        SetTensor("0.weight", Scaled("0.weight", view=(2, 3, 1, 1), factors=(2.0, 3.0), factor_shape=(2, 1, 1, 1))),
        AddTensor("0.bias", Values((0.5, -1.0), (2,)), dtype="float32", after="0.weight"),
        *(
            RemoveTensor(f"1.{name}")
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ),
        RemoveModule("1"),
        SetAttribute("2", "momentum", 0.5),
        SetAttribute("2", "weight.requires_grad", value=False),
    )
    apply_plan(model, plan(*steps))
    assert torch.equal(model[0].weight, weight * torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
    assert torch.equal(model[0].bias, torch.tensor([0.5, -1.0]))
    assert model[0].bias.requires_grad
    assert isinstance(model[1], nn.Identity)
    assert model[2].momentum == 0.5
    assert not model[2].weight.requires_grad


def test_a_model_that_lacks_the_layer() -> None:
    with pytest.raises(UsageError, match="no such module"):
        change_structure(nn.Sequential(nn.ReLU()), [RemoveModule("backbone.bn1")])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_live_tensors_read_as_their_bytes(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    tensor = read_state(model).tensor("weight")
    data = b"".join(tensor.chunks())
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=dtype).view(2, 3), model.weight)


def test_forward_hooks_of_a_folded_layer_stay_and_can_be_removed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    seen = []
    model[1].register_forward_hook(lambda _module, _args, _kwargs, output: seen.append(output), with_kwargs=True)
    doubling = model[1].register_forward_hook(lambda _module, _args, output: output * 2)
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    apply_plan(model, plan(*(RemoveTensor(f"1.{name}") for name in names), RemoveModule("1")))
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model(x), model[0](x) * 2)
    assert torch.equal(seen[-1], model[0](x))
    doubling.remove()
    assert torch.equal(model(x), model[0](x))


def test_a_hooked_model_is_folded_with_its_hooks() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
    model[1].running_mean.normal_()
    model[1].register_forward_hook(lambda _module, _args, output: output * 2)
    folded = fold(model, x).model
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(x), model(x))
