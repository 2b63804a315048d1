"""Descriptions that stand beside a file of weights and say how it is run: Caffe's ``.prototxt``, Keras's
configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.files import SourceFile, place_beside
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.checkpoints.saving import write_checkpoint
from bntool.errors import BntoolError, RefusedError, UsageError

# a file that says of which layers a model is made, as the text that it becomes for an edited checkpoint
ModelDescription: TypeAlias = Callable[[Checkpoint], str]


def describe_model(
    checkpoint: Checkpoint, *, prototxt: Path | None, keras_config: Path | None, output: Path | None, force: bool
) -> tuple[Checkpoint, ModelDescription | None]:
    """Return a checkpoint with what its description says of the layers; without a description it stays as it is.

    Args:
        prototxt: the net of a Caffe model; None where none is given.
        keras_config: the configuration of a Keras model, or a whole model of the same layers; None for that of a model
            of keras.applications, where the weights are recognised as such a model's.
        output: the file of weights to write, beside which a changed description will stand; None in a dry run.
        force: replace a description that stands there.

    Raises:
        UsageError: a description is given for another format, or describes another model.
        RefusedError: something is to be written and the net that runs it is not given.
        UnwritableFileError: the new description cannot be written.
    """
    if prototxt is not None and not checkpoint.format.needs_prototxt:
        raise UsageError("--prototxt goes with a .caffemodel", path=checkpoint.path)
    if keras_config is not None and not checkpoint.format.takes_keras_config:
        raise UsageError("--keras-config goes with an .h5 file of Keras weights", path=checkpoint.path)
    given = prototxt if prototxt is not None else keras_config
    if given is None and checkpoint.format.takes_keras_config:
        return _recognise(checkpoint, output=output, force=force)
    if given is None:
        if checkpoint.format.needs_prototxt and output is not None:
            raise RefusedError(
                "a .caffemodel is run by a .prototxt, whose wiring and eps win: give it with --prototxt NET",
                path=checkpoint.path,
            )
        return checkpoint, None
    with SourceFile(given) as file:
        describe = _deploy if prototxt is not None else _configure
        try:
            described, description = describe(checkpoint, file)
        except BntoolError as error:
            raise error.about(given) from error.__cause__
        if output is not None:
            place = place_beside(output, ending=described.format.described_by)
            check_output_differs(file, place)
            OutputFiles(force=force).check(place)
    return described, description


def _deploy(checkpoint: Checkpoint, file: SourceFile) -> tuple[Checkpoint, ModelDescription]:
    from bntool.checkpoints.caffe.deployment import deploy, edit_prototxt
    from bntool.checkpoints.caffe.prototxt import read_prototxt

    net = read_prototxt(file)
    return deploy(checkpoint, net), partial(edit_prototxt, prototxt=net)


def _configure(checkpoint: Checkpoint, file: SourceFile) -> tuple[Checkpoint, ModelDescription]:
    from bntool.checkpoints.keras.configuration import configure, edit_configuration, read_configuration

    return configure(checkpoint, read_configuration(file)), edit_configuration


def _recognise(
    checkpoint: Checkpoint, *, output: Path | None, force: bool
) -> tuple[Checkpoint, ModelDescription | None]:
    """Return weights alone of a model of keras.applications as its configuration runs them; all others as they are."""
    from bntool.checkpoints.keras.configuration import configure_recognised, edit_configuration

    recognised = configure_recognised(checkpoint, writes=output is not None)
    if recognised is None:
        return checkpoint, None
    if output is not None:
        OutputFiles(force=force).check(place_beside(output, ending=recognised.format.described_by))
    return recognised, edit_configuration


def write_description(
    checkpoint: Checkpoint, description: ModelDescription | None, output: Path, files: OutputFiles
) -> None:
    """Write the description of the written model, where one was given, in the transaction of the model."""
    if description is not None:
        place = place_beside(output, ending=checkpoint.format.described_by)
        files.open(place).write(description(checkpoint).encode("utf-8"))


def save_with_description(
    checkpoint: Checkpoint, output: Path, description: ModelDescription | None, *, force: bool
) -> None:
    """Write an edited checkpoint, and the description of its model if one was given: both appear, or neither."""
    with OutputFiles(force=force, mode=checkpoint.file.mode) as files:
        write_checkpoint(checkpoint, output, files)
        write_description(checkpoint, description, output, files)
