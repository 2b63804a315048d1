"""Whatever is borrowed is given back."""

import pytest
import torch
from torch import nn

from bntool.modules.borrowing import borrow


def build():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.BatchNorm2d(2, momentum=None))
    model[1].eval()
    model[0].weight.requires_grad_(requires_grad=False)
    model[3].running_var[0] = float("nan")
    return model


def snapshot(model):
    return {
        "modes": [m.training for m in model.modules()],
        "momentum": [getattr(m, "momentum", 0) for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "buffers": [(id(b), b.clone()) for b in model.buffers()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "vars": [set(vars(m)) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(torch.nan_to_num(a.float(), 77), torch.nan_to_num(b.float(), 77))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_given_back(error):
    model = build()
    before = snapshot(model)
    try:
        with borrow(model) as borrowed:
            model.train()
            borrowed.add_forward_hook(model[1], lambda *_: None)
            borrowed.add_forward_pre_hook(model[1], lambda *_: None)
            borrowed.set_attribute(model[1], "momentum", 1.0)
            borrowed.set_attribute(model[2], "note", 1)
            model(torch.randn(2, 1, 8, 8))
            model[1].running_mean = torch.ones(2)
            model[3].reset_running_stats()
            for parameter in model.parameters():
                parameter.requires_grad_()
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    after = snapshot(model)
    assert all(same(before[key], after[key]) for key in before)


def test_shared_modules_and_lazy_ones():
    shared = nn.BatchNorm2d(2)
    model = nn.Sequential(shared, shared, nn.LazyBatchNorm2d())
    with borrow(model):
        model.eval()
        shared.running_mean.fill_(3)
    assert shared.training
    assert torch.equal(shared.running_mean, torch.zeros(2))
