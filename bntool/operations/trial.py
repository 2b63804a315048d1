"""A first forward with few samples: how a model goes about its layers, and how much memory its activations take."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

from bntool.data.batches import Batch, Batches, cut_batch, find_placement, find_tensors
from bntool.errors import RefusedError, UserCodeError
from bntool.layers.borrowing import borrow
from bntool.models.user_code import running_user_code
from bntool.operations.memory import Forecast, LiveTensors, find_available, find_thread_space
from bntool.operations.passes import Run, is_faster_channels_last

_SAMPLES = 2


@dataclass(frozen=True)
class Trial:
    """What a first forward of a few samples shows.

    Attributes:
        channels_last: whether the model takes images of that layout.
        forecast: memory of each sample.
    """

    channels_last: bool
    forecast: Forecast


def try_out(run: Run, batch: Batch) -> Trial:
    """Run a few samples of a batch to see how the model goes about it.

    Raises:
        UserCodeError: the model raised.
    """
    few = cut_batch(batch, _SAMPLES)
    if is_faster_channels_last(run.model):
        with contextlib.suppress(UserCodeError):  # it is to raise without channels last, too
            return _try_out(run, few, channels_last=True)
    return _try_out(run, few, channels_last=False)


def _try_out(run: Run, batch: Batch, *, channels_last: bool) -> Trial:
    with borrow(run.model) as borrowed, LiveTensors() as memory:
        for layer in run.layers.values():
            borrowed.add_forward_pre_hook(layer, lambda _module, _args: memory.note_waiting())
        with running_user_code(f"running the model on {batch.description}"):
            batch.run(run.model, channels_last=channels_last)
    given = sum(tensor.nbytes for tensor in find_tensors(batch.inputs))
    samples = max(batch.samples, 1)
    return Trial(
        channels_last=channels_last,
        forecast=Forecast(
            waiting=(memory.waiting + given) / samples,
            running=memory.peak / samples,
            thread=find_thread_space(),
        ),
    )


def read_what_fits(run: Run, batches: Batches, *, into: list[Batch], cut: bool) -> Trial | None:
    """Read all batches, if what a sweep over them keeps fits into memory.

    Args:
        run: the model and its layers.
        batches: to read.
        into: where to put them.
        cut: where not all fit, stop at as many as do.

    Returns:
        What a trial with the first batch showed; None where there is no batch.

    Raises:
        RefusedError: not all fit and ``cut`` is not given, or not even one batch fits.
        UserCodeError: the model or the data raised.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        return None
    trial = try_out(run, first)
    available = find_available(find_placement(run.model)[0])
    if available is None:
        into += [first, *iterator]
        return trial
    fitting = trial.forecast.fit(available, first.samples)
    total = batches.samples or first.samples
    samples = 0
    for batch in itertools.chain([first], iterator):
        total = max(total, samples + batch.samples)
        needed = total
        if cut:
            needed = 0 if samples else batch.samples  # one batch at least
        if needed > fitting:
            raise RefusedError(
                f"{needed} samples on their way would need about {_size(trial.forecast.need(needed, first.samples))}, "
                f"{_size(available)} are free: " + _advise(fitting, cut=cut)
            )
        if samples + batch.samples > fitting:
            break
        into.append(batch)
        samples += batch.samples
    return trial


def _advise(fitting: int, *, cut: bool) -> str:
    if cut or not fitting:
        return f"about {fitting} samples fit, use a smaller batch size, or the method pooled"
    return (
        f"about {fitting} samples fit, use --samples {fitting}, or --samples auto for as many as fit, or the method "
        "pooled"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
