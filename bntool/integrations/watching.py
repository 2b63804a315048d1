"""The base of the hooks that watch BatchNorm while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bntool.errors import UsageError
from bntool.inspection.checkpoint import inspect
from bntool.inspection.findings import Severity
from bntool.inspection.run import FileSummary, Follower, LayerState
from bntool.inspection.verdict import Health
from bntool.representation import list_first

_LISTED = 3  # findings in a message


class Look(NamedTuple):
    """The health that was seen at one step.

    Attributes:
        step: how many steps had been made.
        summary: the verdict, findings and layers, by the rules of ``bntool inspect``.
        metrics: numbers for a logger, by names that begin with ``batchnorm/``; those that are not finite are left out.
        is_sick: a layer is sick on this rank or another: training goes on in vain.
    """

    step: int
    summary: FileSummary
    metrics: dict[str, float]
    is_sick: bool

    def describe(self) -> str:
        """Return the verdict, and the errors where there are some, in a sentence."""
        verdict = self.summary.verdict
        errors = [found for found in self.summary.findings if found.finding.severity is Severity.ERROR]
        clauses = [f"{list_first(one.layers, _LISTED)}: {one.finding.message}" for one in errors]
        listed = list_first(clauses, _LISTED, separator="; ")
        said = "" if verdict is None else verdict.sentence
        return f"BatchNorm after {self.step} steps: {said}" + (f": {listed}" if listed else "")


class WatchingHook:
    """Looks at the BatchNorm layers of a model every so many steps, and says whether training is to stop.

    What is looked at is each layer's tensors and flags, as in ``bntool inspect``, and how far statistics moved since
    the look before. A layer is sick where a finding is an error: NaN, negative variances, statistics that exploded.
    With several ranks all must look at the same steps: one whose layers are sick stops all.

    Args:
        every: steps between two looks.
        stop: whether a sick layer ends the training.
        layers: globs of layer names; none for all.
        each_layer: metrics of each layer, too; else those over all of them.

    Attributes:
        last: what was seen last; None before the first look.

    Raises:
        UsageError: ``every`` is no positive number.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        stop: bool = True,
        layers: str | Sequence[str] | None = None,
        each_layer: bool = False,
    ) -> None:
        super().__init__()
        if every < 1:
            raise UsageError(f"every={every!r} is no number of steps")
        self._every, self._stops, self._each_layer = every, stop, each_layer
        self._layers = [layers] if isinstance(layers, str) else list(layers or ())
        self._follower = Follower()
        self.last: Look | None = None

    def watch(self, model: torch.nn.Module, step: int) -> Look | None:
        """Look at a model after a step, where one is due; None where none is.

        Args:
            step: how many steps were made; the same step is looked at once.

        Raises:
            UsageError: a glob selects no layer.
        """
        if step % self._every or step == 0 or (self.last is not None and self.last.step == step):
            return None
        summary = self._follower.summarize(f"step {step}", inspect(model, layers=self._layers))
        is_sick = summary.verdict is not None and summary.verdict.health is Health.SICK
        metrics = _collect_metrics(summary, each_layer=self._each_layer)
        self.last = Look(step, summary, metrics, _is_on_any_rank(is_sick))
        return self.last

    def must_stop(self, look: Look | None) -> bool:
        """Return whether training is to end after a look."""
        return self._stops and look is not None and look.is_sick


def _collect_metrics(summary: FileSummary, *, each_layer: bool) -> dict[str, float]:
    verdict, states = summary.verdict, summary.layers
    found: dict[str, float | None] = {
        "sick": None if verdict is None else float(verdict.sick),
        "suspicious": None if verdict is None else float(verdict.suspicious),
        **_merge(list(states.values())),
    }
    if each_layer:
        found |= {f"{name}/{key}": value for name, state in states.items() for key, value in _merge([state]).items()}
    return {f"batchnorm/{key}": value for key, value in found.items() if value is not None and math.isfinite(value)}


def _merge(states: Sequence[LayerState]) -> dict[str, float | None]:
    return {
        "smallest_variance": min(
            (s.smallest_variance for s in states if s.smallest_variance is not None), default=None
        ),
        "largest_variance": max((s.largest_variance for s in states if s.largest_variance is not None), default=None),
        "largest_mean": max((s.largest_mean for s in states if s.largest_mean is not None), default=None),
        "nonfinite": float(sum(s.nonfinite for s in states)),
        "moved": max((s.moved for s in states if s.moved is not None), default=None),
    }


def _is_on_any_rank(flag: bool) -> bool:  # noqa: FBT001 (as bool takes it)
    """Return whether a flag is set on one of the processes that train together, or here where there are no others."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return flag
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    shared = torch.tensor([float(flag)], device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return bool(shared.item())
