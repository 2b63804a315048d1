"""``mmdet:config.py``: the model that a config of MMDetection describes, without its pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.errors import MissingExtraError, UsageError
from bntool.models.source import ModelSource, check_package
from bntool.models.user_code import running_user_code

if TYPE_CHECKING:
    import torch

_PREFIX = "mmdet:"


class MmdetSource(ModelSource):
    form = "mmdet:CONFIG.py"

    def recognises(self, spec: str) -> bool:
        return spec.startswith(_PREFIX)

    def check(self, spec: str) -> None:
        path = Path(spec.removeprefix(_PREFIX))
        if not path.is_file():
            raise UsageError("there is no such config", path=path)
        check_package(spec, "mmdet", install="mmdet mmengine mmcv-lite")

    def load(self, spec: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
        """See :class:`ModelSource`; ``arguments`` override the config by dotted keys, as ``--cfg-options`` does."""
        path = Path(spec.removeprefix(_PREFIX))
        try:
            from mmdet.registry import MODELS
            from mmdet.utils import register_all_modules
            from mmengine.config import Config
        except ImportError as error:
            raise MissingExtraError(f"{spec} needs mmdet: pip install mmdet mmengine mmcv-lite ({error})") from error
        with running_user_code(spec):
            register_all_modules(init_default_scope=True)
            config = Config.fromfile(str(path))
            config.merge_from_dict(dict(arguments))
            model: torch.nn.Module = MODELS.build(config.model)
        return model
