"""A folded model as a program that runs without its code, held against the original in the runtime that will run it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from bntool.errors import UserCodeError
from bntool.folding.onnx_export import convert_to_onnx, open_in_onnxruntime, silence
from bntool.folding.options import ProgramKind
from bntool.modules.calling import call, tensors_in
from bntool.modules.copying import copy_model
from bntool.verification.outputs import find_outputs, run_model, verify_program


@dataclass(frozen=True)
class Program:
    """A model as a program.

    Attributes:
        kind: what it is written as.
        data: the bytes of the file.
        runtime: name and version of what ran it for the comparison.
        any_batch: it was seen to take batches of one and of one more than the example.
        shapes: of the example inputs.
        error: largest difference of its outputs to the original's, relative to the largest output, in the stored dtype.
        inputs: how many inputs were compared.
    """

    kind: ProgramKind
    data: bytes
    runtime: str
    any_batch: bool
    shapes: tuple[tuple[int, ...], ...]
    error: float
    inputs: int


Run = Callable[[Any], list[torch.Tensor]]


def export_program(
    model: nn.Module,
    folded: nn.Module,
    inputs: Sequence[Any],
    *,
    tolerance: float,
    kind: ProgramKind = ProgramKind.PT2,
) -> Program:
    """Export a folded model, read the program back, and hold its outputs against those of the original.

    Args:
        model: the original; given back as it was.
        folded: what is exported; given back as it was.
        inputs: each a tensor, a tuple of positional or a dict of keyword arguments; the first is what is traced.
        tolerance: largest error of an output, relative to its largest magnitude.
        kind: what it is written as; ONNX needs the packages of :func:`~bntool.folding.outputs.check_packages`.

    Raises:
        UserCodeError: torch cannot export the model.
        VerificationError: the outputs differ, or the program does not run.
    """
    exported = _export(folded, inputs[0])
    data = convert_to_onnx(exported) if kind is ProgramKind.ONNX else _save(exported)
    shapes = _shapes(inputs[0])
    compared = [item for item in inputs if _shapes(item) == shapes]
    others = [tree_map(_first, inputs[0]), tree_map(_one_more, inputs[0])]
    with open_in_onnxruntime(data) if kind is ProgramKind.ONNX else _open_in_torch(data) as (run, runtime):
        any_batch = all(_runs(run, item) and _runs(partial(run_model, model), item) for item in others)
        if any_batch:
            compared += others
        error = verify_program(model, run, compared, tolerance=tolerance)
    return Program(kind, data, runtime, any_batch, shapes, error, len(compared))


def _save(program: torch.export.ExportedProgram) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about itself
        torch.export.save(program, stream)
    return stream.getvalue()


@contextlib.contextmanager
def _open_in_torch(data: bytes) -> Iterator[tuple[Run, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.export.load(io.BytesIO(data)).module()

    def run(inputs: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(find_outputs(call(loaded, inputs)))

    yield run, f"torch {torch.__version__}"


def _runs(run: Callable[[Any], Any], inputs: Any) -> bool:
    try:
        run(inputs)
    except Exception:  # noqa: BLE001 its guards hold the shapes, each runtime in its own way
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
        model = copy_model(model).eval()
        with silence(), torch.no_grad():
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
