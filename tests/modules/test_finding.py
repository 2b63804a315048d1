"""Finding BatchNorm in live models."""

import torch
from torch import nn

from bntool.modules.finding import (
    find_batchnorm_modules,
    find_names,
    find_wrapper_prefix,
    is_frozen_class,
    is_uninitialized,
)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 write it."""

    def __init__(self, channels):
        super().__init__()
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), fill))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: a BatchNorm with what follows it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class BatchRenorm2d(nn.BatchNorm2d):
    pass


def test_every_kind_is_found_and_no_relative():
    model = nn.ModuleDict(
        {
            "one": nn.BatchNorm1d(2),
            "two": nn.BatchNorm2d(2),
            "three": nn.BatchNorm3d(2),
            "sync": nn.SyncBatchNorm(2),
            "act": BatchNormAct2d(2),
            "frozen": FrozenBatchNorm2d(2),
            "plain": nn.BatchNorm2d(2, affine=False),
            "untracked": nn.BatchNorm2d(2, track_running_stats=False),
            "lazy": nn.LazyBatchNorm2d(),
            "instance": nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
            "lazy_instance": nn.LazyInstanceNorm2d(affine=True, track_running_stats=True),
            "layer": nn.LayerNorm(2),
            "group": nn.GroupNorm(1, 2),
            "renorm": BatchRenorm2d(2),
        }
    )
    found = find_batchnorm_modules(model)
    assert list(found) == ["one", "two", "three", "sync", "act", "frozen", "plain", "untracked", "lazy"]
    assert [name for name, module in found.items() if is_frozen_class(module)] == ["frozen"]
    assert [name for name, module in found.items() if is_uninitialized(module)] == ["lazy"]


def test_a_shared_module_is_found_once_under_its_first_name():
    shared = nn.BatchNorm2d(2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(find_batchnorm_modules(model)) == ["0"]
    assert find_names(model)[shared] == ("0", "2")


def test_a_model_that_is_a_batchnorm_has_an_empty_name():
    assert list(find_batchnorm_modules(nn.BatchNorm2d(2))) == [""]


def test_overridden_modules_and_cycles_do_not_matter():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(2)
            self.child = nn.Sequential(nn.BatchNorm1d(2))
            self.child._modules["parent"] = self

        def modules(self):
            return iter(())

        def named_modules(self, *_args, **_kwargs):
            return iter(())

    assert list(find_batchnorm_modules(Odd())) == ["bn", "child.0"]


def test_the_prefix_of_wrappers():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert find_wrapper_prefix(net) == ""
    assert find_wrapper_prefix(nn.DataParallel(net)) == "module."
    assert find_wrapper_prefix(torch.optim.swa_utils.AveragedModel(net)) == "module."
