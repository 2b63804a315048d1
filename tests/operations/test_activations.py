"""Layers whose forward does something to what they are called with before it is normalised."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bntool.errors import RefusedError
from bntool.operations.recalibration import recalibrate

torch.set_num_threads(1)
METHODS = pytest.mark.parametrize("method", ["pooled", "exact"])


def make_batches(shape, *, count=3):
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(shape[1], dtype=torch.float32).view(-1, *[1] * (len(shape) - 2))
    return [torch.randn(shape, generator=generator) * (i + 1) + steps + i for i in range(count)]


def assert_stores(norm, values):
    """That a layer stores the moments of values of shape (n, channels)."""
    values = torch.cat(values).double()
    torch.testing.assert_close(norm.running_mean.double(), values.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), values.var(0), rtol=1e-5, atol=1e-6)


def as_rows(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1])


class Rectified(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(torch.relu(x))


class InPlace(nn.BatchNorm2d):
    """Normalises the very tensor that it is called with, after changing it."""

    def forward(self, x):
        return super().forward(x.mul_(2))


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: what follows does not matter."""

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return x.relu_()


class NamedArguments(nn.BatchNorm2d):
    def forward(self, x):
        x = x + 1
        return torch.batch_norm(
            weight=self.weight, bias=self.bias, running_mean=self.running_mean, running_var=self.running_var,
            training=False, momentum=0.0, eps=self.eps, cudnn_enabled=False, input=x,
        )  # fmt: skip


class Arithmetic(nn.BatchNorm2d):
    """Calls no kernel."""

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class ForEight(nn.BatchNorm2d):
    """Wants eight samples or more."""

    def forward(self, x):
        return super().forward(x.view(-1, 8, *x.shape[1:]).roll(1, 1).flatten(0, 1) + 1)


@METHODS
@pytest.mark.parametrize(
    ("build", "change"),
    [
        (Rectified, torch.relu),
        (InPlace, lambda x: 2 * x),
        (Activated, lambda x: x),
        (NamedArguments, lambda x: x + 1),
        (Arithmetic, lambda x: x),
        (ForEight, lambda x: x + 1),
    ],
)
def test_what_the_kernel_is_given_is_measured(build, change, method):
    norm, batches = build(3), make_batches((8, 3, 6, 6))
    before = [x.clone() for x in batches]
    recalibrate(nn.Sequential(nn.Identity(), norm), [x.clone() for x in batches], method=method)
    assert_stores(norm, [as_rows(change(x)) for x in batches])
    assert all(torch.equal(x, y) for x, y in zip(before, batches, strict=True))


class Transposing(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@METHODS
@pytest.mark.parametrize("length", [5, 4])  # as many as channels: no shape tells which are which
def test_channels_in_the_last_dimension(method, length):
    norm, batches = Transposing(5), [x.transpose(1, 2) for x in make_batches((8, 5, length))]
    recalibrate(norm, batches, method=method)
    assert_stores(norm, [x.reshape(-1, 5) for x in batches])


class Masked(nn.BatchNorm1d):
    def forward(self, x, mask):
        result = torch.zeros_like(x)
        result[mask] = super().forward(x[mask])
        return result


class MaskedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Masked(4)

    def forward(self, x):
        return self.norm(x, mask=x[:, 0] > 0.5)


@METHODS
def test_masked_values_do_not_count(method):
    model, batches = MaskedModel(), make_batches((16, 4))
    batches[0][:, 0] = 1.0  # nothing is masked in the first batch
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, [x[x[:, 0] > 0.5] for x in batches])


class Halves(nn.BatchNorm2d):
    def forward(self, x):
        return torch.cat([super(Halves, self).forward(part) for part in x.chunk(2)])


@METHODS
def test_several_tensors_in_a_call_are_refused_by_name(method):
    with pytest.raises(RefusedError, match="1: this layer normalises 2 tensors in one call"):
        recalibrate(nn.Sequential(nn.Identity(), Halves(3)), make_batches((8, 3, 6, 6)), method=method)


@METHODS
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.5 cannot leave compiled code aside")
def test_layers_of_a_compiled_model(method):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 3, 3), Rectified(3), nn.Conv2d(3, 3, 3), InPlace(3), nn.BatchNorm2d(3))

    plain, inner, batches = build(), build(), make_batches((8, 3, 9, 9))
    recalibrate(plain, batches, method=method)
    recalibrate(torch.compile(inner, backend="eager", fullgraph=True), batches, method=method)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(inner.state_dict()[name], tensor)
