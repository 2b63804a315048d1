"""Live models in their deploy form: their own code makes it, bntool's tensors are loaded into it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bntool.checkpoints.checkpoint import StateDict
from bntool.errors import RefusedError, UserCodeError
from bntool.folding.deploy.fusing_methods import METHODS, find_method, fuse
from bntool.modules.application import read_state
from bntool.modules.copying import copy_model
from bntool.modules.finding import find_name_prefix
from bntool.modules.loading import load_state


def take_deploy_form(model: nn.Module) -> None:
    """Let a model, or each module inside it, take its deploy form, in place, as timm's ``reparameterize_model`` does.

    Raises:
        UserCodeError: the code of a module raised.
        RefusedError: no module has a deploy form.
    """
    if not any(find_method(module) for module in model.modules()):
        raise RefusedError(f"no module of the model has a deploy form: none has {'(), '.join(METHODS)}()")
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)
    default = torch.get_default_dtype()
    modes = {module: module.training for module in model.modules()}
    model.eval()  # the forms of some are made in this mode only
    try:
        if dtype is torch.float64:  # of what the code makes anew
            torch.set_default_dtype(dtype)
        with torch.no_grad():
            fused = fuse(model)
    except Exception as error:
        raise UserCodeError(f"the model raised {error!r} when it was to take its deploy form") from error
    finally:
        torch.set_default_dtype(default)
        for module, was_training in modes.items():
            module.training = was_training
    if fused is not model:
        raise RefusedError("the whole model is one module that another takes the place of: there is nothing around it")
    if dtype is not None:
        model.to(dtype)


def find_deployed_names(model: nn.Module, layers: Iterable[str]) -> frozenset[str]:
    """Return the names of the tensors that a model has in its deploy form.

    Args:
        model: given back as it was.
        layers: some of it; names go without what theirs do.

    Raises:
        UserCodeError, RefusedError: as above.
    """
    prefix = find_name_prefix(model, (f"{layer}." for layer in layers))
    deployed = copy_model(model)
    take_deploy_form(deployed)
    return frozenset(name.removeprefix(prefix) for name in read_state(deployed).tensors)


def load_deploy_form(model: nn.Module, state_dict: StateDict) -> None:
    """Make a model the deploy model with the tensors of a state dict, strictly.

    Raises:
        UserCodeError: the code of a module raised.
        RefusedError: no module has a deploy form, or the state dict does not fit it.
    """
    take_deploy_form(model)
    load_state(model, state_dict)
