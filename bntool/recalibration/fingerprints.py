"""Fingerprints that tell whether two runs measured the same state dict with the same model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import StoredTensor, named_chunks
from bntool.data.fingerprints import Fingerprint

if TYPE_CHECKING:
    import torch

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint_state_dict(state_dict: StateDict) -> str:
    """Hash all names, dtypes, shapes and elements, equal for every format of the file; each byte is read."""
    digest = Fingerprint()
    for name, tensor in state_dict.tensors.items():
        digest.add(state_dict.strip(name), tensor.dtype.name, tuple(tensor.shape))
        if not isinstance(tensor, StoredTensor) or (tensor.storage is not None and tensor.wrapper is None):
            for chunk in named_chunks(name, tensor):
                digest.add_bytes(chunk)
    return digest.text


def fingerprint_model(model: torch.nn.Module) -> str:
    """Hash the names and classes of modules and what they say of themselves (sizes, strides, eps); not their code."""
    from bntool.modules.finding import walk_modules

    digest = Fingerprint()
    for name, module in walk_modules(model):
        digest.add(name, type(module).__qualname__, _describe(module))
    return digest.text


def _describe(module: Any) -> str:
    try:
        return _ADDRESS.sub("", str(module.extra_repr()))
    except Exception:  # noqa: BLE001 code of the model, which is asked for words only
        return ""
