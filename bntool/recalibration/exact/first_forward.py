"""A first forward with few samples: how a model goes about its layers, and how much memory its activations take."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from bntool.data.batches import Batch, copy_batch, cut_batch
from bntool.errors import UserCodeError
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import borrow
from bntool.modules.calling import tensors_in
from bntool.modules.memory import count_writes
from bntool.recalibration.activations import StatisticsReads
from bntool.recalibration.exact.memory import LiveTensors, MemoryForecast, find_thread_space
from bntool.recalibration.memory_format import MemoryReads, is_faster_channels_last
from bntool.recalibration.pooled import Run
from bntool.recalibration.ranks import NoExchange

_SAMPLES = 2


@dataclass(frozen=True)
class FirstForward:
    """The facts that a first forward of a few samples shows.

    Attributes:
        channels_last: whether the model takes images of that layout.
        forecast: memory of each sample.
        writes_to_inputs: whether it changes what it is given, so that a batch can be run but once.
        reads_memory: whether its code asks where elements lie.
        is_seen: whether all that it computes with was seen to be made: not where it has threads of its own, or holds
            tensors that are neither parameters nor buffers.
    """

    channels_last: bool
    forecast: MemoryForecast
    writes_to_inputs: bool
    reads_memory: bool
    is_seen: bool


def run_first_forward(run: Run, batch: Batch) -> FirstForward:
    """Run a few samples of a batch to see how the model goes about it.

    Raises:
        RefusedError: it exchanges something with other ranks.
        UserCodeError: the model raised.
    """
    few = cut_batch(batch, _SAMPLES)
    run.shown.append(copy_batch(few))
    for part, channels_last in ((few, True), (few, False), (batch, True)):
        if not channels_last or is_faster_channels_last(run.model):
            with contextlib.suppress(UserCodeError):  # it is to raise with the whole batch as it is, too
                return _run_few(run, part, channels_last=channels_last)
    return _run_few(run, batch, channels_last=False)


def _run_few(run: Run, batch: Batch, *, channels_last: bool) -> FirstForward:
    given, batch = batch, copy_batch(batch)  # the model may write to what it is given
    known = [*run.model.parameters(), *run.model.buffers(), *tensors_in(batch.inputs)]
    with borrow(run.model) as borrowed, NoExchange(), LiveTensors(known) as memory:
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
            waits=tuple((live + size) / samples for live in memory.waits or [0]),
            running=memory.peak / samples,
            thread=find_thread_space(),
        ),
        writes_to_inputs=any(_is_changed(after, before) for before, after in pairs),
        reads_memory=reads.happened,
        is_seen=not memory.has_unknown,
    )


def _is_changed(after: torch.Tensor, before: torch.Tensor) -> bool:
    # tensors of inference mode count no changes
    return not torch.equal(after, before) if after.is_inference() else count_writes(after) > 0
