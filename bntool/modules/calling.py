"""Calling a model with inputs of any form, and the tensors in what it is given and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bntool.errors import UserCodeError
from bntool.models.user_code import describe_exception


def tensors_in(items: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [item for item in tree_flatten(items)[0] if isinstance(item, Tensor)]


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's answer to a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        UserCodeError: the model's forward raised.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except (Exception, SystemExit) as error:
        shapes = [list(tensor.shape) for tensor in tensors_in(inputs)]
        said = describe_exception(error)
        raise UserCodeError(f"the model raised on inputs of shape {shapes}: {said}") from error
