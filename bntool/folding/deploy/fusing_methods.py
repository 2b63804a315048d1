"""Methods by which a model fuses itself: ``fuse()``, ``reparameterize()`` and ``switch_to_deploy()``."""

from __future__ import annotations

import inspect

import torch
from torch import nn

# of ultralytics and LeViT, which may give another module; of timm's MobileOne, FastViT and others; of RepVGG's authors
METHODS = ("fuse", "reparameterize", "switch_to_deploy")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def find_method(module: nn.Module) -> str | None:
    """Return the first method of a module's class that fuses it, and that can be called without arguments."""
    for name in METHODS:
        method = getattr(type(module), name, None)
        if not inspect.isfunction(method):
            continue
        _, *parameters = inspect.signature(method).parameters.values()
        if all(parameter.default is not parameter.empty or parameter.kind in _VARIADIC for parameter in parameters):
            return name
    return None


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Let a model fuse itself with all its parts, or else each of them, in place.

    Parts are gone through as ``reparameterize_model`` of timm 1.0 does it.

    Returns:
        The model, or the module that takes its place.
    """
    return _call(model) if find_method(model) == "fuse" else _fuse_parts(_call(model))


def _fuse_parts(module: nn.Module) -> nn.Module:
    for name, child in list(module.named_children()):
        setattr(module, name, _fuse_parts(_call(child)))
    return module


def _call(module: nn.Module) -> nn.Module:
    name = find_method(module)
    if name is None:
        return module
    method = getattr(module, name)
    fused = method(verbose=False) if "verbose" in inspect.signature(method).parameters else method()
    return fused if isinstance(fused, nn.Module) else module
