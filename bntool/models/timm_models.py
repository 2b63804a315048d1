"""``timm:NAME``: an architecture of timm, without its pretrained weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bntool.errors import MissingExtraError, UsageError
from bntool.models.source import ModelSource, check_package
from bntool.models.user_code import running_user_code

if TYPE_CHECKING:
    import torch

_PREFIX = "timm:"


class TimmSource(ModelSource):
    form = "timm:NAME"

    def recognises(self, spec: str) -> bool:
        return spec.startswith(_PREFIX)

    def check(self, spec: str) -> None:
        check_package(spec, "timm", install="timm")

    def load(self, spec: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
        try:
            import timm
        except ImportError as error:
            raise MissingExtraError(f"{spec} needs timm: pip install timm ({error})") from error
        except RuntimeError as error:
            raise MissingExtraError(
                f"timm is installed but cannot be imported; most often torchvision is built for another torch "
                f"than the installed one: install both again from the same index ({error})"
            ) from error
        name = spec.removeprefix(_PREFIX)
        if not timm.is_model(name.partition(".")[0]):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise UsageError(f"timm has no model {name!r}{hint}")
        with running_user_code(spec):
            model: torch.nn.Module = timm.create_model(name, **{"pretrained": False, **arguments})
        return model
