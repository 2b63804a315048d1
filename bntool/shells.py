"""Command lines for people to paste into a shell, in the quotes that shells of this system take."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable

_PLAIN = re.compile(r"[\w@%+=:,./\\-]+", re.ASCII)


def join_words(words: Iterable[str]) -> str:
    """Return the words as one line that a shell takes apart into them: those of POSIX systems, or of Windows."""
    return " ".join(map(quote_word, words))


def quote_word(word: str) -> str:
    """Return a word as a shell takes it; single quotes are none for cmd of Windows."""
    if sys.platform == "win32":
        return _quote_for_windows(word)
    return shlex.quote(word)


def _quote_for_windows(word: str) -> str:
    if _PLAIN.fullmatch(word):
        return word
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', word)  # backslashes count where a quote follows
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'
