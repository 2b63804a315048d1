"""Progress of a long call, as it is told to a caller who asks for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias, TypeVar


class Progress(NamedTuple):
    """The progress of a call.

    Attributes:
        phase: what it does now, in words.
        done: units of this phase that are done; 0 when it begins.
        total: of them; None where it is not known, or the phase counts none.
        phases: all phases that the call will have, in order.
        unit: what is counted; ``byte`` is shown in larger ones.
    """

    phase: str
    done: int = 0
    total: int | None = None
    phases: tuple[str, ...] = ()
    unit: str = "sample"


OnProgress: TypeAlias = Callable[[Progress], None]
OnWarning: TypeAlias = Callable[[str], None]


Item = TypeVar("Item")


def count(sizes: Mapping[Item, int], phase: str, on_progress: OnProgress) -> Iterator[Item]:
    """Yield what is read, one after another, and call ``on_progress`` before each.

    Args:
        sizes: the bytes of each.
    """
    done, total = 0, sum(sizes.values())
    for item, size in sizes.items():
        on_progress(Progress(phase, done, total, unit="byte"))
        yield item
        done += size


_shown_by: list[OnProgress] = []


def show_by(shower: OnProgress) -> None:
    """Name what shows the progress of calls whose caller does not ask for it."""
    _shown_by[:] = [shower]


def tell_notebook(progress: Progress) -> None:
    """Show the progress of a call whose caller does not ask for it, in a notebook only."""
    if "IPython" in sys.modules:
        for shower in _shown_by:
            shower(progress)


def ignore(_: Progress | str) -> None:
    """Ignore the progress or warning."""
