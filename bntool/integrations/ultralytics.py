"""Callbacks for ultralytics: ``FreezeBatchNorm().add_to(model)`` before ``model.train(...)``, model being a ``YOLO``.

On several devices ultralytics trains in other processes, which know nothing of callbacks: train on one.
"""

from __future__ import annotations

from typing import Any

from ultralytics.utils import LOGGER

from bntool.freezing.live import unfreeze
from bntool.integrations.freezing import FreezingHook
from bntool.integrations.watching import WatchingHook


class FreezeBatchNorm(FreezingHook):
    """Freezes the BatchNorm layers of the trainer's model while it trains, and gives it back as it was.

    ultralytics validates and saves an average of the model (EMA). Averages of numbers that do not move are these
    numbers, rounded.

    Args: see :class:`~bntool.integrations.freezing.FreezingHook`.
    """

    def add_to(self, model: Any) -> None:
        """Add it to a ``YOLO`` or a trainer."""
        model.add_callback("on_train_start", self.on_train_start)
        model.add_callback("on_train_end", self.on_train_end)

    def on_train_start(self, trainer: Any) -> None:
        """Freeze, after ultralytics has set ``requires_grad`` of all parameters."""
        self.freeze(trainer.model)

    def on_train_end(self, trainer: Any) -> None:
        """Give the model back."""
        unfreeze(trainer.model)


class WatchBatchNorm(WatchingHook):
    """Logs the health of BatchNorm layers, and stops the trainer on a sick one.

    What was seen last in an epoch is in its row of ``results.csv``.

    Args: see :class:`~bntool.integrations.watching.WatchingHook`; a step is a batch.
    """

    _batches = 0

    def add_to(self, model: Any) -> None:
        """Add it to a ``YOLO`` or a trainer."""
        model.add_callback("on_train_batch_end", self.on_train_batch_end)
        model.add_callback("on_train_epoch_end", self.on_train_epoch_end)

    def on_train_batch_end(self, trainer: Any) -> None:
        """Look, log and perhaps stop."""
        self._batches += 1
        look = self.watch(trainer.model, self._batches)
        if look is None:
            return
        if self.must_stop(look):
            LOGGER.error(look.describe())
            trainer.stop = True
        else:
            LOGGER.info(look.describe())

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Add what was seen last to what the trainer writes of this epoch."""
        names = ("sick", "suspicious", "smallest_variance", "largest_variance", "largest_mean", "nonfinite", "moved")
        seen = {} if self.last is None else self.last.metrics
        # a column that is missing in one row would shift the others
        trainer.lr.update({f"batchnorm/{name}": seen.get(f"batchnorm/{name}", float("nan")) for name in names})
