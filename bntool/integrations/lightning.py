"""A callback for Lightning: ``Trainer(callbacks=[FreezeBatchNorm()])``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

try:
    from lightning.pytorch.callbacks import Callback  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # the package under its older name
    from pytorch_lightning.callbacks import Callback  # type: ignore[no-redef, import-not-found, unused-ignore]

from bntool.freezing.live import apply_freeze, freeze, unfreeze


class FreezeBatchNorm(Callback):  # type: ignore[misc, unused-ignore]
    """Freezes the BatchNorm layers of the module while it is fitted, and gives it back as it was.

    It freezes before the optimizers are configured and before the strategy wraps the module.

    Args:
        checkpoint: a file with a recorded policy, see :func:`bntool.freezing.live.apply_freeze`; the other
            arguments are not looked at then.
        norm_eval, requires_grad, layers, frozen_stages: see :func:`bntool.freezing.live.freeze`.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        norm_eval: bool = True,
        requires_grad: bool | None = None,
        layers: str | Sequence[str] | None = None,
        frozen_stages: int | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._options: dict[str, Any] = {
            "norm_eval": norm_eval,
            "requires_grad": requires_grad,
            "layers": layers,
            "frozen_stages": frozen_stages,
        }

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 (Lightning's own signature)
        """Freeze."""
        if stage == "fit":
            if self._checkpoint is not None:
                apply_freeze(pl_module, self._checkpoint)
            else:
                freeze(pl_module, **self._options)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Give the module back."""
        if stage == "fit":
            unfreeze(pl_module)
