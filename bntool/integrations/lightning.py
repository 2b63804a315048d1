"""A callback for Lightning: ``Trainer(callbacks=[FreezeBatchNorm()])``."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch.callbacks import Callback  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # the package under its older name
    from pytorch_lightning.callbacks import Callback  # type: ignore[no-redef, import-not-found, unused-ignore]

from bntool.freezing.live import unfreeze
from bntool.integrations.freezing import FreezingHook


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
