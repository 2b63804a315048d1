"""The catalogue of public architectures, known without their libraries: the file ``catalogue.bin``.

``make catalogue`` writes the file from the real models. Its first line says how long the compressed index is and how
long each block of structures; then these follow. An index of all architectures suffices to recognise one; a structure
(see :mod:`bntool.graphs.architectures.structure`) is only decompressed to fold. Structures hold no shapes, so that
models of different width share one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

Runs = tuple[tuple[int, float], ...]  # how many have which value, one after another
PATH = Path(__file__).with_name("catalogue.bin")
MAGIC = "bntool-catalogue-2"
BLOCK = 24  # structures that are compressed together


class Scope(NamedTuple):
    """The tensors of an architecture that must be there, in their shapes: all that a BatchNorm depends on.

    Attributes:
        children: first parts of their names.
        left_out: names below these that do not count, such as a classifier's.
        stems: weights that read the model's input, of any number of channels.
    """

    children: tuple[str, ...]
    left_out: frozenset[str]
    stems: frozenset[str]


class Entry(NamedTuple):
    """Architectures with the same tensors, eps and structure.

    Attributes:
        names: as ``--arch`` takes them.
        scope: which tensors must be there.
        fingerprint: of these.
        rest: fingerprint of all others, in any size of their first dimension.
        eps: runs of BatchNorms with one eps, over their sorted names; None where it is one of several.
        structure: number of the text that says who feeds whom.
    """

    names: tuple[str, ...]
    scope: Scope
    fingerprint: int
    rest: int
    eps: Runs
    structure: int


class Catalogue:
    """All entries, found by the children that their tensors lie under."""

    def __init__(self, path: Path = PATH) -> None:
        self._data = path.read_bytes()
        head, _, _ = self._data.partition(b"\n")
        magic, *sizes = head.decode().split()
        if magic != MAGIC:
            raise ValueError(f"{path} is no catalogue of this version")
        self._ends = [len(head) + 1]
        for size in map(int, sizes):
            self._ends.append(self._ends[-1] + size)
        self._index: dict[str, Any] = json.loads(self._block(0))
        scopes = [Scope(tuple(c), frozenset(out), frozenset(stems)) for c, out, stems in self._index["scopes"]]
        self.scopes: dict[str, list[Scope]] = {}
        for scope in scopes:
            self.scopes.setdefault(scope.children[-1], []).append(scope)
        self._found: dict[tuple[int, int], list[int]] = {}
        self._scopes = scopes
        for number, (_, position, fingerprint, *_) in enumerate(self._index["entries"]):
            self._found.setdefault((id(scopes[position]), fingerprint), []).append(number)

    def _block(self, number: int) -> bytes:
        return zlib.decompress(self._data[self._ends[number] : self._ends[number + 1]])

    def _entry(self, number: int) -> Entry:
        names, scope, fingerprint, rest, eps, structure = self._index["entries"][number]
        runs = tuple((count, value) for count, value in self._index["eps"][eps])
        return Entry(tuple(names), self._scopes[scope], fingerprint, rest, runs, structure)

    @property
    def versions(self) -> Mapping[str, str]:
        """The libraries that the architectures are from."""
        return dict(self._index["versions"])

    def momentum(self, name: str) -> Runs | None:
        """Return the momentums of an architecture's BatchNorms, over their sorted names, in runs.

        None where all have PyTorch's 0.1; no runs where it was not looked at.
        """
        runs = self._index["momentum"].get(name)
        return None if runs is None else tuple((count, value) for count, value in runs)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All of them; recognising needs only some."""
        return tuple(map(self._entry, range(len(self._index["entries"]))))

    def find(self, scope: Scope, fingerprint: int) -> list[Entry]:
        """Return the entries of a scope with that fingerprint; several where they differ in eps, structure or
        classifier.
        """
        return [self._entry(number) for number in self._found.get((id(scope), fingerprint), ())]

    def structure(self, number: int) -> str:
        """Return the graph of an entry as text."""
        block, position = divmod(number, BLOCK)
        return self._block(1 + block).decode().split("\0")[position]


@cache
def load_catalogue() -> Catalogue:
    """Load the catalogue of this installation, once."""
    return Catalogue()


def fingerprint(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Hash names and shapes to 64 bits, in any order."""
    text = "\n".join(sorted(f"{name} {shape}" for name, shape in tensors)).encode("utf-8", "surrogatepass")
    return zlib.crc32(text) << 32 | zlib.crc32(text[::-1])


def fingerprint_scope(scope: Scope, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the fingerprints of the tensors in a scope and of all others.

    Args:
        tensors: shapes by name, without counters (``num_batches_tracked``).
    """
    inside: list[tuple[str, tuple[int, ...]]] = []
    rest: list[tuple[str, tuple[int, ...]]] = []
    children = frozenset(scope.children)
    for name, shape in tensors.items():
        if name.partition(".")[0] not in children or name in scope.left_out:
            rest.append((name, shape[1:]))
        elif name in scope.stems:
            inside.append((name, (*shape[:1], *shape[2:])))
        else:
            inside.append((name, shape))
    return fingerprint(inside), fingerprint(rest)
