"""The ONNX format, with its tensors in the file or beside it."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint, Format
from bntool.checkpoints.files import SourceFile


class Onnx(Format):
    """See the module."""

    name = "onnx"
    title = "ONNX"
    writer = "onnx.writing:write_model"
    is_pytorch = False

    def recognises(self, path: Path, head: bytes) -> bool:
        # ModelProto.ir_version, then one of its other fields
        return path.suffix == ".onnx" or (
            head[:1] == b"\x08" and head[2:3] in b"\x12\x1a\x22\x28\x32\x3a\x42" and len(head) > 2
        )

    def read(self, file: SourceFile) -> Checkpoint:
        from bntool.checkpoints.onnx.model import read_model  # a start-up without ONNX files needs none of it
        from bntool.checkpoints.onnx.tensors import ExternalData

        return read_model(file, external=ExternalData(file))


class OnnxWithExternalData(Onnx):
    """A model with its large tensors in files beside it."""

    single_file = False
