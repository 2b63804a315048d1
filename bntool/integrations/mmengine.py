"""A hook for MMEngine: ``custom_hooks = [dict(type='FreezeBatchNormHook')]``."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from bntool.integrations.freezing import FreezingHook


@HOOKS.register_module()  # type: ignore[untyped-decorator, unused-ignore]
class FreezeBatchNormHook(FreezingHook, Hook):  # type: ignore[misc, unused-ignore]
    """Freezes the BatchNorm layers of the runner's model before it trains.

    MMEngine wraps the model in DDP before hooks run, and DDP does not take switching gradients off after that: there,
    use ``norm_cfg=dict(requires_grad=False)`` and ``frozen_stages`` of the config for those, and this hook for
    ``norm_eval``.

    Args: see :class:`~bntool.integrations.freezing.FreezingHook`.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Any) -> None:
        """Freeze; from then on ``model.train()`` of every epoch leaves the layers alone."""
        self.freeze(runner.model)
