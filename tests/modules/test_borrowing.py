"""Whatever is borrowed is given back."""

import pytest
import torch
from torch import nn

from bntool.errors import RefusedError
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


class PreparesItself(nn.Module):
    """A first forward that adds something of each kind, and says so in a flag."""

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.calls = {"forward": 0}
        self.kept = []

    def forward(self, x):
        if not getattr(self, "_prepared", False):
            self._prepared = True
            for module in (self.conv, self.other):
                module.register_forward_hook(lambda _m, _a, out: self.kept.append(out))
                module.register_forward_pre_hook(lambda *_: None, with_kwargs=False)
                module.register_full_backward_hook(lambda *_: None)
                module.register_state_dict_post_hook(lambda *_: None)
                module._marked = True
            torch.nn.utils.parametrize.register_parametrization(self.other, "weight", nn.Identity())
            self.register_buffer("step", torch.zeros(1), persistent=False)
            self.extra = nn.Conv2d(4, 4, 1)
            self.conv.weight.data = self.conv.weight.data * 2
            self.scale.data.copy_(torch.full((4,), 3.0))
            self.scale.note = None
            torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        self.calls["forward"] += 1
        return self.norm(self.other(self.conv(x))) * self.scale.view(1, 4, 1, 1)


def describe(module):
    registries = {name: list(value) for name, value in vars(module).items() if isinstance(value, dict | set)}
    return type(module), registries, {name: id(value) for name, value in vars(module).items() if name != "training"}


def test_what_a_first_forward_adds_is_given_back_whole():
    model = PreparesItself()
    before = {name: describe(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = len(torch.nn.modules.module._global_forward_hooks)
    x = torch.randn(2, 3, 5, 5)
    for _ in range(2):
        with borrow(model):
            model(x)
            model(x)
            assert model.calls == {"forward": 2}
        assert {name: describe(module) for name, module in model.named_modules()} == before
        assert {name: torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()} == dict.fromkeys(
            state, True
        )
        assert (model.calls, model.kept) == ({"forward": 0}, [])
        assert len(torch.nn.modules.module._global_forward_hooks) == hooks


def test_own_hooks_stay_when_what_the_model_left_is_undone():
    model, seen = PreparesItself(), []
    with borrow(model) as borrowed:
        borrowed.add_forward_hook(model.norm, lambda *_: seen.append(1))
        borrowed.add_forward_pre_hook(model.norm, lambda *_: seen.append(2), with_kwargs=False)
        model(torch.randn(2, 3, 5, 5))
        borrowed.reset()
        assert not model.conv._forward_hooks
        model(torch.randn(2, 3, 5, 5))
    assert seen == [2, 1, 2, 1]
    assert not model.norm._forward_hooks


class WritesWeights(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


def test_a_forward_that_writes_to_a_large_parameter_is_told_apart():
    model = nn.Sequential(nn.Linear(4, 300), WritesWeights(300, 300))
    with pytest.raises(RefusedError, match=r"1\.weight: the forward writes to this parameter"), borrow(model):
        model(torch.randn(2, 4))
    small = WritesWeights(4, 4)
    before = small.weight.clone()
    with borrow(small):
        small(torch.randn(2, 4))
    assert torch.equal(small.weight, before)


def test_shared_modules_and_lazy_ones():
    shared = nn.BatchNorm2d(2)
    model = nn.Sequential(shared, shared, nn.LazyBatchNorm2d())
    with borrow(model):
        model.eval()
        shared.running_mean.fill_(3)
    assert shared.training
    assert torch.equal(shared.running_mean, torch.zeros(2))
