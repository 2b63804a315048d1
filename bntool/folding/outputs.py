"""Writing the outputs of a fold: the checkpoint, what belongs beside it and the exported program, all or none of
them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from bntool.checkpoints.checkpoint import Checkpoint, Loader
from bntool.checkpoints.descriptions import ModelDescription, write_description
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.checkpoints.saving import write_checkpoint
from bntool.checkpoints.tensors import find_coarsest_spacing
from bntool.errors import MissingExtraError, UsageError
from bntool.folding.options import ProgramKind

if TYPE_CHECKING:
    from bntool.folding.state_dict import CheckpointFold

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # that write and run an ONNX file


def check_export(checkpoint: Checkpoint, export: Path, *, has_model: bool, has_shape: bool, force: bool) -> ProgramKind:
    """Find out before any work whether the program can be written, and as what.

    Raises:
        MissingExtraError: a package that writes or runs it is missing.
        UsageError: the name ends otherwise, is that of the input, or there is no model or no shape.
        UnwritableFileError: it exists and ``force`` is not given, or its folder is missing.
    """
    kinds = {kind.value: kind for kind in ProgramKind}
    kind = kinds.get(export.suffix.lower())
    if kind is None:
        raise UsageError("--export writes a program: name it FILE.pt2 or FILE.onnx", path=export)
    if not has_model:
        raise UsageError("--export needs the model that is to be exported: give --model", path=export)
    if not has_shape:
        raise UsageError("a program keeps the shape of its example: give --input-shape or --data", path=export)
    check_output_differs(checkpoint.file, export)
    OutputFiles(force=force).check(export)
    if kind is ProgramKind.ONNX:
        check_packages()
    return kind


def check_packages() -> None:
    """Find out before any work whether ONNX can be written and run.

    Raises:
        MissingExtraError: a package is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"an ONNX file needs {', '.join(missing)}: pip install 'bntool[onnx]'")


def save_fold(
    fold: CheckpointFold,
    output: Path | None,
    *,
    description: ModelDescription | None,
    export: Path | None,
    tolerance: float,
    force: bool,
) -> CheckpointFold:
    """Write all files of a fold in one transaction: either all appear, or none.

    Args:
        fold: made and proven.
        output: the checkpoint; None for none.
        description: what the input is run by, where that was given beside it.
        export: the program; None for none.
        tolerance: of outputs, where the format has a runtime that runs both files.
        force: replace what exists.

    Returns:
        The fold, with what was written and what that runtime said.

    Raises:
        VerificationError: the runtime disagrees.
    """
    if fold.checkpoint is None or (output is None and export is None):
        return fold
    with OutputFiles(force=force, mode=fold.checkpoint.file.mode) as files:
        if output is not None:
            write_checkpoint(fold.checkpoint, output, files)
            write_description(fold.checkpoint, description, output, files)
            fold = _run(fold, output, files, tolerance=tolerance)
            fold = dataclasses.replace(fold, output=str(output))
        if export is not None and fold.program is not None:
            files.open(export).write(fold.program.data)
            fold = dataclasses.replace(fold, export=str(export))
    return fold


def _run(fold: CheckpointFold, output: Path, files: OutputFiles, *, tolerance: float) -> CheckpointFold:
    """Run a file that holds its graph beside its original, before it appears; other formats have no runtime."""
    checkpoint = fold.checkpoint
    assert checkpoint is not None
    if checkpoint.format.loader is not Loader.ONNX_RUNTIME:
        return fold
    from bntool.folding.runtime_agreement import compare_in_onnxruntime

    spacing = find_coarsest_spacing(tensor for some in checkpoint.state_dicts for tensor in some.tensors.values())
    assert isinstance(checkpoint.path, Path)
    with files.preview(output) as preview:
        agreement = compare_in_onnxruntime(checkpoint.path, preview, tolerance=tolerance, unit=spacing)
    return dataclasses.replace(fold, runtime=agreement)
