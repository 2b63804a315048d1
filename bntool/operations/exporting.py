"""A folded model as a program that runs without its code, held against the original."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from bntool.errors import UserCodeError
from bntool.graphs.calling import call
from bntool.graphs.tracked import tensors_in
from bntool.operations.verification import verify_program


@dataclass(frozen=True)
class Program:
    """A program of ``torch.export``.

    Attributes:
        data: the bytes of a .pt2 file.
        any_batch: it was seen to take batches of one and of one more than the example.
        shapes: of the example inputs.
        error: largest difference of its outputs to the original's, relative to the largest output, in the stored dtype.
        inputs: how many inputs were compared.
    """

    data: bytes
    any_batch: bool
    shapes: tuple[tuple[int, ...], ...]
    error: float
    inputs: int


def export_program(model: nn.Module, folded: nn.Module, inputs: Sequence[Any], *, tolerance: float) -> Program:
    """Export a folded model, read the program back, and hold its outputs against those of the original.

    Args:
        model: the original; given back as it was.
        folded: what is exported; given back as it was.
        inputs: each a tensor, a tuple of positional or a dict of keyword arguments; the first is what is traced.
        tolerance: largest error of an output, relative to its largest magnitude.

    Raises:
        UserCodeError: torch.export cannot export the model.
        VerificationError: the outputs differ.
    """
    program = _export(folded, inputs[0])
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about itself
        torch.export.save(program, stream)
        data = stream.getvalue()
        loaded = torch.export.load(io.BytesIO(data)).module()
    shapes = _shapes(inputs[0])
    compared = [item for item in inputs if _shapes(item) == shapes]
    others = [tree_map(_first, inputs[0]), tree_map(_one_more, inputs[0])]
    any_batch = all(_runs(loaded, item) for item in others)
    if any_batch:
        compared += others
    error = verify_program(model, loaded, compared, tolerance=tolerance)
    return Program(data, any_batch, shapes, error, len(compared))


def _runs(program: nn.Module, inputs: Any) -> bool:
    try:
        with torch.no_grad():
            call(program, inputs)
    except UserCodeError:  # its guards hold the shapes
        return False
    return True


def _first(value: Any) -> Any:
    return value[:1] if _has_batch(value) else value


def _one_more(value: Any) -> Any:
    return torch.cat([value, value[:1]]) if _has_batch(value) else value


def _has_batch(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _shapes(inputs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_in(inputs))


def _export(model: nn.Module, inputs: Any) -> torch.export.ExportedProgram:
    positional = () if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    try:
        model = copy.deepcopy(model).eval()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:  # leave the size of the batch open
                axes = tree_map(_open_batch, keywords or positional)
                return torch.export.export(model, positional, keywords, dynamic_shapes=axes, strict=False)
            except Exception:  # noqa: BLE001 its shapes are fixed; whatever else is wrong shows again
                return torch.export.export(model, positional, keywords, strict=False)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UserCodeError(f"torch.export cannot export the folded model; leave out --export ({text})") from error


def _open_batch(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if _has_batch(value) else None
