"""A hook for MMEngine: ``custom_hooks = [dict(type='FreezeBatchNormHook')]``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from bntool.freezing.live import apply_freeze, freeze


@HOOKS.register_module()  # type: ignore[untyped-decorator, unused-ignore]
class FreezeBatchNormHook(Hook):  # type: ignore[misc, unused-ignore]
    """Freezes the BatchNorm layers of the runner's model before it trains.

    MMEngine wraps the model in DDP before hooks run, and DDP does not take switching gradients off after that: there,
    use ``norm_cfg=dict(requires_grad=False)`` and ``frozen_stages`` of the config for those, and this hook for
    ``norm_eval``.

    Args:
        checkpoint: a file with a recorded policy, see :func:`bntool.freezing.live.apply_freeze`; the other
            arguments are not looked at then.
        norm_eval, requires_grad, layers, frozen_stages: see :func:`bntool.freezing.live.freeze`.
    """

    priority = "VERY_HIGH"

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

    def before_train(self, runner: Any) -> None:
        """Freeze; from then on ``model.train()`` of every epoch leaves the layers alone."""
        if self._checkpoint is not None:
            apply_freeze(runner.model, self._checkpoint)
        else:
            freeze(runner.model, **self._options)
