"""Layers whose forward does something to what they are called with before it is normalised."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bntool.errors import RefusedError
from bntool.modules.borrowing import Borrowed
from bntool.recalibration.activations import Activations, InterruptedForwardError
from bntool.recalibration.live import recalibrate

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
def test_several_tensors_in_a_call_are_several_calls(method):
    norm, batches = Halves(3), make_batches((8, 3, 6, 6))
    assert recalibrate(norm, batches, method=method).statistics[""].calls == 6
    assert_stores(norm, [as_rows(x) for x in batches])


class Lately(nn.BatchNorm2d):
    """Begins to mask when it has seen something large."""

    def forward(self, x):
        return super().forward(x.clamp(max=2) if x.max() > 8 else x)


class Clamped(nn.BatchNorm2d):
    """Changes what it is called with, and nothing of the first samples."""

    def forward(self, x):
        return super().forward(x.clamp_(max=6.0))


class Detached(nn.BatchNorm2d):
    def forward(self, x):
        own = self.running_mean.data, self.running_var.detach()
        return F.batch_norm(x + 1, *own, self.weight, self.bias, False, 0.0, self.eps)


class Operator(nn.BatchNorm2d):
    def forward(self, x):
        return torch.ops.aten.batch_norm(
            x + 1, self.weight, self.bias, self.running_mean, self.running_var, False, 0.0, self.eps, False
        )


class Native(nn.BatchNorm2d):
    def forward(self, x):
        own = self.weight, self.bias, self.running_mean, self.running_var
        x, _, _ = torch.native_batch_norm(x + 1, *own, False, 0.0, self.eps)
        return x


class WrittenBack(nn.BatchNorm2d):
    """Its result takes the place of its input."""

    def forward(self, x):
        return x.copy_(super().forward(x + 1))


@METHODS
@pytest.mark.parametrize(
    ("build", "change"),
    [
        (Lately, lambda x: x.clamp(max=2) if x.max() > 8 else x),
        (Clamped, lambda x: x.clamp(max=6.0)),
        (Detached, lambda x: x + 1),
        (Operator, lambda x: x + 1),
        (Native, lambda x: x + 1),
        (WrittenBack, lambda x: x + 1),
    ],
)
def test_each_call_counts_as_it_is(build, change, method):
    norm, batches = build(3), make_batches((8, 3, 6, 6))
    recalibrate(norm, [x.clone() for x in batches], method=method)
    assert_stores(norm, [as_rows(change(x)) for x in batches])


class Nested(nn.BatchNorm2d):
    """Another BatchNorm runs inside of it, and both count their calls."""

    def __init__(self, channels):
        super().__init__(channels)
        self.inner, self.calls = nn.BatchNorm2d(channels), 0

    def forward(self, x):
        self.calls += 1
        seen.append(self.calls)
        return super().forward(self.inner(x) * 3 + 1)


seen = []


@METHODS
def test_a_forward_runs_once(method):
    norm, batches = Nested(3), make_batches((8, 3, 6, 6))
    seen.clear()
    result = recalibrate(norm, batches, method=method)
    assert seen == ([1, 2, 3] if method == "pooled" else [1, 1, 2, 3, 1])  # exact tries the model first and at the end
    assert [result.statistics[name].calls for name in ("", "inner")] == [3, 3]
    assert_stores(norm.inner, [as_rows(x) for x in batches])
    assert norm.calls == 0


class WrappedTensor:
    def __init__(self, features):
        self.features = features


class OfObjects(nn.BatchNorm2d):
    """As those of sparse convolutions."""

    def forward(self, wrapped):
        return WrappedTensor(super().forward(wrapped.features))


class Wrapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = OfObjects(3)

    def forward(self, x):
        return self.norm(WrappedTensor(x + 1)).features


@METHODS
def test_layers_that_are_called_with_objects(method):
    model, batches = Wrapping(), make_batches((8, 3, 6, 6))
    recalibrate(model, batches, method=method)
    assert_stores(model.norm, [as_rows(x + 1) for x in batches])


class ArithmeticOfCopy(nn.BatchNorm2d):
    def forward(self, x):
        x = x.contiguous().float() - self.running_mean.view(-1, 1, 1)
        return x * (self.running_var + self.eps).rsqrt().view(-1, 1, 1)


@METHODS
def test_arithmetic_on_a_copy_in_another_layout(method):
    norm, batches = ArithmeticOfCopy(3), make_batches((8, 3, 6, 6))
    recalibrate(norm, batches, method=method)
    assert_stores(norm, [as_rows(x) for x in batches])


class MyBatchNorm(nn.Module):
    """Has the name and the buffers of a BatchNorm, and is none of torch's."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x.relu(), self.running_mean, self.running_var)


@METHODS
def test_classes_that_are_none_of_torchs(method):
    norm, batches = MyBatchNorm(3), make_batches((8, 3, 6, 6))
    recalibrate(norm, batches, method=method)
    assert_stores(norm, [as_rows(x.relu()) for x in batches])


class Followed(nn.BatchNorm2d):
    """Logs its statistics, and another norm comes after it in the same module."""

    def __init__(self, channels):
        super().__init__(channels)
        self.post = nn.BatchNorm2d(channels)

    def forward(self, x):
        float(self.running_mean.norm())
        return self.post(super().forward(x).relu())


@METHODS
def test_another_kernel_is_not_held_against_a_layer(method):
    norm, batches = Followed(3), make_batches((8, 3, 6, 6))
    result = recalibrate(norm, batches, method=method)
    assert_stores(norm, [as_rows(x) for x in batches])
    assert set(result.statistics) == {"", "post"}


class Fused(nn.BatchNorm2d):
    """Its statistics are in the weights before it already."""

    def forward(self, x):
        return x.relu()


class OfTheSample(nn.BatchNorm2d):
    def forward(self, x):
        return torch.cat([F.batch_norm(row, None, None, self.weight, self.bias, training=True) for row in x.split(1)])


@METHODS
@pytest.mark.parametrize("build", [Fused, OfTheSample])
def test_a_layer_that_uses_no_statistics_is_left_alone(build, method):
    model, batches = nn.Sequential(build(3), nn.BatchNorm2d(3)), make_batches((8, 3, 6, 6))
    result = recalibrate(model, batches, method=method)
    assert [(skip.layer, skip.reason.value) for skip in result.plan.skips] == [("0", "not recognised")]
    assert list(result.statistics) == ["1"]


class ScaleFirst(nn.BatchNorm2d):
    def forward(self, x):
        scale = (self.running_var + self.eps).rsqrt().view(-1, 1, 1)
        x = x.relu()
        return (x - self.running_mean.view(-1, 1, 1)) * scale


class ScaleFirstInPlace(nn.BatchNorm2d):
    def forward(self, x):
        scale = (self.running_var + self.eps).rsqrt().view(-1, 1, 1)
        x.relu_()
        return (x - self.running_mean.view(-1, 1, 1)) * scale


class Bypassed(nn.BatchNorm2d):
    def forward(self, x):
        return x


@METHODS
def test_a_layer_that_does_nothing_is_left_alone(method):
    model, batches = nn.Sequential(Bypassed(3), nn.BatchNorm2d(3)), make_batches((8, 3, 6, 6))
    result = recalibrate(model, batches, method=method)
    assert [(skip.layer, skip.reason.value) for skip in result.plan.skips] == [("0", "not recognised")]
    assert_stores(model[1], [as_rows(x) for x in batches])


class ArithmeticOfOther(nn.BatchNorm2d):
    def forward(self, x):
        x = torch.relu(x) - self.running_mean.view(-1, 1, 1)
        return x * (self.running_var + self.eps).rsqrt().view(-1, 1, 1)


class ReadFirst(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x / (1 + self.running_var.mean()))


class ReadThenWritten(nn.BatchNorm2d):
    def forward(self, x):
        assert self.running_var.min() > 0
        return super().forward(x.mul_(2))


class Checking(nn.BatchNorm2d):
    """Looks at its statistics before it normalises by them."""

    def forward(self, x):
        assert torch.isfinite(self.running_var).all()
        assert self.running_mean.abs().max() < 1e6
        mean, variance = self.running_mean.to(x.dtype), self.running_var.clamp(min=1e-6)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)


@METHODS
def test_a_layer_may_look_at_its_statistics_first(method):
    model, batches = nn.Sequential(Checking(3), nn.BatchNorm2d(3)), make_batches((8, 3, 6, 6))
    result = recalibrate(model, batches, method=method)
    assert_stores(model[0], [as_rows(x) for x in batches])
    assert result.statistics["0"].calls == 3
    if method == "exact":  # what follows saw what these statistics give
        assert_stores(model[1], [as_rows(model[0](x).detach()) for x in batches])


@METHODS
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (ArithmeticOfOther, "normalises something else than it is called with"),
        (ReadFirst, "reads its statistics before it normalises something else"),
        (ScaleFirst, "normalises something else than it is called with"),
        (ScaleFirstInPlace, "changes what it normalises after it has read its statistics"),
        (ReadThenWritten, "reads its statistics before it normalises something else"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(build, message, method):
    model = nn.Sequential(nn.Identity(), build(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RefusedError, match=f"^1: this layer {message}"):
        recalibrate(model, make_batches((8, 3, 6, 6)), method=method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Forgiving(nn.Module):
    """Goes another way where a layer raises."""

    def __init__(self):
        super().__init__()
        self.norm, self.other = ReadFirst(3), nn.BatchNorm2d(3)

    def forward(self, x):
        try:
            return self.other(self.norm(x))
        except:  # noqa: E722
            return self.other(x)


@METHODS
def test_a_model_cannot_swallow_a_refusal(method):
    with pytest.raises(RefusedError, match="reads its statistics before"):
        recalibrate(Forgiving(), make_batches((8, 3, 6, 6)), method=method)


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


def test_of_two_refusals_in_threads_of_a_model_the_first_is_told():
    activations = Activations({}, Borrowed([]), lambda *_: None, called=set())
    for layer in ("first", "second"):
        with pytest.raises(InterruptedForwardError):
            activations._refuse(layer, "cannot be")
    with pytest.raises(RefusedError, match="first: this layer cannot be"), activations.watching():
        pass
