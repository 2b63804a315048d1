"""A file that holds the program itself: ``torch.export`` (.pt2) or TorchScript. Loading it runs what is in it."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.errors import RefusedError, UsageError
from bntool.models.source import ModelSource
from bntool.models.user_code import running_user_code

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".pt2", ".pt", ".pth", ".ts", ".jit", ".torchscript")


class ExportedSource(ModelSource):
    form = "a .pt2 or TorchScript file"

    def recognises(self, spec: str) -> bool:
        return spec.lower().endswith(_SUFFIXES)

    def check(self, spec: str) -> None:
        if not Path(spec).is_file():
            raise UsageError("there is no such file", path=spec)

    def load(self, spec: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
        import torch

        path = Path(spec)
        if arguments:
            raise UsageError("an exported program takes no --model-arg", path=path)
        with running_user_code(f"loading {path}"):
            if path.suffix.lower() == ".pt2":
                return torch.export.load(path).module()
            if not _is_torchscript(path):
                raise UsageError(
                    "this is not a TorchScript file; --model wants the code of the model, e.g. model.py:build",
                    path=path,
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is; the user's file is what it is
                model: torch.nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        return model


def check_has_layers(model: torch.nn.Module, spec: str) -> None:
    """Refuse a program that is compiled or flattened: its BatchNorm layers are no modules that could be watched.

    Raises:
        RefusedError: it is one.
    """
    import torch

    if is_exported(model) or isinstance(model, torch.jit.ScriptModule):
        kind = "a TorchScript" if isinstance(model, torch.jit.ScriptModule) else "an exported"
        raise RefusedError(
            f"{spec} is {kind} program, whose layers cannot be watched; give the code of the model, e.g. model.py:build"
        )


def is_exported(model: torch.nn.Module) -> bool:
    """Whether a module is a program of ``torch.export``, which has one mode."""
    import torch

    return isinstance(model, torch.fx.GraphModule) and not _can_change_mode(model)


def _can_change_mode(model: torch.nn.Module) -> bool:
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(model.training)
    except NotImplementedError:
        return False
    finally:
        for module, training in before:
            module.training = training
    return True


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
