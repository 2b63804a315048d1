"""The exit codes of the process, and which error has which."""

from __future__ import annotations

from enum import IntEnum

from bntool import errors


class ExitCode(IntEnum):
    """The exit codes of the process; documented in docs/cli.md."""

    DONE = 0
    FINDINGS = 1
    USAGE = 2
    FILE = 3
    REFUSED = 4
    VERIFICATION = 5
    USER_CODE = 6
    INTERRUPTED = 130


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
