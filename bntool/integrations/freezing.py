"""The base of the hooks of all training frameworks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from bntool.freezing.live import apply_freeze, freeze


class FreezingHook:
    """Keeps what is to be frozen, until the framework has a model.

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
        super().__init__()
        self._checkpoint = checkpoint
        self._options: dict[str, Any] = {
            "norm_eval": norm_eval,
            "requires_grad": requires_grad,
            "layers": layers,
            "frozen_stages": frozen_stages,
        }

    def freeze(self, model: Any) -> None:
        """Freeze the BatchNorm layers of a model."""
        if self._checkpoint is not None:
            apply_freeze(model, self._checkpoint)
        else:
            freeze(model, **self._options)
