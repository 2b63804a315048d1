"""A check of exact statistics: one batch also runs alone, and each layer must see then what it saw in the sweep."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from bntool.data.batches import Batch, copy_batch, cut_batch
from bntool.errors import RefusedError, UserCodeError
from bntool.models.user_code import running_user_code
from bntool.modules.finding import find_eps
from bntool.recalibration.activation_moments import measure
from bntool.recalibration.exact.offloading import KeptBatch
from bntool.recalibration.moments import Moments
from bntool.recalibration.pooled import Run

_SAMPLES = 2
_AGREEMENT = 1e-3  # of means in sigmas and of variances: float32 kernels for other layouts differ by far less


def choose_positions(batches: Mapping[int, KeptBatch]) -> tuple[int, ...]:
    """Which batches of a rank also run alone, by position: a small one, or both where there are only two.

    Not the first: it enters before any other has changed something of the model that it is to change back, as weights
    that are multiplied for the time of a forward. Nor the last, which sees what it left itself.
    """
    positions = list(batches)
    if len(positions) <= 2:
        return tuple(positions)
    return (min(positions[1:-1], key=lambda position: batches[position].batch.samples),)


@dataclass(frozen=True)
class _LayerInput:
    """The input of one call of a layer: all of it, and the first samples, where activations are by sample."""

    layer: str
    whole: Moments
    few: Moments | None


class LoneBatch:
    """Watches one batch.

    A model that keeps something of one batch for the next, swaps its weights while it runs, is bound to its thread or
    draws random numbers gives other values to a batch that is alone, and no statistics are exact. Two samples tell,
    unless the model mixes samples.

    Args:
        kept: the batch.
        position: of it in the list.
    """

    def __init__(self, kept: KeptBatch, *, position: int) -> None:
        self.position = position
        with kept.in_memory() as batch:
            self._batch = copy_batch(batch)
        self._seen: list[_LayerInput] = []
        self.is_alone = False

    def begin(self) -> None:
        """Begin a sweep."""
        self._seen = []

    def note(self, layer: str, values: torch.Tensor, moments: Moments) -> None:
        """Note what the batch gives a layer.

        Args:
            values: channels in dimension 1.
            moments: of all of them.
        """
        by_sample = not self.is_alone and values.shape[0] == self._batch.samples > _SAMPLES
        self._seen.append(_LayerInput(layer, moments, measure(values[:_SAMPLES]) if by_sample else None))

    def check(self, run: Run, watching: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """Run the batch by itself, with the hooks of the sweep: each layer must see what it saw then.

        Args:
            run: the model and its layers.
            watching: the context in which a forward is watched.

        Raises:
            RefusedError: a layer sees something else.
            UserCodeError: the model raised.
        """
        together = self._seen
        if all(seen.few is not None for seen in together):
            with contextlib.suppress(UserCodeError):  # it may want whole batches
                alone = self._run_alone(run, cut_batch(self._batch, _SAMPLES), watching)
                if _find_difference(run, [(seen.layer, seen.few) for seen in together], alone) is None:
                    return
        alone = self._run_alone(run, self._batch, watching)
        differing = _find_difference(run, [(seen.layer, seen.whole) for seen in together], alone)
        if differing is not None:
            raise RefusedError(
                f"run by itself {self._batch.description} gives this layer other values than together with the other "
                "batches: the model keeps something of one batch for another, changes its weights while it runs, is "
                "random, is bound to its thread, or depends on how its input lies in memory; use --method pooled",
                tensor=differing,
            )

    def _run_alone(
        self, run: Run, batch: Batch, watching: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> list[tuple[str, Moments]]:
        self.is_alone = True
        self.begin()
        with watching(), running_user_code(f"running the model on {batch.description}"):
            copy_batch(batch).run(run.model)
        return [(seen.layer, seen.whole) for seen in self._seen]


def _find_difference(
    run: Run, together: list[tuple[str, Moments | None]], alone: list[tuple[str, Moments]]
) -> str | None:
    """Return the first layer that did not see the same both times."""
    for (name, one), (other, moments) in itertools.zip_longest(together, alone, fillvalue=("", None)):
        if name != other or one is None or moments is None:
            return name or other
        if not _agree(one, moments, eps=find_eps(run.layers[name])):
            return name or other
    return None


def _agree(one: Moments, other: Moments, *, eps: float) -> bool:
    if one.count != other.count:
        return False
    spread = one.biased_variance + eps
    shift = np.abs(one.mean - other.mean) / np.sqrt(spread)
    change = np.abs(one.biased_variance - other.biased_variance) / spread
    return bool((shift <= _AGREEMENT).all() and (change <= _AGREEMENT).all())
