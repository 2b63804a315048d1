"""Layers that one forward calls more than once: statistics that hold for all their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch

from bntool.modules.finding import find_eps
from bntool.recalibration.moments import Tally
from bntool.recalibration.new_statistics import Pair

# final running_mean and running_var of a layer, from its name, what it has seen, and the number of samples
Finish = Callable[[str, Tally, int], Pair]

_TOLERANCE = 1e-7  # of means in sigmas and of variances: what float32 can hold
_SWEEPS = 12  # more than one for each layer


class NotSettledError(Exception):
    """No self-consistent statistics were found for layers that are called more than once.

    Attributes:
        calls: how often one forward calls each of them.
    """

    def __init__(self, calls: Mapping[str, int]) -> None:
        super().__init__(calls)
        self.calls = calls


@dataclass
class _Calls:
    """The calls of one layer, each at its position.

    Attributes:
        seen: in this sweep.
        before: in the sweep before.
        given: the statistics that each call was to normalise by.
    """

    seen: list[Tally] = field(default_factory=list)
    before: list[Tally] = field(default_factory=list)
    given: list[Pair] = field(default_factory=list)

    @property
    def together(self) -> Tally:
        return reduce(Tally.and_, self.seen)


class RepeatedCalls:
    """Moments of each call of each layer, in sweeps that repeat until one pair of statistics holds for all calls.

    A layer that is called once has final statistics as soon as all batches have reached it. The first call of one that
    is called again has to go on before the others are known: it is given the moments of the calls so far together with
    what later calls saw in the sweep before. A sweep in which every call was given what all calls turn out to have seen
    is the last. Where no call of a layer depends on another one of it (a head shared by the levels of a pyramid, twin
    branches), one sweep for each such layer in a row settles the next. Where a call depends on an earlier one, the
    sweeps are an iteration towards a fixed point, which there may or may not be.

    Args:
        finish: from a layer's name and all it has seen to its final statistics.
        layers: the live modules, by name.
    """

    def __init__(self, finish: Callable[[str, Tally], Pair], layers: Mapping[str, torch.nn.Module]) -> None:
        self._finish = finish
        self._layers = layers
        self._calls: dict[str, _Calls] = {}
        self._sweeps = 1

    @property
    def tallies(self) -> dict[str, Tally]:
        """All calls of each layer together, in execution order."""
        return {name: calls.together for name, calls in self._calls.items()}

    @property
    def layers_seen(self) -> int:
        """The number of layers that this sweep has reached."""
        return sum(1 for calls in self._calls.values() if calls.seen)

    @property
    def have_settled(self) -> bool:
        """Whether every call of this sweep was given the statistics of all calls."""
        return not self._find_unsettled()

    def add(self, name: str, tally: Tally) -> Pair:
        """Add what the next call of a layer sees; the statistics that it is to normalise by."""
        calls = self._calls.setdefault(name, _Calls())
        calls.seen.append(tally)
        known = reduce(Tally.and_, [*calls.seen, *calls.before[len(calls.seen) :]])
        calls.given.append(self._finish(name, known))
        return calls.given[-1]

    def begin_again(self) -> None:
        """Begin another sweep.

        Raises:
            NotSettledError: there were enough of them.
        """
        repeated = sum(1 for calls in self._calls.values() if len(calls.seen) > 1)
        if self._sweeps >= repeated + _SWEEPS:
            self.give_up()
        self._sweeps += 1
        self._calls = {name: _Calls(before=calls.seen) for name, calls in self._calls.items()}

    def give_up(self) -> None:
        """Raise NotSettledError."""
        unsettled = self._find_unsettled()
        if not unsettled:  # this sweep broke off: whichever are called more than once
            unsettled = [name for name, calls in self._calls.items() if len(calls.before) > 1]
        raise NotSettledError(
            {name: max(len(c.seen), len(c.before)) for name, c in self._calls.items() if name in unsettled}
        )

    def _find_unsettled(self) -> list[str]:
        return [name for name, calls in self._calls.items() if len(calls.seen) > 1 and not self._has_settled(name)]

    def _has_settled(self, name: str) -> bool:
        calls = self._calls[name]
        mean, variance = self._finish(name, calls.together)
        spread = variance + find_eps(self._layers[name])
        return all(
            bool(
                (np.abs(m - mean) <= _TOLERANCE * np.sqrt(spread)).all()
                and (np.abs(v - variance) <= _TOLERANCE * spread).all()
            )
            for m, v in calls.given
        )
