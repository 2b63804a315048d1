"""Self-consistent statistics in one sweep: all batches advance through the model together, layer by layer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from bntool.data.batches import Batch, find_placement
from bntool.errors import RefusedError
from bntool.models.user_code import running_user_code
from bntool.operations.moments import Moments, measure
from bntool.operations.passes import (
    Measurement,
    NotFiniteError,
    Run,
    Tally,
    check_moments,
    get_input,
    has_finite_inputs,
    leave_out,
    set_statistics,
)

# final running_mean and running_var of a layer, from its name, what it has seen, and the number of samples
Finish = Callable[[str, Tally, int], tuple[torch.Tensor, torch.Tensor]]

_CHUNK = 128  # positions measured at a time in float32: the error is to be far below what is promised, 1e-6


class AbandonedError(BaseException):
    """Raised inside the model's forward of a batch that is not to go on."""


class Lane:
    """One batch on its way through the model, in a thread of its own that runs only while it is its turn.

    The thread is what lets a forward stop in the middle of any model's code and go on later.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.reached: tuple[str, Moments] | None = None
        self._run = run
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._main, daemon=True, name="bntool-lane")

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                self._run()
        except BaseException as error:  # noqa: BLE001 handed to the thread that waits for it
            self._error = error
        self._back.release()

    def advance(self) -> None:
        """Let it run to the next layer, or to the end: then ``reached`` is None.

        Raises:
            whatever the run raised.
        """
        self.reached = None
        if not self._thread.ident:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise RefusedError(
                    "the system gives no more threads, one for each batch; use larger batches"
                ) from error
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop_at(self, layer: str, moments: Moments) -> None:
        """Called by the run itself: hand the turn back and wait for the next."""
        self.reached = (layer, moments)
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise AbandonedError

    def abandon(self) -> None:
        """End the run where it is, and wait until its thread has ended."""
        self._abandoned = True
        if self._thread.ident:
            self._go.release()
            self._thread.join()


def measure_exact(run: Run, batches: Iterable[Batch], finish: Finish, *, channels_last: bool) -> Measurement:
    """Measure in each layer what it sees when all layers before it have their final statistics.

    All batches wait at a layer; their moments are pooled, its final statistics are set, and all go on. So after it the
    network in eval mode sees in each layer exactly the statistics stored there, whatever the batch size and order. No
    layer may be called twice in a forward. All activations that batches hold at a layer are in memory at once.

    Raises:
        RefusedError: batches take different paths through the model, or hold NaN or infinity (``OnBadData.STOP``).
        UserCodeError: the model raised.
    """
    sweep = _Sweep(run, finish, channels_last=channels_last)
    for name, layer in run.layers.items():
        run.borrowed.add_forward_pre_hook(layer, sweep.make_hook(name), with_kwargs=True)
    result = Measurement()
    remaining = []
    for batch in batches:
        if has_finite_inputs(batch):
            remaining.append(batch)
        else:
            leave_out("", batch, result=result, on_bad_data=run.on_bad_data)
    while remaining:
        try:
            result.tallies = sweep.run(remaining)
            break
        except NotFiniteError as error:
            # what this batch gave to earlier layers is in their statistics: begin again without it
            bad = remaining.pop(sweep.current_index)
            leave_out(error.layer, bad, result=result, on_bad_data=run.on_bad_data)
    result.batches = len(remaining)
    result.samples = sum(batch.samples for batch in remaining)
    return result


class _Sweep:
    def __init__(self, run: Run, finish: Finish, *, channels_last: bool) -> None:
        self._channels_last = channels_last
        self._run = run
        self._finish = finish
        self._lanes: list[Lane] = []
        self.current_index = 0

    def make_hook(self, name: str) -> Callable[..., None]:
        def observe(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            moments = measure(get_input(args, kwargs, module), chunk=_CHUNK)
            check_moments(moments, name, least=1)
            self._lanes[self.current_index].stop_at(name, moments)

        return observe

    def run(self, batches: Sequence[Batch]) -> dict[str, Tally]:
        """One sweep over all layers; what each of them saw, in execution order."""
        context = _copy_context(self._run.model)
        self._lanes = [Lane(self._make_run(batch, context)) for batch in batches]
        tallies: dict[str, Tally] = {}
        try:
            while True:
                for index, lane in enumerate(self._lanes):
                    self.current_index = index
                    lane.advance()
                reached = [lane.reached for lane in self._lanes]
                if all(stop is None for stop in reached):
                    return tallies
                self._finish_layer(reached, batches, tallies)
                if self._run.on_progress is not None:
                    samples = sum(batch.samples for batch in batches)
                    self._run.on_progress(samples * len(tallies) // len(self._run.layers))
        finally:
            for lane in self._lanes:
                lane.abandon()

    def _finish_layer(
        self, reached: Sequence[tuple[str, Moments] | None], batches: Sequence[Batch], tallies: dict[str, Tally]
    ) -> None:
        names = [stop[0] if stop is not None else "the end" for stop in reached]
        name = names[0]
        for other, batch in zip(names, batches, strict=True):
            if other != name:
                raise RefusedError(
                    f"batches take different paths through the model: {batches[0].description} is at {name}, "
                    f"{batch.description} at {other}; exact statistics need one path for all, use the method pooled"
                )
        if name in tallies:
            raise RefusedError("called more than once in a forward; use the method pooled", tensor=name)
        tally: Tally | None = None
        for stop in reached:
            assert stop is not None
            single = Tally.of(stop[1])
            tally = single if tally is None else tally.and_(single)
        assert tally is not None
        tallies[name] = tally
        mean, variance = self._finish(name, tally, sum(batch.samples for batch in batches))
        set_statistics(self._run.layers[name], mean=mean, variance=variance)

    def _make_run(
        self, batch: Batch, context: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> Callable[[], None]:
        def run() -> None:
            with context(), running_user_code(f"running the model on {batch.description}"):
                batch.run(self._run.model, channels_last=self._channels_last)

        return run


def _copy_context(model: torch.nn.Module) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What is set for this thread only and must hold in the lanes too: no gradients, autocast, the CUDA device."""
    device, _ = find_placement(model)
    kind = device.type if device is not None else "cpu"
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else None

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if device is not None and kind == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield

    return context
