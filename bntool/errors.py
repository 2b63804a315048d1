"""Every exception that a caller of bntool may catch.

The message is one sentence about the problem and what to do; the facts (which file, which tensor, which value)
are attributes. ``cli/main.py`` is the one place that turns them into a line of text and an exit code.
"""

from __future__ import annotations

from typing import ClassVar


class BntoolError(Exception):
    """Base class of all errors that bntool raises on purpose.

    Args:
        message: one sentence: what is wrong and what to do about it.
        path: the file that it is about.
        tensor: the key of the tensor (or the name of the layer) that it is about.
        value: the offending value.
        remedy: what to do about it, where the message leaves that out; None for what helps with most of its kind.
    """

    code: ClassVar[str] = "error"
    usual_remedy: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        tensor: str | None = None,
        value: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = self.usual_remedy if remedy is None else remedy
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.value = value

    def __str__(self) -> str:
        facts = [fact for fact in (self.path, self.tensor) if fact]
        return ": ".join([*facts, self.sentence])

    @property
    def sentence(self) -> str:
        """The message with what to do about it."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message

    def about(self, path: object) -> BntoolError:
        """Name the file, where the code that raised could not know it; returns the error itself."""
        if self.path is None:
            self.path = str(path)
        return self


class UsageError(BntoolError):
    """The command or call cannot be understood: an unknown key, a malformed spec, options that exclude each other."""

    code = "usage"


class MissingExtraError(UsageError):
    """An optional package is needed; the message names the extra that installs it."""

    code = "missing-extra"


class ExtensionError(UsageError):
    """A package that offers bntool a format or graph source cannot be imported."""

    code = "extension"


class FileError(BntoolError):
    """A file cannot be read or written as asked."""

    code = "file"


class UnreadableFileError(FileError):
    """The operating system does not give the file: absent, a folder, a pipe, no permission, shrunk while read."""

    code = "unreadable"


class UnreachableFileError(UnreadableFileError):
    """A server does not give the file: absent, not allowed, too slow, or not as it says."""

    code = "unreachable"


class UnknownFormatError(FileError):
    """The file is none of the formats that bntool reads."""

    code = "unknown-format"


class OtherFormatError(UnknownFormatError):
    """The file is not of the format that was tried; it may be of another one."""


class CorruptFileError(FileError):
    """The file contradicts its own format: truncated, bad checksum, values out of bounds."""

    code = "corrupt"
    usual_remedy = "fetch or copy the file again"


class UnsafeFileError(FileError):
    """The file is well formed but built to do harm or to exhaust memory or time; reading stops."""

    code = "unsafe"
    usual_remedy = "load it nowhere unless you trust where it comes from"


class UnwritableFileError(FileError):
    """The output cannot be written, or exists and ``--force`` was not given."""

    code = "unwritable"


class RefusedError(BntoolError):
    """Nothing could be done safely, or something was skipped or assumed under ``--strict``."""

    code = "refused"


class NoNumbersError(RefusedError, ValueError):
    """A tensor whose elements cannot be read as numbers: uninitialised, meta, sparse, quantised, complex, opaque."""

    code = "no-numbers"


class VerificationError(BntoolError):
    """A result does not agree with what it replaces; nothing was written."""

    code = "verification-failed"


class InterruptedRunError(BntoolError):
    """The user or the system stopped the run; the message says what had been written."""

    code = "interrupted"


class UserCodeError(BntoolError):
    """The user's model or data code raised; the original exception is ``__cause__``."""

    code = "user-code"


class LossWarning(UserWarning):
    """Something that the input holds and a written file does not, because no file should: see the message."""
