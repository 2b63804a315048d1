"""The cache of remote files on the disk: a file for each address, with the ranges that were read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from bntool.checkpoints.remote.transfers import Version

MAX_KEPT = 64_000_000  # bytes of one file
MAX_CACHE = 1_000_000_000  # bytes of all of them: those that were not used for longest go
_ENDING = ".ranges"
_MAX_HEADER = 1 << 22

Ranges = list[tuple[int, bytes]]


def find_folder() -> Path | None:
    """Return the folder of the ranges: ``$BNTOOL_CACHE``, or ``bntool`` in the system's folder of caches; None without
    one.
    """
    given = os.environ.get("BNTOOL_CACHE")
    if given is not None:
        return Path(given) if given else None
    with contextlib.suppress(RuntimeError):  # no home
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "bntool" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "bntool"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bntool"
    return None


def load(key: str) -> tuple[Version, Ranges] | None:
    """Load what is kept of a file; None where nothing is, or it is damaged."""
    folder = find_folder()
    if folder is None:
        return None
    path = folder / _name(key)
    try:
        with path.open("rb") as stream:
            line = stream.readline(_MAX_HEADER)
            header = json.loads(line)
            ranges = []
            for offset, length in header["ranges"]:
                data = stream.read(length)
                if len(data) != length or offset < 0:
                    return None
                ranges.append((offset, data))
        os.utime(path)
        return Version(int(header["size"]), str(header["tag"])), ranges
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(key: str, version: Version, ranges: Ranges) -> None:
    """Keep ranges of a file, for this user only; where that cannot be done, nothing is kept.

    Args:
        ranges: sorted, and disjoint.
    """
    folder = find_folder()
    if folder is None or not version.tag or sum(len(data) for _, data in ranges) > MAX_KEPT:
        return
    header = {"size": version.size, "tag": version.tag, "ranges": [(offset, len(data)) for offset, data in ranges]}
    path = folder / _name(key)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    with contextlib.suppress(OSError):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
                stream.write(json.dumps(header).encode() + b"\n")
                stream.writelines(data for _, data in ranges)
            temporary.replace(path)
            _make_room(folder.glob(f"*{_ENDING}"))
        finally:  # also where it is interrupted
            temporary.unlink(missing_ok=True)


def _make_room(paths: Iterable[Path]) -> None:
    known = sorted(((path.stat(), path) for path in paths), key=lambda one: -one[0].st_mtime)
    total = 0
    for status, path in known:
        total += status.st_size
        if total > MAX_CACHE:
            path.unlink()


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32] + _ENDING
