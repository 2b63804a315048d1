"""The exit codes of the process, and which error has which."""

from __future__ import annotations

from enum import IntEnum

from bntool import errors


class ExitCode(IntEnum):
    """The exit codes of the process; docs/exit-codes.md says when each comes and what to do."""

    DONE = 0
    FINDINGS = 1
    USAGE = 2
    FILE = 3
    REFUSED = 4
    VERIFICATION = 5
    USER_CODE = 6
    INTERRUPTED = 130


# as --help says them
MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FINDINGS: "findings at or above --fail-on, or --expect not met",
    ExitCode.USAGE: "usage, or a package is missing",
    ExitCode.FILE: "file unreadable, unsafe or unwritable",
    ExitCode.REFUSED: "refused",
    ExitCode.VERIFICATION: "verification failed, nothing written",
    ExitCode.USER_CODE: "your model or data code raised",
    ExitCode.INTERRUPTED: "interrupted",
}

_CODES: tuple[tuple[type[errors.BntoolError], ExitCode], ...] = (
    (errors.UsageError, ExitCode.USAGE),
    (errors.FileError, ExitCode.FILE),
    (errors.RefusedError, ExitCode.REFUSED),
    (errors.VerificationError, ExitCode.VERIFICATION),
    (errors.UserCodeError, ExitCode.USER_CODE),
    (errors.InterruptedRunError, ExitCode.INTERRUPTED),
)


def exit_code_of(error: errors.BntoolError) -> ExitCode:
    """Return the documented exit code of an error."""
    return next(code for kind, code in _CODES if isinstance(error, kind))
