"""Addresses of checkpoints: a path, or the place of a file elsewhere. Telling them apart imports nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeAlias

_ADDRESS = r"(?a)[A-Za-z][A-Za-z0-9+.-]+://"  # a drive of Windows has one letter


class Address:
    """The address of a file on another machine.

    It is shown without its query and its password, which are secrets perhaps, and opened with them.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @property
    def scheme(self) -> str:
        """``https`` or ``hf``, for instance."""
        return self.text.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of its name, as of a path."""
        return Path(self.name).suffix

    def __str__(self) -> str:
        return re.sub(r"(?<=://)[^/@]*@", "", re.split(r"[?#]", self.text, maxsplit=1)[0])

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __fspath__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


Location: TypeAlias = Path | Address


def as_location(place: str | os.PathLike[str]) -> Location:
    """Take a text as a path, or as an address where it is written as one."""
    if isinstance(place, Address):
        return place
    text = os.fspath(place)
    return Address(text) if "://" in text and re.match(_ADDRESS, text) else Path(place)


def split_numbers(path: str) -> list[tuple[int, str]]:
    """Make a key to sort by, in which ``part-9`` comes before ``part-10``."""
    parts = re.split(r"(?a)(\d+)", path)
    return [(int(part), "") if at % 2 else (-1, part) for at, part in enumerate(parts)]
