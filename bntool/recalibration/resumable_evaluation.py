"""Evaluating that can be resumed after the process was killed: what was computed so far is kept in a file."""

from __future__ import annotations

import functools
import io
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.outputs import OutputFiles
from bntool.data.batches import Batches
from bntool.data.fingerprints import make_fingerprint
from bntool.data.policies import LeftOut, OnBadData
from bntool.data.shares import Share
from bntool.recalibration.evaluation import Collection, Evaluation, Metric, evaluate, join
from bntool.recalibration.fingerprints import fingerprint_model, fingerprint_state_dict

_MOST = 1 << 28  # bytes of outputs: to write more of them takes longer than it may save
_FIELDS = ("samples", "batches", "labelled", "finite", "note", "position")


class EvaluationKeeper:
    """Keeps outputs and labels of the batches so far, where they are tensors of no more than 256 MiB.

    Args:
        path: the file; None to keep nothing.
        key: what the outputs are of; a file with another key is passed over.
        every: seconds from one writing to the next.
    """

    def __init__(self, path: Path | None, key: str, *, every: float) -> None:
        self._path, self._key, self._every = path, key, every
        self._written = time.monotonic()

    def begin(self, metric: Metric) -> Collection:
        """Begin with what a run before has collected; with nothing where it kept nothing, or of something else."""
        collected = Collection(metric)
        if self._path is None or not self._path.is_file():
            return collected
        try:
            held: dict[str, Any] = torch.load(self._path, weights_only=True)
            if held["key"] != self._key:
                return collected
            collected.left_out = [LeftOut(*entry) for entry in held["left_out"]]
            collected.outputs, collected.labels = list(held["outputs"]), list(held["labels"])
            for name in _FIELDS:
                setattr(collected, name, held[name])
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError):
            return Collection(metric)  # to evaluate again is right, too
        return collected

    def after_batch(self, collected: Collection) -> None:
        """Write the file, if it is time."""
        if time.monotonic() - self._written >= self._every:
            self.write(collected)
            self._written = time.monotonic()

    def write(self, collected: Collection) -> None:
        """Write the file, if what is collected can be kept."""
        if self._path is None or not _can_be_kept([*collected.outputs, *collected.labels]):
            return
        collected.outputs, collected.labels = _put_together(collected.outputs), _put_together(collected.labels)
        held = {
            "key": self._key,
            "outputs": collected.outputs,
            "labels": collected.labels,
            "left_out": [(one.reason, one.samples, one.layer) for one in collected.left_out],
            **{name: getattr(collected, name) for name in _FIELDS},
        }
        content = io.BytesIO()
        torch.save(held, content)
        with OutputFiles(force=True) as output:
            output.open(self._path).write(content.getbuffer())

    def remove(self) -> None:
        """Remove the file: all is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@dataclass
class Judge:
    """Evaluates a model before and after on the same data, and goes on with what a killed run has done of that.

    Attributes:
        model: which is given the new statistics between.
        batches: the evaluation data.
        reopen: gives a share of the same data.
        metric, on_bad_data: see :func:`~bntool.recalibration.evaluation.evaluate`.
        path: of the files that are kept, which get a name of their own each; None to keep none.
        every: seconds from one writing to the next.
    """

    model: torch.nn.Module
    batches: Batches
    reopen: Callable[..., Batches]
    metric: Metric
    on_bad_data: OnBadData
    path: Path | None
    every: float
    _keepers: list[EvaluationKeeper] = field(default_factory=list)

    def evaluate(self, phase: str, state_dict: StateDict, *, on_progress: Callable[[int], None]) -> Evaluation:
        """Evaluate the model on the data.

        Args:
            phase: a word for the name of the file.
            state_dict: what the model holds.
            on_progress: called with the number of samples done.
        """
        judge = functools.partial(
            evaluate, self.model, metric=self.metric, on_bad_data=self.on_bad_data, on_progress=on_progress
        )
        if self.path is None:
            return judge(self.batches)
        facts = (fingerprint_state_dict(state_dict), fingerprint_model(self.model), self.batches.identify())
        key = make_fingerprint(*facts, self.batches.description)
        path = self.path.with_name(f"{self.path.stem}.{phase}.pt")
        keeper = EvaluationKeeper(path, key, every=self.every)
        self._keepers.append(keeper)
        collected = keeper.begin(self.metric)
        rest = self.reopen(share=Share(start=collected.position)) if collected.position else self.batches
        result = judge(rest, collected=collected, after_batch=keeper.after_batch)
        keeper.write(collected)
        return result

    def end(self) -> None:
        """Remove the files: all is done."""
        for keeper in self._keepers:
            keeper.remove()


def _can_be_kept(parts: Sequence[Any]) -> bool:
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    return len(tensors) == len(parts) and sum(tensor.nbytes for tensor in tensors) <= _MOST


def _put_together(parts: list[Any]) -> list[Any]:
    joined = join(parts) if parts else None
    return [joined] if isinstance(joined, torch.Tensor) else parts
