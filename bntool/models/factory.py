"""``file.py:factory`` and ``package.module:factory``: a callable that returns a module, or a module itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.errors import UsageError
from bntool.models.source import ModelSource
from bntool.models.user_code import call_factory, import_object, is_factory_spec

if TYPE_CHECKING:
    import torch


class FactorySource(ModelSource):
    form = "FILE.py:factory or package.module:factory"

    def recognises(self, spec: str) -> bool:
        return is_factory_spec(spec)

    def check(self, spec: str) -> None:
        module = spec.rpartition(":")[0]
        if module.endswith(".py") and not Path(module).is_file():
            raise UsageError("there is no such file", path=module)

    def load(self, spec: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
        import torch

        found = import_object(spec)
        if isinstance(found, torch.nn.Module):
            if arguments:
                raise UsageError(f"{spec} is a module already and takes no --model-arg")
            return found
        if not callable(found):
            raise UsageError(f"{spec} is neither a module nor callable but of type {type(found).__name__}")
        model = call_factory(found, arguments, what=spec)
        if not isinstance(model, torch.nn.Module):
            raise UsageError(f"{spec} returned {type(model).__name__}; a torch.nn.Module is needed")
        return model
