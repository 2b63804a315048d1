"""``--model``: a spec becomes a live module. This, and ``bntool.data``, are what runs the user's code."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bntool.errors import UsageError
from bntool.models.exported import ExportedSource
from bntool.models.factory import FactorySource
from bntool.models.mmdet_models import MmdetSource
from bntool.models.source import ModelSource
from bntool.models.timm_models import TimmSource
from bntool.models.torchvision_models import TorchvisionSource

if TYPE_CHECKING:
    import torch

# tried in this order: those with a prefix of their own first
MODEL_SOURCES: tuple[ModelSource, ...] = (
    TorchvisionSource(),
    TimmSource(),
    MmdetSource(),
    FactorySource(),
    ExportedSource(),
)


def load_model(spec: str, *, arguments: Mapping[str, str]) -> torch.nn.Module:
    """Build the model that a spec names, with whatever weights its code gives it.

    Args:
        spec: ``file.py:factory``, ``package.module:factory``, ``torchvision:NAME``, ``timm:NAME``,
            ``mmdet:config.py``, or a .pt2 or TorchScript file.
        arguments: keyword arguments of the factory as text; each is read as a Python literal where it is one, else
            taken as a string.

    Raises:
        UsageError: the spec cannot be understood, or names something that does not exist.
        MissingExtraError: a package that it needs is not installed.
        UserCodeError: the user's code raised.
    """
    source = check_model(spec)
    return source.load(spec, {name: parse_value(text) for name, text in arguments.items()})


def check_model(spec: str) -> ModelSource:
    """Find out what kind of spec it is and whether what it needs is there, without importing torch.

    Raises:
        UsageError: the spec cannot be understood, or a file is missing.
        MissingExtraError: a package is missing.
    """
    for source in MODEL_SOURCES:
        if source.recognises(spec):
            source.check(spec)
            return source
    forms = "; ".join(source.form for source in MODEL_SOURCES)
    raise UsageError(f"--model {spec!r} cannot be understood; it can be: {forms}{_hint(spec)}")


def _hint(spec: str) -> str:
    return f". Which function of it builds the model? Write {spec}:NAME" if spec.endswith(".py") else ""


def parse_value(text: str) -> Any:
    """Parse ``0.5``, ``True``, ``[1, 2]``: the Python literal that the text is, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
