"""Seeing elements leave torch: ``.numpy()``, ``.tolist()`` and the like are no operations that a dispatch mode sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

_ESCAPES = frozenset((Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__))


class Escapes(TorchFunctionMode):
    """Says which tensors are handed to Python or to another library.

    Args:
        note: is told of each, with all dispatch modes off.
    """

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _ESCAPES:
            with _disable_current_modes():
                self._note(args[0])
        return function(*args, **(kwargs or {}))
