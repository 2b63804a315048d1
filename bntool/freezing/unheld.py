"""BatchNorms that eval mode does not hold, because code of their own class, or of a module around them, ignores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bntool.batchnorm import STATISTICS
from bntool.errors import BntoolError
from bntool.modules.borrowing import borrow
from bntool.modules.copying import copy_model
from bntool.modules.finding import has_statistics, is_uninitialized, walk_modules
from bntool.modules.own_code import find_names_read, is_torchs
from bntool.plan import Skip, SkipReason

_SHAPES = ((2, 2), (2,), (), (2, 2, 2))  # behind batch and channels: what the class is for is not known
_SAMPLES = 4
_NORMALISING = frozenset(("batch_norm", "native_batch_norm"))


def skip_unheld(layers: Mapping[str, nn.Module]) -> list[Skip]:
    """Skip the layers whose statistics move in eval mode too, seen by running a copy of each on random data.

    Only classes of one's own are tried; one that takes no such data is left out.
    """
    detail = "{} changes its statistics in eval mode too, which is what a freeze keeps layers in"
    known: dict[Any, bool] = {}  # layers of one class with the same settings are tried once
    found = []
    for name, module in layers.items():
        if is_torchs(type(module)):
            continue
        settings = [(key, value) for key, value in vars(module).items() if isinstance(value, bool | int | float | str)]
        alike = (type(module), tuple(settings))
        if alike not in known:
            known[alike] = _moves_in_eval_mode(module)
        if known[alike]:
            found.append(Skip(name, SkipReason.TRAIN_MODE, detail.format(type(module).__name__)))
    return found


def _moves_in_eval_mode(module: nn.Module) -> bool:
    if is_uninitialized(module) or not has_statistics(module):
        return False
    try:
        copied = copy_model(module)
    except BntoolError:
        return False
    for _, inner in walk_modules(copied):
        inner.training = False  # as a held one is: its class may have a train() of its own
    mean = copied._buffers["running_mean"]
    assert mean is not None
    generator = torch.Generator().manual_seed(20)
    for shape in _SHAPES:
        data = torch.randn((_SAMPLES, mean.numel(), *shape), generator=generator, dtype=torch.float32) + 3
        with borrow(copied), torch.no_grad():
            before = [_statistic(copied, role).clone() for role in STATISTICS]
            try:
                type(copied).forward(copied, data.to(mean))  # without hooks, which may be those of the original
            except Exception:  # noqa: BLE001, S112 of the user's class, which is made for other data
                continue
            after = [_statistic(copied, role) for role in STATISTICS]
            return not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return False


def _statistic(module: nn.Module, role: str) -> torch.Tensor:
    tensor = getattr(module, role)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def find_normalising_themselves(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Find the classes around layers whose forward normalises with their statistics itself, each with its first layer.

    Args:
        modules: all of the model, by path.
        layers: some of them.
    """
    found: dict[str, str] = {}
    for path in layers:
        around = (path[:end] for end, sign in enumerate(path) if sign == ".")
        for owner in ("", *around):
            kind = type(modules[owner])
            if owner == path or kind.__name__ in found or is_torchs(kind):
                continue
            names = find_names_read(kind)
            if not _NORMALISING.isdisjoint(names) and "running_mean" in names:
                found[kind.__name__] = path
    return found
