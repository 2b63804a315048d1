"""Reading all batches for a sweep: as many as fit into memory, or all, of which a part is set aside."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bntool.data.batches import Batch, Batches, find_placement
from bntool.errors import RefusedError
from bntool.progress import OnWarning
from bntool.recalibration.exact.batch_costs import measure_costs
from bntool.recalibration.exact.first_forward import FirstForward, run_first_forward
from bntool.recalibration.exact.memory import MemoryForecast, find_available
from bntool.recalibration.exact.offloading import (
    KeptBatch,
    MovableBatch,
    Offloading,
    choose_folder,
    find_free,
    find_offloaded_share,
    measure_disk,
)
from bntool.recalibration.freed_memory import returning_large_pieces
from bntool.recalibration.pooled import Run
from bntool.recalibration.ranks import Ranks


@dataclass(frozen=True)
class Reading:
    """The batches that this rank read.

    Attributes:
        batches: all of them.
        shown: what the first forward showed; None where no rank has a batch.
    """

    batches: Sequence[KeptBatch] = ()
    shown: FirstForward | None = None

    @property
    def samples(self) -> int:
        """The number of samples in all batches."""
        return sum(kept.batch.samples for kept in self.batches)

    @property
    def largest(self) -> int:
        """Samples of the largest batch."""
        return max((kept.batch.samples for kept in self.batches), default=0)


@contextlib.contextmanager
def reading_batches(
    run: Run, batches: Batches, ranks: Ranks, *, cut: bool, memory: int | None, on_forecast: OnWarning
) -> Iterator[Reading]:
    """Read this rank's batches: as many as fit into memory, or all, of which a part is set aside.

    Args:
        run: the model and its layers.
        batches: to read.
        ranks: the first of them that has a batch tries the model out for all.
        cut: where not all fit, stop at as many as do.
        memory: bytes that activations may take; None for what there is.
        on_forecast: told what time and memory it will take, where ``memory`` is given.

    Raises:
        RefusedError: not all fit and ``cut`` is not given, or not even one batch fits.
        UserCodeError: the model or the data raised.
    """
    iterator = (batch.fit(run.model) for batch in batches)
    first: list[Batch] = []

    def begin() -> bool:
        first.extend(itertools.islice(iterator, 1))
        return bool(first)

    have_some = ranks.share(begin)
    if not any(have_some):
        yield Reading()
        return
    leader = have_some.index(True)
    shown = ranks.share(lambda: run_first_forward(run, first[0]) if ranks.rank == leader else None)[leader]
    assert shown is not None
    read: list[KeptBatch] = []
    if memory is None:
        available = find_available(find_placement(run.model)[0])
        fitting = _take(first, iterator, batches.samples, shown.forecast, available, cut=cut)
        ranks.share(lambda: read.extend(map(KeptBatch, fitting)))
        yield Reading(read, shown)
        return
    _check_can_move(shown)
    largest = max((batch.samples for batch in first), default=0)
    with (
        returning_large_pieces(),
        contextlib.closing(Offloading(shown.forecast.allow(memory, largest, largest), choose_folder())) as offloading,
    ):
        ranks.share(lambda: read.extend(_move(first, iterator, offloading, as_a_whole=not shown.is_seen)))
        # what the rank that tries the model out finds holds for all: so all refuse, or none
        trial = functools.partial(_try_out, run, Reading(read, shown), memory)
        reading = Reading(read, ranks.share(trial if ranks.rank == leader else lambda: None)[leader])
        offloading.allowed = ranks.share(lambda: _allow(reading, memory))[ranks.rank]
        on_forecast(ranks.share(lambda: _describe_forecast(run, reading, memory))[ranks.rank])
        yield reading


def _check_can_move(shown: FirstForward) -> None:
    """Refuse where activations cannot be moved.

    Raises:
        RefusedError: the system cannot do it, or the model could notice that its activations are not there meanwhile.
    """
    if sys.platform != "linux":
        raise RefusedError("memory can be given back while activations wait on Linux only; leave out --memory")
    if shown.reads_memory:
        raise RefusedError(
            "the model asks where elements lie in memory (data_ptr, numpy, a kernel of its own), so activations cannot "
            "be set aside; leave out --memory"
        )


def _try_out(run: Run, reading: Reading, memory: int) -> FirstForward:
    """Run the first batch as all batches will run, and measure what it takes."""
    shown = reading.shown
    assert shown is not None
    forecast, samples = shown.forecast, reading.samples
    share, _ = find_offloaded_share(forecast.waits, samples, forecast.allow(memory, reading.largest, samples))
    with contextlib.closing(Offloading(-1, choose_folder())) as offloading, reading.batches[0].in_memory() as batch:
        kept = MovableBatch(offloading, batch, as_a_whole=not shown.is_seen) if share else KeptBatch(batch)
        return replace(shown, forecast=measure_costs(run, kept, shown, offloading))


def _allow(reading: Reading, memory: int) -> int:
    """Compute the bytes that batches may hold while they wait.

    Raises:
        RefusedError: not even one fits.
    """
    assert reading.shown is not None
    forecast, largest = reading.shown.forecast, reading.largest
    allowed = forecast.allow(memory, largest, reading.samples)
    if allowed < 0:
        raise RefusedError(
            f"a batch of {largest} samples on its way takes about {_size(forecast.need(0, largest))}, and "
            f"{len(reading.batches)} threads, one for each batch, {_size(forecast.kept * len(reading.batches))}: give "
            "more --memory, or another --batch-size"
        )
    return allowed


def _move(
    first: Sequence[Batch], others: Iterator[Batch], offloading: Offloading, *, as_a_whole: bool
) -> Iterator[KeptBatch]:
    for batch in itertools.chain(first, others):
        kept = MovableBatch(offloading, batch, as_a_whole=as_a_whole)
        kept.wait()
        yield kept


def _describe_forecast(run: Run, reading: Reading, memory: int) -> str:
    """Describe what the run will take, in words.

    Raises:
        RefusedError: the disk has not as much room.
    """
    assert reading.shown is not None
    forecast, samples, folder = reading.shown.forecast, reading.samples, choose_folder()
    share, at_once = find_offloaded_share(forecast.waits, samples, forecast.allow(memory, reading.largest, samples))
    seconds, moving = forecast.seconds * samples, forecast.moving * share * samples
    moved, needed = int(forecast.moved * share * samples), forecast.need(samples, reading.largest)
    device, _ = find_placement(run.model)
    where = ""
    if at_once and device is not None and device.type != "cpu":
        where = f"; up to {_size(at_once)} set aside in the memory of the host, about {_size(moved)} in all"
    elif at_once:
        if at_once > find_free(folder):
            raise RefusedError(
                f"up to {_size(at_once)} of activations would be set aside in {folder}, which has "
                f"{_size(find_free(folder))} free; give more --memory, or another folder by TMPDIR"
            )
        if at_once > (find_available(None) or 0) // 4:  # the system cannot keep it: it is written and read
            moving = max(moving, 2 * moved / measure_disk(folder))
        where = f"; up to {_size(at_once)} set aside in {folder}, about {_size(moved)} in all"
    sizes = f"about {seconds + moving:.0f} s and {_size(min(needed, memory))} of memory"
    return f"exact statistics of {samples:,} samples: {sizes}{where}"


def _take(
    first: Sequence[Batch],
    others: Iterator[Batch],
    announced: int | None,
    forecast: MemoryForecast,
    available: int | None,
    *,
    cut: bool,
) -> Iterator[Batch]:
    """Yield the batches, as long as they fit into the memory that is available."""
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
