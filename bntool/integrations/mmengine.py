"""Hooks for MMEngine: ``custom_hooks = [dict(type='FreezeBatchNormHook'), dict(type='WatchBatchNormHook')]``."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from bntool.integrations.freezing import FreezingHook
from bntool.integrations.watching import WatchingHook


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


@HOOKS.register_module()  # type: ignore[untyped-decorator, unused-ignore]
class WatchBatchNormHook(WatchingHook, Hook):  # type: ignore[misc, unused-ignore]
    """Gives the health of BatchNorm layers to the message hub, from where it is logged, and stops on a sick one.

    Args: see :class:`~bntool.integrations.watching.WatchingHook`; a step is an iteration.
    """

    priority = "NORMAL"  # before LoggerHook

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Look, log and perhaps stop."""
        look = self.watch(runner.model, runner.iter + 1)
        if look is None:
            return
        for name, value in look.metrics.items():
            runner.message_hub.update_scalar(f"train/{name}", value)
        if self.must_stop(look):
            runner.logger.error(look.describe())
            runner.train_loop.stop_training = True
