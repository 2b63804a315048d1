"""Callbacks for Lightning: ``Trainer(callbacks=[FreezeBatchNorm(), WatchBatchNorm()])``."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch.callbacks import Callback  # type: ignore[import-not-found, unused-ignore]
    from lightning.pytorch.utilities import rank_zero_warn  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # the package under its older name
    from pytorch_lightning.callbacks import Callback  # type: ignore[no-redef, import-not-found, unused-ignore]
    from pytorch_lightning.utilities import rank_zero_warn  # type: ignore[no-redef, import-not-found, unused-ignore]

from bntool.freezing.live import unfreeze
from bntool.integrations.freezing import FreezingHook
from bntool.integrations.watching import WatchingHook


class FreezeBatchNorm(FreezingHook, Callback):  # type: ignore[misc, unused-ignore]
    """Freezes the BatchNorm layers of the module while it is fitted, and gives it back as it was.

    It freezes before the optimizers are configured and before the strategy wraps the module.

    Args: see :class:`~bntool.integrations.freezing.FreezingHook`.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 (Lightning's own signature)
        """Freeze."""
        if stage == "fit":
            self.freeze(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Give the module back."""
        if stage == "fit":
            unfreeze(pl_module)


class WatchBatchNorm(WatchingHook, Callback):  # type: ignore[misc, unused-ignore]
    """Gives the health of BatchNorm layers to the trainer's loggers, and stops it on a sick layer.

    Args: see :class:`~bntool.integrations.watching.WatchingHook`; a step is one of the optimizer.
    """

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Look, log and perhaps stop."""
        look = self.watch(pl_module, trainer.global_step)
        if look is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(look.metrics, step=look.step)
        if self.must_stop(look):
            rank_zero_warn(look.describe())
            trainer.should_stop = True
