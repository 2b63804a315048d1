"""Folds that hold for one size or batch alone are left out; torch in float64 is the judge, at other sizes too."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bntool
from bntool.errors import BntoolError, VerificationError
from bntool.folding import live
from bntool.folding.other_forwards import other_inputs
from bntool.folding.other_forwards.other_inputs import find_other_inputs
from bntool.modules.calling import SecondCall
from tests.folding.folding_networks import Functional, largest_difference, randomise, reasons

EXACT = 1e-9


def image(batch: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=generator)


def build(forward, **modules: nn.Module) -> nn.Module:
    known = {"stem": nn.Conv2d(3, 6, 1), "bn": nn.BatchNorm2d(6), "down": nn.Conv2d(6, 4, 2, stride=2), **modules}
    return randomise(Functional(forward, **known).double())


def as_tensorflow(self, x):
    x = self.bn(torch.sigmoid(self.stem(x)))
    height, width = (max((math.ceil(size / 2) - 1) * 2 + 2 - size, 0) for size in x.shape[2:])
    return self.down(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def to_windows(self, x):
    x = self.bn(torch.sigmoid(self.stem(x)))
    height, width = x.shape[2:]
    if height % 8 or width % 8:
        x = F.pad(x, (0, -width % 8, 0, -height % 8))
    return self.down(x).softmax(3)


def for_several_samples(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(x) if len(x) > 1 else x)


def for_wide_images(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(x)) + (x.sigmoid() if x.shape[3] > 16 else 0)


def from_another_layer(self, x):
    one, two = (self.stem(x), self.other(x))[:: 1 if len(x) > 1 else -1]
    return torch.sigmoid(self.bn(one)) + torch.sigmoid(two)


def divided_by_the_width(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(x / x.shape[3])), torch.sigmoid(self.down(x))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("forward", "reason", "why"),
    [
        (as_tensorflow, "NOT_ADJACENT", "with 1x3x17x19 as input: sigmoid lies between; forward: constant_pad_nd"),
        (to_windows, "NOT_ADJACENT", "with 1x3x17x19 as input: sigmoid lies between; forward: constant_pad_nd"),
        (for_several_samples, "NEVER_REACHED", "with 1x3x17x19 as input: it did not run"),
        (for_wide_images, "SHARED_OUTPUT", "with 1x3x17x19 as input: the output of convolution (stem) is also read"),
    ],
)
def test_a_fold_that_does_not_hold_for_another_size_or_batch_is_left_out(forward, reason, why, wrapped) -> None:
    model = build(forward)
    result = bntool.fold(model, (image(),) if wrapped else image())
    assert reasons(result.plan) == {"bn": reason}
    assert result.plan.skips[0].detail.startswith(why)
    for other in (image(), image(1), image(3, 17, 19), image(1, 24, 18)):
        assert largest_difference(model, result.model, other) < EXACT


@pytest.mark.parametrize("forward", [as_tensorflow, to_windows, for_several_samples, for_wide_images])
def test_another_size_that_is_not_looked_at_is_noticed(forward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_inputs, "_is_same", lambda *_: True)
    with pytest.raises(VerificationError):  # the outputs are compared there, too
        bntool.fold(build(forward), image())
    monkeypatch.setattr(live, "find_other_inputs", lambda *_: [])
    model = build(forward)
    result = bntool.fold(model, image())
    assert max(largest_difference(model, result.model, other) for other in (image(1), image(1, 17, 19))) > 1e-6


def test_what_holds_for_all_sizes_stays_folded_beside_what_does_not() -> None:
    def forward(self, x):
        return as_tensorflow(self, torch.relu(self.bn2(self.conv(x))))

    model = build(forward, conv=nn.Conv2d(3, 3, 3, padding=1), bn2=nn.BatchNorm2d(3))
    result = bntool.fold(model, image())
    assert [fold.layer for fold in result.plan.folds] == ["bn2"]
    assert list(reasons(result.plan)) == ["bn"]
    for other in (image(), image(1, 17, 19)):
        assert largest_difference(model, result.model, other) < EXACT


def test_another_producer_for_another_batch_is_no_fold() -> None:
    model = build(from_another_layer, other=nn.Conv2d(3, 6, 1))
    result = bntool.fold(model, image())
    assert reasons(result.plan) == {"bn": "DATA_DEPENDENT"}
    assert result.plan.skips[0].detail == "with 1x3x17x19 as input other layers would take it"
    assert largest_difference(model, result.model, image(1)) == 0


def test_folds_with_other_numbers_for_other_sizes_are_left_out() -> None:
    model = build(divided_by_the_width)
    result = bntool.fold(model, image())
    for other in (image(), image(1, 17, 19)):
        assert largest_difference(model, result.model, other) < EXACT


def test_a_file_is_folded_by_what_holds_for_all_sizes(tmp_path) -> None:
    model, path, output = build(to_windows).float(), tmp_path / "net.pt", tmp_path / "folded.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(BntoolError, match="with 1x3x17x19 as input"):
        bntool.fold_checkpoint(path, output, model=model, input_shape=(2, 3, 16, 16))
    assert not output.exists()


def test_other_inputs_are_what_the_model_takes() -> None:
    def fixed(self, x):
        assert x.shape[2:] == (16, 16)
        return self.stem(x)

    def in_steps_of_32(self, x):
        assert not x.shape[2] % 32
        assert not x.shape[3] % 32
        return self.stem(x)

    def of_two(self, x, scale):
        return self.stem(x) * scale[:, None, None, None]

    def only_once(self, x):
        assert len(x) == 2
        assert x.shape[2:] == (16, 16)
        assert not hasattr(self, "done")
        self.done = True
        return self.stem(x)

    def shapes(forward, inputs):
        found = find_other_inputs(build(forward), inputs)
        given = [other[1] if isinstance(other, SecondCall) else other for other in found]
        return [[tuple(one.shape) for one in (other if isinstance(other, tuple) else (other,))] for other in given]

    assert shapes(fixed, image()) == [[(1, 3, 16, 16)]]
    assert shapes(fixed, image(1)) == [[(2, 3, 16, 16)]]
    assert shapes(in_steps_of_32, image(2, 64, 32)) == [[(1, 3, 96, 96)]]
    assert shapes(of_two, (image(), torch.ones(2, 1, dtype=torch.float64)[:, 0]))[0] == [(1, 3, 17, 19), (1,)]
    assert shapes(only_once, image()) == []


def at_first(self, x):
    x, first = self.stem(x), not hasattr(self, "done")
    self.done = True
    return torch.sigmoid(self.bn(x) if first else x)


def of_the_first_shape(self, x):
    self.shape = getattr(self, "shape", x.shape)
    return torch.sigmoid(self.bn(self.stem(x)) if x.shape == self.shape else self.stem(x))


def counted_in_a_buffer(self, x):
    self.count += 1
    return torch.sigmoid(self.bn(self.stem(x)) if self.count < 2 else self.stem(x))


def without_gradients(self, x):
    return torch.sigmoid(self.stem(x) if torch.is_grad_enabled() else self.bn(self.stem(x)))


def without_gradients_of_the_input(self, x):
    return torch.sigmoid(self.stem(x) if x.requires_grad else self.bn(self.stem(x)))


def with_channels_second(self, x):
    return torch.sigmoid(self.bn(self.stem(x)) if x.is_contiguous() else self.stem(x))


@pytest.mark.parametrize(
    "forward",
    [
        at_first,
        of_the_first_shape,
        counted_in_a_buffer,
        without_gradients,
        without_gradients_of_the_input,
        with_channels_second,
    ],
)
def test_a_fold_that_does_not_hold_for_a_second_call_or_with_gradients_is_left_out(forward) -> None:
    model = build(forward)
    model.register_buffer("count", torch.zeros(()))
    result = bntool.fold(model, image())
    assert reasons(result.plan) == {"bn": "NEVER_REACHED"}
    assert " (channels last) of a second call that records gradients: it did not run" in result.plan.skips[0].detail
    for one in (model, result.model):
        one(image())
    last = image().contiguous(memory_format=torch.channels_last).requires_grad_()
    for inputs in (last, image(1)):
        torch.testing.assert_close(result.model(inputs), model(inputs), rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("convolution", "norm", "shape"),
    [(nn.Conv1d, nn.BatchNorm1d, (2, 3, 9)), (nn.Conv3d, nn.BatchNorm3d, (2, 3, 5, 4, 3))],
)
def test_positions_along_any_number_of_axes_are_given_with_channels_last(convolution, norm, shape) -> None:
    model = build(with_channels_second, stem=convolution(3, 6, 1), bn=norm(6))
    result = bntool.fold(model, torch.randn(shape, dtype=torch.float64))
    assert reasons(result.plan) == {"bn": "NEVER_REACHED"}
    assert " (channels last) of a second call" in result.plan.skips[0].detail


def test_gradients_and_further_calls_that_decide_nothing_are_no_hindrance() -> None:
    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.stem, x, use_reentrant=False)
        x.mul_(2)
        self.cache = getattr(self, "cache", torch.ones(1, 6, 1, 1, dtype=x.dtype))
        return torch.sigmoid(self.bn(x)) * self.cache

    model = build(forward)
    result = bntool.fold(model, image())
    assert result.plan.layers == ("bn",)
    assert isinstance(find_other_inputs(model, image())[0], SecondCall)
    assert largest_difference(model, result.model, image(1, 17, 19)) < EXACT


def of_a_list(self, images):
    features = [self.stem(one) for one in images]
    return torch.sigmoid(self.bn(features[0])) if len(images) > 1 else features[0].sigmoid()


def of_a_nest(self, nest):
    x = self.stem(nest["image"])
    return torch.sigmoid(self.bn(x) if len(x) > 1 else x)


def of_equal_images(self, one, other):
    x, y = self.stem(one), self.stem(other)
    return torch.sigmoid(self.bn(x) if x.shape == y.shape else x) + y.mean()


def beside_a_vector(self, x, times):
    x = self.stem(x)
    return torch.sigmoid(self.bn(x) if len(x) > 1 else x) * times.reshape(-1, 1, 1, 1)


def beside_boxes(self, x, boxes):
    x = self.stem(x)
    return torch.sigmoid(self.bn(x) if len(x) > 1 else x), boxes @ boxes.T


@pytest.mark.parametrize(
    ("forward", "given", "other"),
    [
        (of_a_list, ([image(), image()],), ([image()],)),
        (of_a_list, ((image(), image(2, 8)),), ((image(),),)),
        (of_a_nest, ({"image": image()},), ({"image": image(1)},)),
        (of_equal_images, (image(), image()), (image(), image(2, 20, 24))),
        (beside_a_vector, (image(), torch.tensor(2.0)), (image(1), torch.tensor(2.0))),
        (beside_a_vector, (image(), torch.ones(1)), (image(1), torch.ones(1))),
        (beside_a_vector, (image(), torch.ones(2)), (image(1), torch.ones(1))),
        (beside_boxes, (image(), image()[0, 0, :3]), (image(1), image()[0, 0, :3])),
    ],
)
def test_inputs_in_nests_and_beside_others_are_varied(forward, given, other) -> None:
    model = build(forward)
    result = bntool.fold(model, given)
    assert list(reasons(result.plan)) == ["bn"]
    for inputs in (given, other):
        assert largest_difference(model, result.model, inputs) < EXACT


def nonzero(x):
    return (x > 1).nonzero().shape[0]


def masked(x):
    return len(x[x > 1])


def unique(x):
    return x.round().unique().numel()


def derived(x):
    return (x[x > 1] * 2).sort()[0].size(0)


def looped(x):
    return sum(1 for _ in x[x > 1])


def zeros(x):
    return torch.zeros_like(x[x > 1]).shape[0]


@pytest.mark.parametrize("size", [nonzero, masked, unique, derived, looped, zeros])
def test_a_size_that_values_decide_is_a_look_at_values(size) -> None:
    def forward(self, x):
        y = self.stem(x)
        return torch.sigmoid(self.bn(y)) if size(x) > 2 else torch.sigmoid(y)

    result = bntool.fold(build(forward), image())
    assert reasons(result.plan) == {"bn": "DATA_DEPENDENT"}
    assert f"(Tensor.shape in {__file__}:" in result.plan.skips[0].detail


def test_sizes_that_no_value_decides_are_free_to_look_at() -> None:
    def forward(self, x):
        y = self.stem(x)
        y = y[:, torch.arange(6) >= 0]  # a mask of no data
        mean = x[x > 1].mean()  # of a size that nobody asks for
        return torch.sigmoid(self.bn(y)) * mean if y.shape[1] == 6 and len(y) else y

    model = build(forward)
    result = bntool.fold(model, image())
    assert reasons(result.plan).get("bn") != "DATA_DEPENDENT"
    assert largest_difference(model, result.model, image(1, 17, 19)) < EXACT
