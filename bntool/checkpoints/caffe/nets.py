"""The ``.prototxt`` beside a ``.caffemodel``: reading it, and writing the one of the folded or frozen net."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.caffe.prototxt import Prototxt, place_beside, read_prototxt
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.checkpoints.saving import write_checkpoint
from bntool.errors import RefusedError, UsageError


def deploy_net(
    checkpoint: Checkpoint, prototxt: Path | None, output: Path | None, *, force: bool
) -> tuple[Checkpoint, Prototxt | None]:
    """A Caffe model as its ``.prototxt`` runs it; any other checkpoint as it is.

    Args:
        output: the ``.caffemodel`` to write; None in a dry run.

    Raises:
        UsageError: a ``.prototxt`` is given for another format.
        RefusedError: something is to be written and it is not given.
        UnwritableFileError: the new one cannot be written.
    """
    if not checkpoint.format.needs_prototxt:
        if prototxt is not None:
            raise UsageError("--prototxt goes with a .caffemodel", path=checkpoint.path)
        return checkpoint, None
    if prototxt is None:
        if output is not None:
            raise RefusedError(
                "a .caffemodel is run by a .prototxt, whose wiring and eps win: give it with --prototxt NET",
                path=checkpoint.path,
            )
        return checkpoint, None
    from bntool.checkpoints.caffe.deployment import deploy

    with SourceFile(prototxt) as file:
        if output is not None:
            check_output_differs(file, place_beside(output))
            OutputFiles(force=force).check(place_beside(output))
        net = read_prototxt(file)
    return deploy(checkpoint, net), net


def write_net(checkpoint: Checkpoint, net: Prototxt | None, output: Path, files: OutputFiles) -> None:
    """Write the ``.prototxt`` that runs the written model, where one was given, in the transaction of the model."""
    if net is None:
        return
    from bntool.checkpoints.caffe.deployment import edit_prototxt

    files.open(place_beside(output)).write(edit_prototxt(checkpoint, net).encode("utf-8"))


def save_with_net(checkpoint: Checkpoint, output: Path, net: Prototxt | None, *, force: bool) -> None:
    """Write an edited checkpoint, and the ``.prototxt`` that runs it where one was given: both appear, or neither."""
    with OutputFiles(force=force, mode=checkpoint.file.mode) as files:
        write_checkpoint(checkpoint, output, files)
        write_net(checkpoint, net, output, files)
