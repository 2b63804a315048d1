"""The time and memory that a batch takes in a sweep, measured on one that goes the same way alone."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace

import torch
from torch.utils._python_dispatch import _disable_current_modes

from bntool.data.batches import copy_batch
from bntool.modules.borrowing import borrow
from bntool.recalibration.activation_moments import measure
from bntool.recalibration.activations import Activations
from bntool.recalibration.exact.first_forward import FirstForward
from bntool.recalibration.exact.memory import MemoryForecast, find_resident
from bntool.recalibration.exact.offloading import KeptBatch, Offloading
from bntool.recalibration.exact.paused_forwards import copy_context, start_thread
from bntool.recalibration.freed_memory import FreedMemory
from bntool.recalibration.pooled import Run


def measure_costs(run: Run, kept: KeptBatch, shown: FirstForward, offloading: Offloading) -> MemoryForecast:
    """Run a batch in a thread of its own, with a stop at each layer, and return the forecast with what that took.

    Counted is also the memory that the libraries below torch keep for each thread as long as it lives: 0 where the
    system does not say how much memory is in use.

    Args:
        run: the model and its layers.
        kept: the batch; where it is one that can be moved, all that it holds is set aside at each layer.
        shown: what a first forward showed.
        offloading: where the batch is set aside.
    """
    ended, over = threading.Event(), threading.Event()
    context, seconds = copy_context(run.model), 0.0

    def observe(_name: str, _layer: torch.nn.Module, values: torch.Tensor) -> None:
        kept.touch(values)
        with _disable_current_modes():
            measure(values)
            kept.wait()
            kept.go_on()

    def forward() -> None:
        nonlocal seconds
        start = time.perf_counter()
        # what it raises the sweep will raise again
        with contextlib.suppress(BaseException), context(), kept.watching(), activations.watching():
            given = copy_batch(kept.batch) if shown.writes_to_inputs else kept.batch
            given.run(run.model, channels_last=shown.channels_last)
        seconds = time.perf_counter() - start
        ended.set()
        over.wait()

    memory = FreedMemory(pause=0)
    memory.return_unused()
    before = find_resident()
    thread = threading.Thread(target=forward, daemon=True)
    try:
        with borrow(run.model) as borrowed:
            activations = Activations(run.layers, borrowed, observe, called=set())
            start_thread(thread)
            ended.wait()
        kept.wait()
        memory.return_unused()
        libraries = max(find_resident() - before, 0)
    finally:  # also where the user interrupts it
        over.set()
    thread.join()
    samples = max(kept.batch.samples, 1)
    return replace(
        shown.forecast,
        kept=libraries,
        seconds=(seconds - offloading.seconds) / samples,
        moving=offloading.seconds / samples,
        moved=offloading.moved / samples,
    )
