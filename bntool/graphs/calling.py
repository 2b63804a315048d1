"""Calling a model with inputs of any form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bntool.errors import UserCodeError
from bntool.graphs.tracked import tensors_in
from bntool.models.user_code import describe_exception


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
