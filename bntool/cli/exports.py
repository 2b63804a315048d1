"""The program that ``fold --export`` writes beside the folded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from bntool.operations.exporting import Program


def check_export(
    checkpoint: Checkpoint, export: Path, output: Path | None, *, model: str | None, has_shape: bool, force: bool
) -> None:
    """Find out before any work whether the program can be written.

    Raises:
        MissingExtraError: it is to be ONNX, which torch writes with other packages.
        UsageError: the name ends otherwise, is that of the input or of the other output, or there is no model
            or no shape.
        UnwritableFileError: it exists and ``--force`` is not given, or its folder is missing.
    """
    suffix = export.suffix.lower()
    if suffix == ".onnx":
        raise MissingExtraError(
            "--export writes .pt2; for ONNX: pip install onnx onnxscript, then call torch.onnx.export on "
            "bntool.load_folded(model, OUT)",
            path=export,
        )
    if suffix != ".pt2":
        raise UsageError("--export writes a program of torch.export: name it FILE.pt2", path=export)
    if model is None:
        raise UsageError("--export needs the model that is to be exported: give --model", path=export)
    if not has_shape:
        raise UsageError("a program keeps the shape of its example: give --input-shape or --data", path=export)
    if output is not None and export.absolute() == output.absolute():
        raise UsageError("--export and -o name the same file", path=export)
    check_output_differs(checkpoint.file, export)
    OutputFiles(force=force).check(export)


def save_export(program: Program | None, export: Path | None, *, force: bool) -> None:
    """Write a program that was made and compared; nothing where there is none."""
    if program is None or export is None:
        return
    with OutputFiles(force=force) as files:
        files.open(export).write(program.data)
