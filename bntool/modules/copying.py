"""Copies of live models, also of those that keep tensors they computed in a forward."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from bntool.errors import UserCodeError
from bntool.modules.calling import tensors_in
from bntool.modules.finding import walk_modules

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """Make a deep copy of a model.

    Tensors that were computed with gradients, as pruning, weight_norm and spectral_norm keep them beside parameters,
    are copied by their elements; torch would refuse them.

    Raises:
        UserCodeError: something in it cannot be copied.
    """
    computed: dict[int, Any] = {}
    for _, module in walk_modules(model):
        for tensor in tensors_in(list(vars(module).values())):
            if not tensor.is_leaf:
                computed[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:
        raise UserCodeError(f"the model cannot be copied: {' '.join(str(error).split())}") from error
