"""``torchvision:NAME``: an architecture of torchvision, without its pretrained weights."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bntool.errors import MissingExtraError, UsageError
from bntool.models.source import ModelSource, check_package
from bntool.models.user_code import running_user_code

if TYPE_CHECKING:
    import torch

_PREFIX = "torchvision:"
_SLOW_INITIALISATION = ("inception_v3", "googlenet")  # they warn unless told whether to initialise


class TorchvisionSource(ModelSource):
    form = "torchvision:NAME"

    def recognises(self, spec: str) -> bool:
        return spec.startswith(_PREFIX)

    def check(self, spec: str) -> None:
        check_package(spec, "torchvision", install="torchvision")

    def load(self, spec: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
        try:
            from torchvision import models
        except ImportError as error:
            raise MissingExtraError(f"{spec} needs torchvision: pip install torchvision ({error})") from error
        except RuntimeError as error:
            raise MissingExtraError(
                f"torchvision is installed but cannot be imported; most often torchvision is built for another torch "
                f"than the installed one: install both again from the same index ({error})"
            ) from error
        name = spec.removeprefix(_PREFIX)
        try:
            builder = models.get_model_builder(name)
        except ValueError as error:
            close = difflib.get_close_matches(name, models.list_models(), n=3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise UsageError(f"torchvision has no model {name!r}{hint}") from error
        given: dict[str, Any] = {"weights": None}
        if "weights_backbone" in inspect.signature(builder).parameters:
            given["weights_backbone"] = None  # nothing is downloaded
        if name in _SLOW_INITIALISATION:
            given["init_weights"] = False
        with running_user_code(spec):
            model: torch.nn.Module = builder(**{**given, **arguments})
        return model
