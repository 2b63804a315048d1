"""Callbacks for the Trainer of transformers: ``Trainer(callbacks=[FreezeBatchNorm()])``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from bntool.freezing.live import unfreeze
from bntool.integrations.freezing import FreezingHook
from bntool.integrations.watching import WatchingHook

_LOGGER = logging.getLogger("transformers.bntool")  # shown as what transformers says


class FreezeBatchNorm(FreezingHook, TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Freezes the BatchNorm layers of the model as soon as the Trainer has it, and gives it back after training.

    That is before the optimizer is made and before the model is wrapped for several devices.

    Args: see :class:`~bntool.integrations.freezing.FreezingHook`.
    """

    _frozen: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 (its signature)
        """Freeze."""
        self._freeze_once(kwargs.get("model"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Freeze a model that ``model_init`` made since."""
        self._freeze_once(kwargs.get("model"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Give the model back."""
        if self._frozen is not None:
            unfreeze(self._frozen)
            self._frozen = None

    def _freeze_once(self, model: Any) -> None:
        if model is not None and model is not self._frozen:
            self.freeze(model)
            self._frozen = model


class WatchBatchNorm(WatchingHook, TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Logs the health of BatchNorm layers, and stops the Trainer on a sick one.

    Callbacks do not know their Trainer: ``trainer.add_callback(WatchBatchNorm(trainer.log))``.

    Args:
        log: takes the metrics; without it they are only added to ``trainer.state.log_history``.
        options: see :class:`~bntool.integrations.watching.WatchingHook`; a step is one of the optimizer.
    """

    def __init__(self, log: Callable[[dict[str, float]], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._log = log

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look, log and perhaps stop."""
        look = self.watch(kwargs["model"], state.global_step)
        if look is None:
            return
        if self._log is None:
            state.log_history.append({**look.metrics, "step": look.step})
        else:
            self._log(dict(look.metrics))
        if self.must_stop(look):
            _LOGGER.error(look.describe())
            control.should_training_stop = True
