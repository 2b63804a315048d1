"""Fingerprints: what tells whether two runs had the same before them."""

from __future__ import annotations

import hashlib
from typing import Any


class Fingerprint:
    """SHA-256 over facts, with the length of each."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *facts: Any) -> None:
        """Add values whose ``repr`` says all of them, or bytes."""
        for fact in facts:
            content = fact if isinstance(fact, bytes) else repr(fact).encode("utf-8", "surrogatepass")
            self._digest.update(len(content).to_bytes(8, "little") + content)

    def add_bytes(self, content: Any) -> None:
        """Add a piece of bytes, of which the length is known by other facts."""
        self._digest.update(content)

    @property
    def text(self) -> str:
        return self._digest.hexdigest()


def make_fingerprint(*facts: Any) -> str:
    """Make a text that differs where facts differ; each is bytes, or a value whose ``repr`` says all of it."""
    fingerprint = Fingerprint()
    fingerprint.add(*facts)
    return fingerprint.text
