"""Self-consistent statistics in one sweep: all batches advance through the model together, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch.utils._python_dispatch import _disable_current_modes

from bntool.data.batches import copy_batch
from bntool.data.policies import LeftOut
from bntool.errors import RefusedError
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import Borrowed, borrow
from bntool.recalibration.activation_moments import measure
from bntool.recalibration.activations import Activations
from bntool.recalibration.exact.first_forward import FirstForward
from bntool.recalibration.exact.lone_batch import LoneBatch, choose_positions
from bntool.recalibration.exact.offloading import KeptBatch
from bntool.recalibration.exact.paused_forwards import PausedForward, copy_context
from bntool.recalibration.exact.repeated_calls import Finish, RepeatedCalls
from bntool.recalibration.freed_memory import FreedMemory
from bntool.recalibration.moments import Moments, Tally
from bntool.recalibration.new_statistics import Measurement
from bntool.recalibration.pooled import (
    NotFiniteError,
    Run,
    accept,
    check_moments,
    describe_bad,
    has_finite_inputs,
    set_statistics,
)
from bntool.recalibration.ranks import Ranks, find_ranks

_PAUSE = 0.05  # seconds of CPU time: each forward has a thread, and malloc keeps for each thread what it frees


def measure_exact(run: Run, batches: Iterable[KeptBatch], finish: Finish, first_forward: FirstForward) -> Measurement:
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
    remaining = {
        number if kept.batch.position is None else kept.batch.position: kept for number, kept in enumerate(batches)
    }
    bad: dict[int, LeftOut] = {}
    for position, kept in remaining.items():
        with kept.in_memory() as batch:
            if not has_finite_inputs(batch):
                bad[position] = accept(describe_bad(batch), run.on_bad_data)
    for left_out in ranks.share(lambda: list(bad.values())):
        result.left_out += left_out
    good = {position: kept for position, kept in remaining.items() if position not in bad}
    while True:
        counts = ranks.share(partial(_count, good.values()))
        result.batches, result.samples = (sum(column) for column in zip(*counts, strict=True))
        leader = next((rank for rank, (count, _) in enumerate(counts) if count), None)
        positions = choose_positions(good) if ranks.rank == leader else ()
        lone_batches = [LoneBatch(good[position], position=position) for position in positions]
        try:
            with borrow(run.model) as borrowed:
                sweep = _Sweep(
                    run, borrowed, finish, ranks, lone_batches, samples=result.samples, first_forward=first_forward
                )
                result.tallies = sweep.repeat(good)
                sweep.check_alone()
        except BadBatchesError as error:
            # what these batches gave to earlier layers is in their statistics: begin again without them
            result.left_out += [accept(left_out, run.on_bad_data) for left_out in error.bad.values()]
            good = {position: kept for position, kept in good.items() if (ranks.rank, position) not in error.bad}
        else:
            return result


def _count(batches: Collection[KeptBatch]) -> tuple[int, int]:
    return len(batches), sum(kept.batch.samples for kept in batches)


class BadBatchesError(Exception):
    """Batches turned out to hold NaN or infinity: by rank and position."""

    def __init__(self, bad: Mapping[tuple[int, int], LeftOut]) -> None:
        super().__init__(bad)
        self.bad = bad


@dataclass(frozen=True)
class Pause:
    """The layer at which the forward of a batch stopped.

    Attributes:
        position: of the batch in the list.
        batch: what it is called in messages.
        layer: where it waits; None at the end of the forward.
        moments: of the values that the layer is given; None where it does not wait at one.
        left_out: why the batch is left out: the layer was given NaN or infinity.
    """

    position: int
    batch: str
    layer: str | None
    moments: Moments | None
    left_out: LeftOut | None = None


class _Sweep:
    """Sweeps of all batches over all layers.

    Args:
        run, finish, first_forward: see :func:`measure_exact`.
        borrowed: to add hooks through.
        ranks: of the job.
        lone_batches: that watch batches of this rank.
        samples: of all ranks.
    """

    def __init__(
        self,
        run: Run,
        borrowed: Borrowed,
        finish: Finish,
        ranks: Ranks,
        lone_batches: Sequence[LoneBatch],
        *,
        samples: int,
        first_forward: FirstForward,
    ) -> None:
        self._run = run
        self._borrowed = borrowed
        self._ranks = ranks
        self._samples = samples
        self._first_forward = first_forward
        self._current: PausedForward | None = None
        self._lone_batches = {lone_batch.position: lone_batch for lone_batch in lone_batches}
        self._alone: LoneBatch | None = None
        self._position = 0
        self._memory = FreedMemory(pause=_PAUSE)
        self._kept: KeptBatch | None = None  # any of this rank's
        self._activations = Activations(run.layers, borrowed, self._observe, called=run.called)
        self._calls = RepeatedCalls(lambda name, tally: finish(name, tally, samples), run.layers)

    def _observe(self, name: str, _layer: torch.nn.Module, values: torch.Tensor) -> None:
        """Let the batch that runs wait at a layer."""
        if self._kept is not None:
            self._kept.touch(values)
        with _disable_current_modes():
            moments = measure(values)
        if moments.count:
            check_moments(moments, name, values, least=1)
        lone_batch = self._alone or self._lone_batches.get(self._position)
        if lone_batch is not None:
            lone_batch.note(name, values, moments)
            if self._alone is not None:
                return
        assert self._current is not None
        self._current.pause_at(name, moments)

    def repeat(self, batches: Mapping[int, KeptBatch]) -> dict[str, Tally]:
        """Sweep until all statistics are those of the activations; return what each layer saw, in execution order.

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

    def check_alone(self) -> None:
        """Let each batch that is watched run by itself, on the rank that watches it.

        Raises:
            RefusedError: it gave layers other values when all were on their way together.
        """

        @contextlib.contextmanager
        def watching() -> Iterator[None]:
            guard = contextlib.nullcontext() if self._kept is None else self._kept.watching()
            with guard, self._activations.watching():
                yield

        def check() -> None:
            for lone_batch in self._lone_batches.values():
                self._borrowed.reset()  # what a forward left would be there for the next
                self._alone = lone_batch
                lone_batch.check(self._run, watching)

        self._ranks.share(check)

    def _run_once(self, batches: Mapping[int, KeptBatch]) -> None:
        for lone_batch in self._lone_batches.values():
            lone_batch.begin()
        context = copy_context(self._run.model)
        self._kept = next(iter(batches.values()), None)
        forwards = {position: PausedForward(self._make_run(kept, context)) for position, kept in batches.items()}
        try:
            while True:
                shares = self._ranks.share(
                    lambda: [self._advance(p, forward, batches[p]) for p, forward in forwards.items()]
                )
                # one order whatever the number of ranks: that of the list of batches
                placed = sorted((pause.position, rank, pause) for rank, pauses in enumerate(shares) for pause in pauses)
                bad = {
                    (rank, position): pause.left_out for position, rank, pause in placed if pause.left_out is not None
                }
                if bad:
                    raise BadBatchesError(bad)
                pauses = [pause for _, _, pause in placed]
                if all(pause.layer is None for pause in pauses):
                    return
                self._finish_layer(pauses)
        finally:
            for forward in forwards.values():
                forward.abandon()
            for forward in forwards.values():  # one may wait for what another lets go
                forward.join()

    def _advance(self, position: int, forward: PausedForward, kept: KeptBatch) -> Pause:
        self._current, self._position, batch = forward, position, kept.batch
        try:
            kept.go_on()
            forward.advance()
            kept.wait()
            self._memory.return_unused()
        except NotFiniteError as error:
            with kept.in_memory():
                return Pause(position, batch.description, error.layer, None, describe_bad(batch, error))
        layer, moments = forward.reached or (None, None)
        return Pause(position, batch.description, layer, moments)

    def _finish_layer(self, pauses: Sequence[Pause]) -> None:
        first = pauses[0]
        for other in pauses:
            if other.layer != first.layer:
                raise RefusedError(
                    f"batches take different paths through the model: {first.batch} is at {first.layer or 'the end'}, "
                    f"{other.batch} at {other.layer or 'the end'}; exact statistics need one path for all, use "
                    "--method pooled"
                )
        name = first.layer
        assert name is not None
        tallies = [Tally.of(pause.moments) for pause in pauses if pause.moments is not None and pause.moments.count]
        if tallies:  # else nothing comes to it, as to a head of detections where there are none
            mean, variance = self._calls.add(name, reduce(Tally.and_, tallies))
            set_statistics(self._run.layers[name], mean=mean, variance=variance)
        if self._run.on_progress is not None:
            self._run.on_progress(self._samples * self._calls.layers_seen // len(self._run.layers))

    def _make_run(
        self, kept: KeptBatch, context: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> Callable[[], None]:
        batch = kept.batch

        def run() -> None:
            with (
                context(),
                kept.watching(),
                self._activations.watching(),
                running_user_code(f"running the model on {batch.description}"),
            ):
                given = copy_batch(batch) if self._first_forward.writes_to_inputs else batch
                given.run(self._run.model, channels_last=self._first_forward.channels_last)

        return run
