"""The live model that a checkpoint belongs to, with its state: from ``--model``, or a copy of one that is there."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

import torch

from bntool.checkpoints.checkpoint import StateDict
from bntool.errors import UsageError
from bntool.models.exported import check_has_layers
from bntool.models.loading import load_model
from bntool.modules.copying import copy_model
from bntool.modules.loading import load_state


def build_model(
    model: str | torch.nn.Module,
    state_dict: StateDict,
    *,
    arguments: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
    may_lack: Collection[str] = (),
) -> torch.nn.Module:
    """Build a model, load a state dict into it and move it to a device.

    Args:
        model: a spec as ``--model`` has it, or a live model, of which a copy is taken.
        arguments: of the factory of a spec, see :func:`~bntool.models.loading.load_model`.
        may_lack: see :func:`~bntool.modules.loading.load_state`.
        device: where it is to run; ``cuda`` is the process's own device in a job of several.

    Raises:
        UsageError: the spec or the device cannot be understood.
        UserCodeError: the user's code raised, or the live model cannot be copied.
        RefusedError: the model is a compiled program, or the state dict does not fit it.
    """
    place = str(device)
    if place == "meta":
        raise UsageError("--device meta computes nothing")
    if place == "cuda" and "LOCAL_RANK" in os.environ:
        place = f"cuda:{os.environ['LOCAL_RANK']}"
    if isinstance(model, str):
        live = load_model(model, arguments=arguments or {})
        check_has_layers(live, model)
    else:
        check_has_layers(model, "the model")
        live = copy_model(model)
    load_state(live, state_dict, may_lack=may_lack)
    try:
        return live.to(place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"the model cannot be moved to --device {place}: {' '.join(str(error).split())}") from error
