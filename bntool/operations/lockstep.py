"""Self-consistent statistics in one sweep: all batches advance through the model together, layer by layer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch

from bntool.data.batches import Batch, LeftOut, find_placement
from bntool.errors import RefusedError
from bntool.layers.borrowing import borrow
from bntool.models.user_code import running_user_code
from bntool.operations.moments import Moments, measure
from bntool.operations.passes import (
    Measurement,
    NotFiniteError,
    Run,
    Tally,
    accept,
    check_moments,
    describe_bad,
    get_input,
    has_finite_inputs,
    set_statistics,
)
from bntool.operations.ranks import Ranks, find_ranks
from bntool.operations.repeated_calls import Finish, RepeatedCalls

_CHUNK = 128  # positions measured at a time in float32: the error is to be far below what is promised, 1e-6
_PATIENCE = 30.0  # seconds; a forward that uses no CPU time for so long waits for another


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
        self._wait_for_return()
        if self._error is not None:
            raise self._error

    def _wait_for_return(self) -> None:
        used = time.process_time()
        while not self._back.acquire(timeout=_PATIENCE):
            before, used = used, time.process_time()
            if used - before < _PATIENCE / 100:
                raise RefusedError(
                    "the model waits for something that another batch holds, perhaps a lock in its forward; exact "
                    "statistics need all batches on their way at once, use the method pooled"
                )

    def stop_at(self, layer: str, moments: Moments) -> None:
        """Called by the run itself: hand the turn back and wait for the next."""
        if self._abandoned:  # code of the model caught what ended it at an earlier layer
            raise AbandonedError
        self.reached = (layer, moments)
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise AbandonedError

    def abandon(self) -> None:
        """End the run where it is."""
        self._abandoned = True
        self._go.release()

    def join(self) -> None:
        """Wait until the thread of an abandoned run has ended."""
        if self._thread.ident:
            self._thread.join(timeout=_PATIENCE)


def measure_exact(run: Run, batches: Iterable[Batch], finish: Finish, *, channels_last: bool) -> Measurement:
    """Measure in each layer what it sees when all layers before it have their final statistics.

    All batches wait at a layer; their moments are pooled, its final statistics are set, and all go on. So after it the
    network in eval mode sees in each layer exactly the statistics stored there, whatever the batch size and order. All
    activations that batches hold at a layer are in memory at once. The model is given back with its old statistics.

    One sweep does, unless a forward calls a layer more than once: its later calls come too late for the first. Sweeps
    are then repeated until no call of such a layer was given other statistics than the moments of all its calls.

    Raises:
        NotSettledError: there are layers called more than once for which no sweep found such statistics.
        RefusedError: batches take different paths through the model, or hold NaN or infinity (``OnBadData.STOP``).
        UserCodeError: the model raised.
    """
    ranks = find_ranks()
    result = Measurement()
    remaining = dict(enumerate(batches))
    bad = {
        position: accept(describe_bad(batch), run.on_bad_data)
        for position, batch in remaining.items()
        if not has_finite_inputs(batch)
    }
    for left_out in ranks.share(lambda: list(bad.values())):
        result.left_out += left_out
    good = {position: batch for position, batch in remaining.items() if position not in bad}
    while True:
        counts = ranks.share(partial(_count, good.values()))
        result.batches, result.samples = (sum(column) for column in zip(*counts, strict=True))
        sweep = _Sweep(run, finish, ranks, samples=result.samples, channels_last=channels_last)
        try:
            with borrow(run.model) as borrowed:
                for name, layer in run.layers.items():
                    borrowed.add_forward_pre_hook(layer, sweep.make_hook(name), with_kwargs=True)
                result.tallies = sweep.repeat(good)
        except BadBatchesError as error:
            # what these batches gave to earlier layers is in their statistics: begin again without them
            result.left_out += [accept(left_out, run.on_bad_data) for left_out in error.bad.values()]
            good = {position: batch for position, batch in good.items() if (ranks.rank, position) not in error.bad}
        else:
            return result


def _count(batches: Collection[Batch]) -> tuple[int, int]:
    return len(batches), sum(batch.samples for batch in batches)


class BadBatchesError(Exception):
    """Batches turned out to hold NaN or infinity: by rank and position."""

    def __init__(self, bad: Mapping[tuple[int, int], LeftOut]) -> None:
        super().__init__(bad)
        self.bad = bad


@dataclass(frozen=True)
class Stop:
    """Where a batch is: at a layer, with what it gives it; at its end; or left out for what it gives a layer."""

    position: int
    batch: str
    layer: str | None
    moments: Moments | None
    left_out: LeftOut | None = None


class _Sweep:
    """Sweeps of all batches over all layers.

    Args:
        run, finish, ranks, channels_last: see :func:`measure_exact`.
        samples: of all ranks.
    """

    def __init__(self, run: Run, finish: Finish, ranks: Ranks, *, samples: int, channels_last: bool) -> None:
        self._run = run
        self._ranks = ranks
        self._samples = samples
        self._channels_last = channels_last
        self._current: Lane | None = None
        self._calls = RepeatedCalls(lambda name, tally: finish(name, tally, samples), run.layers)

    def make_hook(self, name: str) -> Callable[..., None]:
        def observe(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            values = get_input(args, kwargs, module)
            moments = measure(values, chunk=_CHUNK)
            check_moments(moments, name, values, least=1)
            assert self._current is not None
            self._current.stop_at(name, moments)

        return observe

    def repeat(self, batches: Mapping[int, Batch]) -> dict[str, Tally]:
        """Sweep until all statistics are those of what is seen; what each layer saw, in execution order.

        Args:
            batches: this rank's share, by position.
        """
        self._run_once(batches)
        while not self._calls.have_settled:
            self._calls.begin_again()
            try:
                self._run_once(batches)
            except BadBatchesError:  # the first sweep was finite: it is these statistics that are of no use
                self._calls.give_up()
        return self._calls.tallies

    def _run_once(self, batches: Mapping[int, Batch]) -> None:
        context = _copy_context(self._run.model)
        lanes = {position: Lane(self._make_run(batch, context)) for position, batch in batches.items()}
        try:
            while True:
                shares = self._ranks.share(lambda: [self._advance(p, lane, batches[p]) for p, lane in lanes.items()])
                # one order whatever the number of ranks: first what comes first on each rank
                placed = sorted((stop.position, rank, stop) for rank, stops in enumerate(shares) for stop in stops)
                bad = {(rank, position): stop.left_out for position, rank, stop in placed if stop.left_out is not None}
                if bad:
                    raise BadBatchesError(bad)
                stops = [stop for _, _, stop in placed]
                if all(stop.layer is None for stop in stops):
                    return
                self._finish_layer(stops)
        finally:
            for lane in lanes.values():
                lane.abandon()
            for lane in lanes.values():  # one may wait for what another lets go
                lane.join()

    def _advance(self, position: int, lane: Lane, batch: Batch) -> Stop:
        self._current = lane
        try:
            lane.advance()
        except NotFiniteError as error:
            return Stop(position, batch.description, error.layer, None, describe_bad(batch, error))
        layer, moments = lane.reached or (None, None)
        return Stop(position, batch.description, layer, moments)

    def _finish_layer(self, stops: Sequence[Stop]) -> None:
        first = stops[0]
        for other in stops:
            if other.layer != first.layer:
                raise RefusedError(
                    f"batches take different paths through the model: {first.batch} is at {first.layer or 'the end'}, "
                    f"{other.batch} at {other.layer or 'the end'}; exact statistics need one path for all, use the "
                    "method pooled"
                )
        name = first.layer
        assert name is not None
        tally = reduce(Tally.and_, (Tally.of(stop.moments) for stop in stops if stop.moments is not None))
        mean, variance = self._calls.add(name, tally)
        set_statistics(self._run.layers[name], mean=mean, variance=variance)
        if self._run.on_progress is not None:
            self._run.on_progress(self._samples * self._calls.layers_seen // len(self._run.layers))

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
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if dtype is not None:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if device is not None and kind == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield

    return context
