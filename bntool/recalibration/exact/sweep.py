"""Self-consistent statistics in one sweep: all batches advance through the model together, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch

from bntool.data.batches import Batch, LeftOut, copy_batch
from bntool.errors import RefusedError
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import Borrowed, borrow
from bntool.recalibration.activations import Activations
from bntool.recalibration.exact.check_alone import Witness
from bntool.recalibration.exact.first_forward import Trial
from bntool.recalibration.exact.paused_forwards import Lane, copy_context
from bntool.recalibration.exact.repeated_calls import Finish, RepeatedCalls
from bntool.recalibration.moments import Moments, measure
from bntool.recalibration.pooled import (
    Measurement,
    NotFiniteError,
    Run,
    Tally,
    accept,
    check_moments,
    describe_bad,
    has_finite_inputs,
    set_statistics,
)
from bntool.recalibration.ranks import Ranks, find_ranks


def measure_exact(run: Run, batches: Iterable[Batch], finish: Finish, trial: Trial) -> Measurement:
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
        leader = next((rank for rank, (count, _) in enumerate(counts) if count), None)
        witness = Witness(good) if ranks.rank == leader else None
        try:
            with borrow(run.model) as borrowed:
                sweep = _Sweep(run, borrowed, finish, ranks, witness, samples=result.samples, trial=trial)
                result.tallies = sweep.repeat(good)
                borrowed.reset()
                sweep.check_alone()
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
        run, finish, trial: see :func:`measure_exact`.
        borrowed: to add hooks through.
        ranks: of the job.
        witness: that watches one of this rank's batches.
        samples: of all ranks.
    """

    def __init__(
        self,
        run: Run,
        borrowed: Borrowed,
        finish: Finish,
        ranks: Ranks,
        witness: Witness | None,
        *,
        samples: int,
        trial: Trial,
    ) -> None:
        self._run = run
        self._ranks = ranks
        self._samples = samples
        self._trial = trial
        self._current: Lane | None = None
        self._witness = witness
        self._position = 0
        self._activations = Activations(run.layers, borrowed, self._observe)
        self._calls = RepeatedCalls(lambda name, tally: finish(name, tally, samples), run.layers)

    def _observe(self, name: str, _layer: torch.nn.Module, values: torch.Tensor) -> None:
        """Let the batch that runs wait at a layer."""
        moments = measure(values)
        if moments.count:
            check_moments(moments, name, values, least=1)
        witness = self._witness
        if witness is not None and (witness.is_alone or witness.position == self._position):
            witness.note(name, values, moments)
            if witness.is_alone:
                return
        assert self._current is not None
        self._current.stop_at(name, moments)

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

    def check_alone(self) -> None:
        """Let one batch run by itself, on the rank that watches one.

        Raises:
            RefusedError: it gave layers other values when all were on their way together.
        """
        witness, watching = self._witness, self._activations.watching
        self._ranks.share(lambda: witness.check(self._run, watching) if witness is not None else None)

    def _run_once(self, batches: Mapping[int, Batch]) -> None:
        if self._witness is not None:
            self._witness.begin()
        context = copy_context(self._run.model)
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
        self._current, self._position = lane, position
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
        tallies = [Tally.of(stop.moments) for stop in stops if stop.moments is not None and stop.moments.count]
        if tallies:  # else nothing comes to it, as to a head of detections where there are none
            mean, variance = self._calls.add(name, reduce(Tally.and_, tallies))
            set_statistics(self._run.layers[name], mean=mean, variance=variance)
        if self._run.on_progress is not None:
            self._run.on_progress(self._samples * self._calls.layers_seen // len(self._run.layers))

    def _make_run(
        self, batch: Batch, context: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> Callable[[], None]:
        def run() -> None:
            with (
                context(),
                self._activations.watching(),
                running_user_code(f"running the model on {batch.description}"),
            ):
                given = copy_batch(batch) if self._trial.writes_to_inputs else batch
                given.run(self._run.model, channels_last=self._trial.channels_last)

        return run
