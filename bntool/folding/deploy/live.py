"""Live models in their deploy form: their own code makes it, bntool's tensors are loaded into it."""

from __future__ import annotations

import torch
from torch import nn

from bntool.checkpoints.checkpoint import StateDict
from bntool.errors import RefusedError, UserCodeError
from bntool.modules.loading import load_state

_METHODS = ("reparameterize", "switch_to_deploy")  # that change a module in place; fuse() gives another one


def take_deploy_form(model: nn.Module) -> None:
    """Let each module inside a model take its deploy form, in place, as timm's ``reparameterize_model`` does.

    Raises:
        UserCodeError: the code of a module raised.
        RefusedError: no module has a deploy form.
    """
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)
    default = torch.get_default_dtype()
    try:
        if dtype is torch.float64:  # of what the code makes anew
            torch.set_default_dtype(dtype)
        with torch.no_grad():
            found = _take(model)
    except Exception as error:
        raise UserCodeError(f"the model raised {error!r} when it was to take its deploy form") from error
    finally:
        torch.set_default_dtype(default)
    if not found:
        raise RefusedError(f"no module of the model has a deploy form: none has fuse(), {'() or '.join(_METHODS)}()")
    if dtype is not None:
        model.to(dtype)


def _take(module: nn.Module) -> bool:
    found = False
    for name, child in list(module.named_children()):
        fuse = getattr(child, "fuse", None)
        if callable(fuse):
            setattr(module, name, fuse())
            found = True
        else:
            method = next((method for method in _METHODS if callable(getattr(child, method, None))), None)
            if method is not None:
                getattr(child, method)()
                found = True
        found = _take(getattr(module, name)) or found
    return found


def load_deploy_form(model: nn.Module, state_dict: StateDict) -> None:
    """Make a model the deploy model with the tensors of a state dict, strictly.

    Raises:
        UserCodeError: the code of a module raised.
        RefusedError: no module has a deploy form, or the state dict does not fit it.
    """
    take_deploy_form(model)
    load_state(model, state_dict)
