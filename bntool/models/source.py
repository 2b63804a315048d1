"""What a kind of ``--model`` spec must be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch


class ModelSource(ABC):
    """One kind of model spec."""

    form: str  # how the spec is written, for messages and help

    @abstractmethod
    def recognises(self, spec: str) -> bool:
        """Whether the spec is of this kind."""

    @abstractmethod
    def load(self, spec: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
        """Build the model.

        Raises:
            UsageError: the spec names something that does not exist.
            MissingExtraError: a package is missing.
            UserCodeError: the code that it names raised.
        """
