"""Exact statistics with a part of the activations in a file: the same bits, whatever the memory."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn

from bntool.data.batches import split_batch
from bntool.errors import RefusedError, UsageError, UserCodeError
from bntool.recalibration.exact import reading
from bntool.recalibration.exact.memory import find_resident
from bntool.recalibration.exact.offloading import HeldStorages, MovableBatch, Offloading, _Regions
from bntool.recalibration.live import recalibrate
from bntool.recalibration.options import parse_size


class Residual(nn.Module):
    def __init__(self, width=16, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + torch.relu(norm(conv(x)))
        return x


def make_batches(count=6, size=4, pixels=48):
    return list(torch.randn(count * size, 3, pixels, pixels, generator=torch.Generator().manual_seed(1)).split(size))


def statistics_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name or "num" in name}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def moved(monkeypatch):
    """How many bytes were set aside."""
    sizes = []
    put = Offloading.put
    monkeypatch.setattr(
        Offloading, "put", lambda self, s, **options: (sizes.append(s.nbytes()), put(self, s, **options))[1]
    )
    return sizes


@pytest.mark.parametrize("share", [0.9, 0.5, 0.0])
def test_statistics_are_the_same_bits(share, moved, monkeypatch):
    wanted = Residual()
    recalibrate(wanted, make_batches(), method="exact")
    model, said = Residual(), []
    whole = 6 * 4 * (3 + 2 * 16) * 48 * 48 * 4
    monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: int(share * whole))
    result = recalibrate(model, make_batches(), method="exact", memory="1GB", on_forecast=said.append)
    assert same(statistics_of(model), statistics_of(wanted))
    assert sum(moved) > (1 - share) * whole
    (sentence,) = said
    assert sentence.startswith("exact statistics of 24 samples: about")
    assert "set aside in" in sentence
    assert result.samples == 24


def test_what_fits_is_not_moved(moved):
    said = []
    recalibrate(Residual(), make_batches(), method="exact", memory="8GB", on_forecast=said.append)
    assert not moved
    assert "set aside" not in said[0]


def test_memory_is_given_back(tmp_path):
    offloading = Offloading(0, tmp_path)
    batch = MovableBatch(offloading, split_batch(torch.ones(64, 3, 256, 256), source="x", position=0))
    full = find_resident()
    batch.wait()
    assert full - find_resident() > 45e6  # of 50.3 MB
    with batch.in_memory() as there:
        assert bool((there.inputs == 1).all())
    offloading.close()
    assert not os.listdir(tmp_path)


class Cached(Residual):
    """Keeps of the first batch what all others use, on itself and where nobody finds it."""

    kept: ClassVar[list] = []

    def forward(self, x):
        if not hasattr(self, "grid"):
            self.grid = torch.linspace(-1, 1, x.shape[-1] ** 2).reshape(1, 1, *x.shape[-2:]) * x.new_ones(1, 8, 1, 1)
        if not self.kept:
            self.kept.append(
                torch.linspace(0, 2, x.shape[-1] ** 2).reshape(1, 1, *x.shape[-2:]) * x.new_ones(1, 8, 1, 1)
            )
        return super().forward(x + self.grid.mean(1, keepdim=True) + self.kept[0].mean(1, keepdim=True))


def test_what_batches_share_is_brought_back_when_it_is_touched(monkeypatch, moved):
    results = []
    for memory in (None, "1GB"):
        Cached.kept.clear()
        if memory is not None:
            monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: 0)
        model = Cached()
        with torch.no_grad():
            model.eval()(make_batches()[0][:1])
        Cached.kept.clear()  # so that a batch of the sweep makes it
        recalibrate(model, make_batches(), method="exact", memory=memory)
        results.append(statistics_of(model))
        assert torch.equal(Cached.kept[0][0, 0].flatten(), torch.linspace(0, 2, 48 * 48))
    assert moved
    assert same(*results)


class Shortcut(Residual):
    """What the stem gives waits for all layers."""

    def forward(self, x):
        stem = self.stem(x)
        x = stem
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))[..., 1:]
        return stem.sum() + x.sum()


class InLayer(Residual):
    """A layer is given what has waited."""

    def forward(self, x):
        stem = self.stem(x)
        return self.norms[0](self.convs[0](stem)) + self.norms[1](stem)


class ReadAsNumbers(Residual):
    """No operation reads what has waited."""

    def forward(self, x):
        stem = self.stem(x)
        x = self.norms[0](self.convs[0](stem))
        return self.norms[1](self.convs[1](x) + sum(stem.tolist()[0][0][0]))


class InThread(Residual):
    """Reads what has waited in a thread of its own."""

    def forward(self, x):
        stem = self.stem(x)
        x = self.norms[0](self.convs[0](stem))
        with ThreadPoolExecutor(1) as threads:
            return self.norms[1](x + threads.submit(torch.neg, stem).result())


def test_what_waits_for_a_later_layer_is_set_aside_once(monkeypatch, moved):
    monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: 0)
    recalibrate(Shortcut(), make_batches(), method="exact", memory="1GB")
    # the stem's output, what the first layer is given, and what the second convolution is
    assert moved.count(4 * 16 * 48 * 48 * 4) == 3 * (6 + 1)  # the first batch is tried out before


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("kind", [Residual, Shortcut])
def test_the_forecast_says_how_much_is_set_aside(share, kind, moved, monkeypatch):
    """Of what is only read again when something touches it."""
    whole, said, tried = 12 * 4 * 2 * 16 * 48 * 48 * 4, [], []
    monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: int(share * whole))

    def forecast(sentence):
        said.append(sentence)
        tried.append(len(moved))

    recalibrate(kind(), make_batches(12), method="exact", memory="1GB", on_forecast=forecast)
    (found,) = re.findall(r"about ([\d.]+) MB in all", said[0])
    assert sum(moved[tried[0] :]) / 1e6 == pytest.approx(float(found), rel=0.3)


@pytest.mark.parametrize("kind", [InLayer, ReadAsNumbers, InThread])
def test_what_has_waited_is_there_however_it_is_read(kind, monkeypatch, moved):
    wanted, model = kind(), kind()
    recalibrate(wanted, make_batches(), method="exact")
    monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: 0)
    recalibrate(model, make_batches(), method="exact", memory="1GB")
    assert moved
    assert same(statistics_of(model), statistics_of(wanted))


def test_batches_that_are_bad_are_left_out(monkeypatch):
    batches = make_batches()
    batches[2][1, 0, 0, 0] = float("nan")
    wanted = Residual()
    recalibrate(wanted, batches, method="exact", on_bad_data="skip")
    monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: 0)
    model = Residual()
    result = recalibrate(model, batches, method="exact", on_bad_data="skip", memory="1GB")
    assert len(result.left_out) == 1
    assert same(statistics_of(model), statistics_of(wanted))


def test_an_error_of_the_model_leaves_the_batches_as_they_were(monkeypatch):
    class Failing(Residual):
        def forward(self, x):
            out = super().forward(x)
            if x[0, 0, 0, 0] == last:
                raise ValueError("no")
            return out

    batches = make_batches()
    last, before = batches[-1][0, 0, 0, 0].clone(), [batch.clone() for batch in batches]
    monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: 0)
    model = Failing()
    old = statistics_of(model)
    with contextlib.suppress(Exception):
        recalibrate(model, batches, method="exact", memory="1GB")
    assert same(statistics_of(model), old)
    assert all(map(torch.equal, batches, before))


def test_what_cannot_be_kept_within_is_refused(monkeypatch):
    with pytest.raises(RefusedError, match=r"a batch of 4 samples on its way takes about .* give more --memory"):
        recalibrate(Residual(), make_batches(), method="exact", memory=10_000)
    with pytest.raises(UsageError, match="--memory is for --method exact; pooled needs"):
        recalibrate(Residual(), make_batches(), memory="1GB")
    with pytest.raises(UsageError, match="give one of them"):
        recalibrate(Residual(), make_batches(), method="exact", memory="1GB", fit_memory=True)
    monkeypatch.setattr(reading, "find_free", lambda _folder: 1000)
    monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: 0)
    with pytest.raises(RefusedError, match=r"would be set aside in .* which has 0\.0 MB free"):
        recalibrate(Residual(), make_batches(), method="exact", memory="1GB")


def test_a_model_that_looks_where_its_activations_lie_is_refused():
    class Looking(Residual):
        def forward(self, x):
            return super().forward(x) + float(x.numpy().max())

    with pytest.raises(RefusedError, match=r"where elements lie in memory .* leave out --memory"):
        recalibrate(Looking(), make_batches(), method="exact", memory="1GB")


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("500mb", 5 * 10**8), ("4096", 4096), ("7 kB", 7000)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2XB", "1e9", "2 G B"])
def test_other_text_is_no_size(text):
    with pytest.raises(UsageError, match=r"give an amount, e\.g\. 2GB"):
        parse_size(text)


def test_parts_of_the_file_are_used_again():
    regions = _Regions()
    starts = [regions.take(size) for size in (10, 20, 30, 40)]
    assert starts == [0, 10, 30, 60]
    regions.release(10, 20)
    regions.release(30, 30)
    assert regions.take(50) == 10  # both together
    regions.release(0, 10)
    assert regions.take(4) == 0
    assert regions.take(6) == 4
    assert regions.take(1) == 100


def test_what_nobody_needs_frees_its_part(tmp_path):
    offloading, watched = Offloading(0, tmp_path), []
    held = HeldStorages(offloading)
    with held:
        made = torch.ones(100_000) * 2
    (storage,) = held.storages
    offloading.put(storage, is_ours=False)
    watched.append(weakref.ref(storage))
    del storage, made
    gc.collect()
    assert watched[0]() is None
    assert not offloading._places
    assert offloading._regions.take(1000) == 0
    offloading.close()


@pytest.fixture
def set_aside(tmp_path):
    """A storage that is set aside, where it is, and by what key."""
    with contextlib.closing(Offloading(0, tmp_path)) as offloading:
        storage = torch.ones(100_000).untyped_storage()
        offloading.put(storage, is_ours=True)
        ((key, place),) = offloading._places.items()
        yield offloading, key, place


def test_what_has_ended_while_it_was_to_be_brought_back_frees_its_part(set_aside):
    offloading, key, place = set_aside
    alive, place.storage = place.storage, lambda: None  # it ends in another thread, which has not come to forget it yet
    offloading.bring_back(key)
    place.storage = alive
    offloading._forget(key, place)
    assert [offloading._regions.take(place._size) for _ in range(2)] == [0, place._size]


def test_what_is_brought_back_while_it_ends_frees_its_part_once(set_aside):
    class Places(dict):
        def get(self, key):
            found = super().get(key)
            offloading.bring_back(key)  # as another thread would, right after
            return found

    offloading, key, place = set_aside
    offloading._places = Places(offloading._places)
    offloading._forget(key, place)
    assert [offloading._regions.take(place._size) for _ in range(2)] == [0, place._size]


def test_a_model_that_ends_the_program_is_an_error(monkeypatch):
    class Leaving(Residual):
        def forward(self, x):
            if len(x) == 4:  # not in the forward of a few samples that is tried first
                raise SystemExit
            return super().forward(x)

    monkeypatch.setattr(reading.MemoryForecast, "allow", lambda self, *_: 0)
    with pytest.raises(UserCodeError, match="raised SystemExit"):
        recalibrate(Leaving(), make_batches(), method="exact", memory="1GB")
