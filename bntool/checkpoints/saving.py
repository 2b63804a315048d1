"""Writing checkpoints: what was written is read back and held against what it should be before it appears."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, read_bytes
from bntool.errors import BntoolError, LossWarning, RefusedError, UsageError, VerificationError
from bntool.plan import ChangePadding

_ENDINGS_OF_TORCH = (".pt", ".pth", ".ckpt")


def find_misnamed(written: str, output: Path) -> str | None:
    """Return the format that the name of an output says, ``safetensors`` or ``torch``, if what is written is another
    one.

    Those who open a file by its name take a wrong reader then: safetensors cannot read what torch.save wrote.

    Args:
        written: the name of its format.
    """
    if written != "safetensors" and output.suffix == ".safetensors":
        return "safetensors"
    return "torch" if written == "safetensors" and output.suffix in _ENDINGS_OF_TORCH else None


def check_output(checkpoint: Checkpoint, output: Path | None, *, force: bool, keeps_format: bool = True) -> None:
    """Find out before any work whether the output can be written.

    Args:
        output: None for none.
        force: replace a file that exists.
        keeps_format: what is written has the format of the checkpoint; its name must not say another, unless the
            checkpoint's own ends so.

    Raises:
        UsageError: the output is the input, or has the name of another format than its own.
        UnwritableFileError: it exists and ``force`` is not given, or its folder is missing.
    """
    if output is not None:
        check_output_differs(checkpoint.file, output)
        OutputFiles(force=force).check(output)
        named = find_misnamed(checkpoint.format.name, output) if keeps_format else None
        if named is not None and not str(checkpoint.path).endswith(output.suffix):
            raise UsageError(
                f"its name says {named}, but it would be {checkpoint.format.title} as {checkpoint.path} is: give it "
                f"another ending, and bntool convert --to {named} what was written",
                path=output,
            )


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a checkpoint with its edits; the file appears whole or not at all.

    What was written is opened again and held against the checkpoint before it takes its place. What no file should
    hold is left out, with a :class:`~bntool.errors.LossWarning`: bytes of a .safetensors file that belong to no tensor.

    Args:
        checkpoint: the source with its edits.
        path: the new file; never the source itself.
        force: replace a file that exists.

    Raises:
        UsageError: ``path`` is the source.
        UnwritableFileError: it exists and ``force`` is not given, or the system refuses.
        RefusedError: the format cannot hold an edit.
        CorruptFileError: the source turned out to be damaged on the way.
        VerificationError: the written file does not hold what it should.
    """
    with OutputFiles(force=force, mode=checkpoint.file.mode) as output:
        write_checkpoint(checkpoint, Path(path), output)


def write_checkpoint(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write a checkpoint as one of the files of a transaction, so that it appears with the others; see
    :func:`save_checkpoint`.
    """
    check_output_differs(checkpoint.file, path)
    output.check(path)
    if any(isinstance(edit.step, ChangePadding) for edit in checkpoint.edits):
        what = (
            "its convolutions pad with other values than zeros, which no checkpoint can say: export the model instead"
        )
        raise RefusedError(what, path=path)
    try:
        write_checked(checkpoint, path, output)
    except BntoolError as error:
        raise error.about(checkpoint.path) from error.__cause__
    except OverflowError as error:
        raise RefusedError(f"a new element is too large for its tensor: {error}", path=checkpoint.path) from error
    for loss in checkpoint.format.describe_losses(checkpoint):
        warnings.warn(f"{checkpoint.path} holds {loss}; {path} is written without", LossWarning, stacklevel=3)


def write_checked(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write a file of a transaction and hold it against what it should be."""
    checkpoint.format.write(checkpoint, path, output)
    output.flush()
    if checkpoint.format.single_file:
        with checkpoint.format.read(SourceFile(output.temporary(path), is_own=True)) as written:
            _compare(checkpoint, written, path)
        checkpoint.format.judge(output.temporary(path))
    checkpoint.format.check_unchanged(checkpoint)


def _known(versions: Mapping[str, int | None] | None) -> dict[str, int | None]:
    """Return versions of modules; the root may have an entry for a record alone."""
    return {path: version for path, version in (versions or {}).items() if path or version is not None}


def _find_shared(state_dicts: Iterable[StateDict], kept: Iterable[tuple[str, str]]) -> set[frozenset[tuple[str, str]]]:
    """Return groups of tensors that share a storage, leaving out those that were to change."""
    wanted = frozenset(kept)
    users: dict[str, set[tuple[str, str]]] = {}
    for state_dict in state_dicts:
        for name, tensor in state_dict.tensors.items():
            place = (state_dict.key, name)
            if place in wanted and isinstance(tensor, StoredTensor) and tensor.storage is not None and tensor.numel:
                users.setdefault(tensor.storage.key, set()).add(place)
    return {frozenset(group) for group in users.values() if len(group) > 1}


def _compare(wanted: Checkpoint, written: Checkpoint, path: Path) -> None:
    left = [state_dict for state_dict in wanted.state_dicts if state_dict.tensors]
    present = [state_dict for state_dict in written.state_dicts if state_dict.tensors]
    if [s.key for s in left] != [s.key for s in present]:
        raise VerificationError("the written file holds other state dicts than it should", path=path)
    for expected, found in zip(left, present, strict=True):
        _compare_state_dict(expected, found, path, keeps_order=wanted.format.keeps_order)
    kept = {(s.key, name) for s in left for name, tensor in s.tensors.items() if isinstance(tensor, StoredTensor)}
    # in a state dict a shared storage ties parameters; in a graph a constant may be copied for a node of its own
    if wanted.format.is_pytorch and _find_shared(left, kept) != _find_shared(present, kept):
        raise VerificationError("tensors of the written file share memory otherwise than they should", path=path)
    if dict(wanted.records) != dict(written.records):
        raise VerificationError("the written file does not hold the record that it should", path=path)


def _compare_state_dict(expected: StateDict, found: StateDict, path: Path, *, keeps_order: bool) -> None:
    ordered = list if keeps_order else sorted
    if ordered(expected.tensors) != ordered(found.tensors):
        raise VerificationError("the written file holds other keys than it should", path=path)
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (other.dtype, tuple(other.shape)):
            raise VerificationError("dtype or shape of a written tensor differ", path=path, tensor=name)
        if isinstance(tensor, LiteralTensor) and read_bytes(other) != tensor.data:
            raise VerificationError("a written tensor holds other elements than it should", path=path, tensor=name)
        if isinstance(tensor, StoredTensor) and tensor.is_parameter != getattr(other, "is_parameter", False):
            raise VerificationError("a parameter was written as a plain tensor", path=path, tensor=name)
    if _known(expected.versions) != _known(found.versions):
        raise VerificationError("the written file holds other versions of modules than it should", path=path)
