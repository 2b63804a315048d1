"""An exported program as an ONNX file, and what ONNX Runtime makes of it."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bntool.errors import RefusedError, UserCodeError, VerificationError
from bntool.folding.onnxruntime_process import OnnxRuntime, RuntimeFailure
from bntool.modules.calling import tensors_in


def convert_to_onnx(program: torch.export.ExportedProgram) -> bytes:
    """Convert a program to the bytes of an ONNX file that computes the same; torch.onnx optimises it on the way.

    Raises:
        UserCodeError: torch.onnx knows no ONNX operator for something in it.
        RefusedError: it is larger than the 2 GB that one ONNX file can hold.
    """
    try:
        with silence():
            converted = torch.onnx.export(program, dynamo=True, verbose=False)
        assert converted is not None
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UserCodeError(f"torch.onnx cannot export the folded model; leave out --export ({text})") from error
    try:
        data: bytes = converted.model_proto.SerializeToString()
    except Exception as error:  # of protobuf, whose class depends on its implementation
        raise RefusedError("one ONNX file holds at most 2 GB, this model is larger: export a .pt2") from error
    return data


@contextlib.contextmanager
def open_in_onnxruntime(data: bytes) -> Iterator[tuple[Callable[[Any], list[torch.Tensor]], str]]:
    """Yield a function that runs an ONNX file on the CPU, and the name and version of the runtime.

    Raises:
        VerificationError: ONNX Runtime cannot run the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.onnx"
        place.write_bytes(data)
        try:
            opened = OnnxRuntime(place, optimised=True)
        except RuntimeFailure as failure:
            raise VerificationError(f"ONNX Runtime cannot run the program; nothing was written ({failure})") from None
        with opened:
            names = [formal.name for formal in opened.inputs]

            def run(inputs: Any) -> list[torch.Tensor]:
                given = {name: tensor.detach().cpu().numpy() for name, tensor in _name_inputs(names, inputs)}
                answers = [torch.from_numpy(array) for array in opened.run(given) if array is not None]
                return [tensor for tensor in answers if tensor.is_floating_point()]

            yield run, f"onnxruntime {opened.version}"


def _name_inputs(names: list[str], inputs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(inputs, Mapping) and all(name in inputs for name in names):
        return ((name, inputs[name]) for name in names)
    return zip(names, tensors_in(inputs), strict=True)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep back what torch.export and torch.onnx say about themselves, and about packages that are not needed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
