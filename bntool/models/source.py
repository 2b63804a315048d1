"""The interface of each kind of ``--model`` spec."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bntool.errors import MissingExtraError

if TYPE_CHECKING:
    import torch


def check_package(spec: str, package: str, *, install: str) -> None:
    """Find out whether a package is installed that a spec needs.

    Args:
        install: what to give to ``pip install``.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"{spec} needs {package}: pip install {install} (No module named {package!r})")


class ModelSource(ABC):
    """One kind of model spec."""

    form: str  # how the spec is written, for messages and help

    @abstractmethod
    def recognises(self, spec: str) -> bool:
        """Return whether the spec is of this kind."""

    def check(self, spec: str) -> None:  # noqa: B027 most can be found out only by loading
        """Find out without importing torch, which takes seconds, what the spec needs and is not there.

        Raises:
            UsageError: a file is missing.
            MissingExtraError: a package is missing.
        """

    @abstractmethod
    def load(self, spec: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
        """Build the model.

        Raises:
            UsageError: the spec names something that does not exist.
            MissingExtraError: a package is missing.
            UserCodeError: the code that it names raised.
        """
