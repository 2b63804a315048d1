"""Weight ranges and subnormals as torch itself sees them in the folded tensors."""

from __future__ import annotations

import math
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bntool.checkpoints.arrays import as_bits
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.folding.options import FoldOptions
from bntool.folding.planning import plan_fold
from bntool.folding.state_dict import fold_state_dict
from bntool.folding.weight_ranges import ChannelRange, _RowExtremes, count_removed, measure_ranges
from bntool.graphs.traced.tracing import trace
from bntool.modules.application import apply_plan, read_state


def fold_and_measure(model: nn.Module, inputs: torch.Tensor):
    """The ranges, the removed elements and the folded model."""
    model.eval()
    old = read_state(model)
    plan = plan_fold(old, trace(model, inputs))
    folded = deepcopy(model)
    apply_plan(folded, plan)
    new = read_state(folded)
    return measure_ranges(old, new, plan), count_removed(old, new), folded


def randomise(norm: nn.Module, *, seed: int = 0) -> None:
    torch.manual_seed(seed)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 30)


def expected(by_channel: torch.Tensor) -> ChannelRange:
    """From a weight with output channels first."""
    largest = by_channel.detach().flatten(1).double().abs().amax(1)
    used = largest[largest > 0]
    return ChannelRange(float(used.min()), float(used.max()), float((used / used.max()).mean()))


def assert_close(found: ChannelRange, wanted: ChannelRange) -> None:
    for name in ("smallest", "largest", "evenness"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-6)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 3, 8, 8)),
        (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 8, 8)),
        (nn.Linear(5, 7), nn.BatchNorm1d(7), (4, 5)),
    ],
)
def test_ranges_are_those_of_the_tensors(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    randomise(norm)
    (found,), removed, folded = fold_and_measure(nn.Sequential(layer, norm), torch.randn(shape))
    assert found.name == "0.weight"
    assert_close(found.before, expected(layer.weight))
    assert_close(found.after, expected(folded[0].weight))
    size = norm.num_features
    assert removed.parameters == 2 * size - (size if layer.bias is None else 0)
    assert removed.buffers == 2 * size + 1


def test_grouped_transposed_convolutions_have_their_channels_elsewhere() -> None:
    layer, norm = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
    randomise(norm)
    (found,), _, folded = fold_and_measure(nn.Sequential(layer, norm), torch.randn(2, 4, 5, 5))

    def channels_first(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([half.transpose(0, 1) for half in weight.chunk(2)])

    assert_close(found.before, expected(channels_first(layer.weight)))
    assert_close(found.after, expected(channels_first(folded[0].weight)))


def test_a_fold_into_the_reader_is_measured_on_its_outputs() -> None:
    norm, layer = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 2)
    randomise(norm)
    (found,), _, folded = fold_and_measure(nn.Sequential(nn.ReLU(), norm, layer), torch.randn(2, 3, 6, 6))
    assert found.name == "2.weight"
    assert_close(found.after, expected(folded[2].weight))


def test_subnormal_elements_are_counted_as_torch_stores_them() -> None:
    layer, norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [2e-10, 1.0], [1e-20, 1.0]]).reshape(3, 2, 1, 1))
        norm.weight.copy_(torch.tensor([1.0, 1e-30, 1e-30]))
    (found,), _, folded = fold_and_measure(nn.Sequential(layer, norm), torch.randn(2, 2, 4, 4))
    weight = folded[0].weight.detach()
    subnormal = (weight != 0) & (weight.abs() < torch.finfo(torch.float32).tiny)
    assert (found.subnormal_before, found.subnormal) == (0, int(subnormal.sum())) == (0, 1)


def test_weights_that_become_uneven_are_told_from_dead_channels() -> None:
    layer, norm = nn.Conv2d(1, 32, 1), nn.BatchNorm2d(32)
    nn.init.ones_(layer.weight)
    with torch.no_grad():
        norm.weight.fill_(0.01)[0] = 1.0
    (found,), *_ = fold_and_measure(nn.Sequential(layer, norm), torch.randn(2, 1, 4, 4))
    assert found.is_uneven
    with torch.no_grad():
        norm.weight.fill_(1.0)[0] = 1e-12
    (found,), *_ = fold_and_measure(nn.Sequential(layer, norm), torch.randn(2, 1, 4, 4))
    assert found.after.largest / found.after.smallest > 1e10
    assert not found.is_uneven


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_of_a_file_are_measured_while_it_is_written(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_wider_than_a_chunk = nn.Linear(300_000, 2)
    model = nn.Sequential(
        nn.Conv2d(200, 300, 3, bias=False), nn.BatchNorm2d(300), rows_wider_than_a_chunk, nn.BatchNorm1d(2)
    )
    randomise(model[1])
    randomise(model[3], seed=1)
    with torch.no_grad():
        model[0].weight[7] = 0
        model[0].weight[8, 3] = 0
        model[1].weight[7] = model[1].weight[9] = 0
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    path, out = tmp_path / f"net.{kind}", tmp_path / f"out.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    pairs = {"1": "0", "3": "2"}
    with open_checkpoint(path) as checkpoint:
        dry = fold_state_dict(
            checkpoint, checkpoint.state_dicts[0], FoldOptions(eps=1e-5), pairs=pairs, tolerance=1e-5
        ).ranges
    asked: Counter[tuple[int, int]] = Counter()
    read_once = SourceFile._read_once

    def count(file: SourceFile, offset: int, length: int) -> bytes:
        if file.path == path:
            asked[offset, length] += 1
        return read_once(file, offset, length)

    monkeypatch.setattr(SourceFile, "_read_once", count)
    with open_checkpoint(path) as checkpoint:
        fold = fold_state_dict(
            checkpoint, checkpoint.state_dicts[0], FoldOptions(eps=1e-5), pairs=pairs, tolerance=1e-5
        )
        save_checkpoint(fold.checkpoint, out)
        large = {place: times for place, times in asked.items() if place[1] > 50_000}
        found = {weight.name: weight for weight in fold.ranges}
    assert len(large) >= 4
    if dtype is not torch.float16:  # read when the fold is planned, too: products may be too large for it
        assert set(large.values()) == {1}
    assert tuple(found.values()) == dry
    folded = load_file(out) if kind == "safetensors" else torch.load(out)
    for name in ("0.weight", "2.weight"):
        assert_close(found[name].before, expected(state[name]))
        for side in ("smallest", "largest"):  # of the products before they are rounded
            wanted = getattr(expected(folded[name]), side)
            facts = torch.finfo(dtype)
            spacing = facts.smallest_normal * facts.eps  # of the numbers that are too small to be normal
            assert getattr(found[name].after, side) == pytest.approx(wanted, rel=facts.eps, abs=spacing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_smallest_magnitude_of_a_row_passes_over_zeros(dtype: torch.dtype) -> None:
    """Of both signs, whatever else is in the row."""
    torch.manual_seed(0)
    rows = torch.randn(40, 30).to(dtype)
    rows[rows.abs() < 0.5] *= 0  # of both signs, too
    rows[3] = 0
    rows[4, 5] = -torch.finfo(dtype).smallest_normal / 4
    rows[6, 7], rows[8, 9] = float("nan"), -float("inf")
    kind = BY_NAME[str(dtype).removeprefix("torch.")]
    measured = _RowExtremes(len(rows), kind)
    for block in (rows[:17], rows[17:]):
        data = block.contiguous().view(torch.uint8).numpy().tobytes()
        largest = measured.add(as_bits(data, kind).reshape(block.shape))
        assert largest == block.abs().max() or (math.isnan(largest) and block.isnan().any())
    found = measured.result()
    magnitudes = rows.abs()
    assert torch.equal(torch.tensor(found.largest).to(dtype).nan_to_num(-1), magnitudes.amax(1).nan_to_num(-1))
    smallest = magnitudes.masked_fill((magnitudes == 0) | magnitudes.isnan(), float("inf")).amin(1)
    assert torch.equal(torch.tensor(found.smallest).to(dtype), smallest)
