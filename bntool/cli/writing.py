"""What the commands that write a file have in common."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint, check_changeable
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import RefusedError, UsageError
from bntool.plan import Plan, SkipReason
from bntool.reports.text import plural


def check_output(checkpoint: Checkpoint, output: Path | None, *, dry_run: bool, force: bool) -> None:
    """Find out before any work whether the checkpoint can be changed and written there.

    Raises:
        RefusedError: its format is only read.
        UsageError: neither an output nor ``--dry-run``, or the output is the input.
        UnwritableFileError: it exists and ``--force`` is not given, or its folder is missing.
    """
    check_changeable(checkpoint)
    check_place(checkpoint, output, dry_run=dry_run, force=force)


def check_place(checkpoint: Checkpoint, output: Path | None, *, dry_run: bool, force: bool) -> None:
    """Find out before any work whether a file can be written there.

    Raises:
        UsageError, UnwritableFileError: as :func:`check_output`.
    """
    if dry_run:
        return
    if output is None:
        raise UsageError("name the file to write with -o OUT, or use --dry-run to write nothing")
    check_output_differs(checkpoint.file, output)
    OutputFiles(force=force).check(output)


def check_plan(plan: Plan, checkpoint: Path, *, strict: bool) -> None:
    """Hold a plan against ``--strict`` and against emptiness.

    Raises:
        RefusedError: nothing can be done safely; or, under ``strict``, a layer was skipped or something assumed.
    """
    if not plan.steps:
        reasons = sorted({skip.reason.value for skip in plan.skips if skip.reason is not SkipReason.NOT_SELECTED})
        why = (
            f" ({', '.join(reasons)})"
            if reasons
            else ": the state dict has no BatchNorm layer, or --layers matches none"
        )
        raise RefusedError(f"nothing could be done safely{why}; nothing was written", path=checkpoint)
    skips = [skip for skip in plan.skips if skip.reason is not SkipReason.NOT_SELECTED]  # that was asked for
    if strict and skips:
        first = skips[0]
        raise RefusedError(
            f"--strict: {plural(len(skips), 'layer')} would be skipped, "
            f"the first is {first.layer} ({first.reason.value})",
            path=checkpoint,
        )
    if strict and plan.assumptions:
        raise RefusedError(f"--strict: this would be assumed: {plan.assumptions[0]}", path=checkpoint)


def save(checkpoint: Checkpoint, output: Path | None, *, force: bool) -> None:
    """Write the edited checkpoint; the output was checked by :func:`check_output`."""
    assert output is not None
    save_checkpoint(checkpoint, output, force=force)
