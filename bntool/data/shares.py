"""One list of batches, dealt to the shards of an array of jobs and to the processes of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from bntool.errors import UsageError

_EVEN = 16  # a block of batches is at most so small a part of what each share has before it


@dataclass(frozen=True)
class Share:
    """A share of one list of batches, by their positions in it.

    Where the length of the list is known, it is a run of neighbours. Else batches are dealt in blocks of 1, 2, 4, ...
    that grow with the position, so that shares stay of nearly equal size and hold few, long blocks.

    Attributes:
        shard, shards: which of how many independent jobs, counted from 0.
        rank, ranks: which of how many processes of such a job.
        start: positions before it are left out, because they are done.
    """

    shard: int = 0
    shards: int = 1
    rank: int = 0
    ranks: int = 1
    start: int = 0

    @property
    def is_all(self) -> bool:
        """Whether the whole list is one share."""
        return self.shards * self.ranks == 1

    def find_run(self, total: int) -> range:
        """Return the positions of this share in a list of known length."""
        index, count = self.shard * self.ranks + self.rank, self.shards * self.ranks
        return range(max(total * index // count, self.start), total * (index + 1) // count)

    def list_positions(self) -> Iterator[int]:
        """Yield the positions of this share in a list of unknown length, without end."""
        count = self.shards * self.ranks
        for number, (first, size) in enumerate(_make_blocks(count)):
            shard, rank = number % self.shards, number // self.shards % self.ranks
            if (shard, rank) == (self.shard, self.rank):
                yield from range(max(first, self.start), first + size)

    def count_before(self, position: int, total: int | None) -> int:
        """Count the batches of this share that come before a position.

        Args:
            position: in the list of all.
            total: its length; None where that was not known when batches were dealt.
        """
        if total is not None:
            run = self.find_run(total)
            return len(range(run.start, min(run.stop, position)))
        return sum(1 for _ in itertools.takewhile(lambda own: own < position, self.list_positions()))


WHOLE = Share()


def _make_blocks(shares: int) -> Iterator[tuple[int, int]]:
    """Yield first position and size of each block."""
    first, size = 0, 1
    while True:
        while first >= 2 * size * shares * _EVEN and first % (2 * size) == 0:
            size *= 2
        yield first, size
        first += size


def parse_shard(text: str | None) -> tuple[int, int]:
    """Parse ``3/64``, the third of 64, as (2, 64); None counts as the only one.

    Raises:
        UsageError: it is nothing of the kind.
    """
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if found is None:
        raise UsageError(f"--shard {text!r}: give which of how many, e.g. 3/64")
    number, count = int(found[1]), int(found[2])
    if not 1 <= number <= count:
        raise UsageError(f"--shard {text}: shards count from 1, as in 1/{max(count, 1)}")
    return number - 1, count
