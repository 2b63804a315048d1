"""A first forward with few samples: how a model goes about its layers, and how much memory its activations take."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bntool.data.batches import Batch, Batches, copy_batch, cut_batch, find_placement
from bntool.errors import RefusedError, UserCodeError
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import borrow
from bntool.modules.calling import tensors_in
from bntool.modules.memory import count_writes
from bntool.recalibration.activations import StatisticsReads
from bntool.recalibration.exact.memory import LiveTensors, MemoryForecast, find_available, find_thread_space
from bntool.recalibration.memory_format import MemoryReads, is_faster_channels_last
from bntool.recalibration.pooled import Run
from bntool.recalibration.ranks import NoExchange, Ranks

_SAMPLES = 2


@dataclass(frozen=True)
class FirstForward:
    """What a first forward of a few samples shows.

    Attributes:
        channels_last: whether the model takes images of that layout.
        forecast: memory of each sample.
        writes_to_inputs: whether it changes what it is given, so that a batch can be run but once.
    """

    channels_last: bool
    forecast: MemoryForecast
    writes_to_inputs: bool


def run_first_forward(run: Run, batch: Batch) -> FirstForward:
    """Run a few samples of a batch to see how the model goes about it.

    Raises:
        RefusedError: it exchanges something with other ranks.
        UserCodeError: the model raised.
    """
    few = cut_batch(batch, _SAMPLES)
    for part, channels_last in ((few, True), (few, False), (batch, True)):
        if not channels_last or is_faster_channels_last(run.model):
            with contextlib.suppress(UserCodeError):  # it is to raise with the whole batch as it is, too
                return _run_few(run, part, channels_last=channels_last)
    return _run_few(run, batch, channels_last=False)


def _run_few(run: Run, batch: Batch, *, channels_last: bool) -> FirstForward:
    given, batch = batch, copy_batch(batch)  # the model may write to what it is given
    with borrow(run.model) as borrowed, NoExchange(), LiveTensors() as memory:
        for layer in run.layers.values():
            borrowed.add_forward_pre_hook(layer, lambda _module, _args: memory.note_waiting())
        statistics = StatisticsReads(run.layers)
        with MemoryReads() as reads, statistics, running_user_code(f"running the model on {batch.description}"):
            batch.run(run.model, channels_last=channels_last)
    run.read.update(statistics.layers)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(batch.inputs))
    pairs = zip(tensors_in(given.inputs), tensors_in(batch.inputs), strict=True)
    samples = max(batch.samples, 1)
    return FirstForward(
        channels_last=channels_last and not reads.happened,
        forecast=MemoryForecast(
            waiting=(memory.waiting + size) / samples,
            running=memory.peak / samples,
            thread=find_thread_space(),
        ),
        writes_to_inputs=any(_is_changed(after, before) for before, after in pairs),
    )


def _is_changed(after: torch.Tensor, before: torch.Tensor) -> bool:
    # tensors of inference mode count no changes
    return not torch.equal(after, before) if after.is_inference() else count_writes(after) > 0


def read_what_fits(run: Run, batches: Batches, ranks: Ranks, *, cut: bool) -> tuple[list[Batch], FirstForward | None]:
    """Read this rank's batches, if what a sweep over them keeps fits into memory.

    Args:
        run: the model and its layers.
        batches: to read.
        ranks: the first of them that has a batch tries the model out for all.
        cut: where not all fit, stop at as many as do.

    Returns:
        The batches, and what the first forward showed; None where no rank has a batch.

    Raises:
        RefusedError: not all fit and ``cut`` is not given, or not even one batch fits.
        UserCodeError: the model or the data raised.
    """
    iterator = iter(batches)
    first: list[Batch] = []

    def begin() -> bool:
        first.extend(itertools.islice(iterator, 1))
        return bool(first)

    have_some = ranks.share(begin)
    if not any(have_some):
        return [], None
    leader = have_some.index(True)
    shown = ranks.share(lambda: run_first_forward(run, first[0]) if ranks.rank == leader else None)[leader]
    assert shown is not None
    read: list[Batch] = []
    available = find_available(find_placement(run.model)[0])
    ranks.share(lambda: read.extend(_take(first, iterator, batches.samples, shown.forecast, available, cut=cut)))
    return read, shown


def _take(
    first: Sequence[Batch],
    others: Iterator[Batch],
    announced: int | None,
    forecast: MemoryForecast,
    available: int | None,
    *,
    cut: bool,
) -> Iterator[Batch]:
    """The batches, as long as they fit into the memory that is available."""
    largest = max((batch.samples for batch in first), default=0)
    fitting = forecast.fit(available, largest) if available is not None else sys.maxsize
    total = announced or 0
    samples = 0
    for batch in itertools.chain(first, others):
        total = max(total, samples + batch.samples)
        needed = total
        if cut:
            needed = 0 if samples else batch.samples  # one batch at least
        if needed > fitting:
            assert available is not None
            raise RefusedError(
                f"{needed} samples on their way would need about {_size(forecast.need(needed, largest))}, "
                f"{_size(available)} are free: " + _advise(fitting, cut=cut)
            )
        if samples + batch.samples > fitting:
            break
        yield batch
        samples += batch.samples


def _advise(fitting: int, *, cut: bool) -> str:
    if cut or not fitting:
        return f"about {fitting} samples fit, use a smaller --batch-size, or --method pooled"
    return (
        f"about {fitting} samples fit, use --samples {fitting}, or --samples auto for as many as fit, or the method "
        "pooled"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
