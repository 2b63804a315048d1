"""Measuring that can be resumed after the process was killed: what was measured so far is kept as a partial."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bntool.data.batches import Batches
from bntool.data.shares import Share
from bntool.errors import CorruptFileError, RefusedError, UsageError
from bntool.recalibration.batch_tree import BatchTree
from bntool.recalibration.live import Selection
from bntool.recalibration.options import Method
from bntool.recalibration.partials import Origin, Partial, find_difference, read_partial, write_partial
from bntool.recalibration.ranks import Ranks
from bntool.version import __version__

_AND = " and "


class PartialKeeper:
    """Makes partials of what is measured, and writes them to a file every so many seconds.

    Args:
        origin, share: of what is measured.
        path: the file; None to write none. Where it is there already, a run before kept it.
        every: seconds from one writing to the next.
        device: where the model runs.

    Attributes:
        position: all batches of the share before it are measured already.

    Raises:
        FileError: the file cannot be read.
        RefusedError: it is of another measurement.
    """

    def __init__(self, origin: Origin, share: Share, path: Path | None, *, every: float, device: str) -> None:
        self._origin, self._share, self._path, self._every, self._device = origin, share, path, every, device
        self._earlier = None if path is None else _read_earlier(path, origin, share)
        self.position = 0 if self._earlier is None else self._earlier.position

    def begin(self, selection: Selection) -> BatchTree:
        """Return the tree of the run before, or an empty one."""
        self._selection, self._written = selection, time.monotonic()
        if self._earlier is None:
            return BatchTree()
        if self._earlier.layers != selection.layers or self._earlier.skips != tuple(selection.skips):
            raise RefusedError("it was kept by another run, for other layers; remove it", path=self._path)
        return BatchTree(dict(self._earlier.nodes))

    def after_batch(self, tree: BatchTree, batches: Batches, position: int) -> None:
        """Write the file, if it is time."""
        if self._path is not None and time.monotonic() - self._written >= self._every:
            write_partial(self._make(tree, batches, position, is_complete=False), self._path, force=True)
            self._written = time.monotonic()

    def after_all(self, tree: BatchTree, batches: Batches) -> None:
        """Write the file a last time: what follows may fail."""
        if self._earlier is not None:
            self._selection.called.update(self._earlier.called)
            self._selection.read.update(self._earlier.read)
        if self._path is not None:
            write_partial(self.make(tree, batches), self._path, force=True)

    def make(self, tree: BatchTree, batches: Batches) -> Partial:
        """Return all of the share as a partial."""
        return self._make(tree, batches, batches.count or 0, is_complete=True)

    def _make(self, tree: BatchTree, batches: Batches, position: int, *, is_complete: bool) -> Partial:
        selection, earlier = self._selection, self._earlier
        return Partial(
            origin=self._origin,
            share=self._share,
            count=batches.count,
            position=position,
            is_complete=is_complete,
            layers=dict(selection.layers),
            skips=tuple(selection.skips),
            called=tuple(sorted(selection.called.union(earlier.called if earlier is not None else ()))),
            read=tuple(sorted(selection.read.union(earlier.read if earlier is not None else ()))),
            platform=self._join_platforms(),
            nodes=dict(tree.nodes),
        )

    @property
    def platforms(self) -> Sequence[Mapping[str, Any]]:
        """How was measured: before, where something was kept, and now."""
        now = describe_platform(self._device)
        return [now] if self._earlier is None else [self._earlier.platform, now]

    def _join_platforms(self) -> Mapping[str, Any]:
        """Both in one: values that differ stand side by side."""
        *earlier, now = self.platforms
        joined = dict(now)
        for name, value in earlier[0].items() if earlier else ():
            values = dict.fromkeys([*str(value).split(_AND), str(now.get(name, value))])
            joined[name] = value if len(values) == 1 else _AND.join(values)
        return joined

    def end(self, ranks: Ranks) -> None:
        """Remove the file, once all processes of the job are done."""
        if self._path is not None:
            ranks.share(lambda: None)
            self._path.unlink(missing_ok=True)


def check_can_resume(method: Method, *, every: float) -> None:
    """Refuse a method that cannot go on with what was measured before.

    Raises:
        UsageError: the interval is none.
        RefusedError: the method measures nothing batch by batch.
    """
    if not every >= 0:
        raise UsageError("--resume-every is a number of seconds", value=every)
    if method is Method.EXACT:
        raise RefusedError(
            "--resume keeps what was measured batch by batch; with --method exact all batches are on their way at once"
        )


def name_kept(path: Path, share: Share) -> Path:
    """Return the file of one process of a job; each has its own."""
    if share.ranks == 1:
        return path
    return path.with_name(f"{path.stem}.{share.rank}-of-{share.ranks}{path.suffix}")


def _read_earlier(path: Path, origin: Origin, share: Share) -> Partial | None:
    """Read what a run before kept of the same measurement; None where there is no such file."""
    if not path.exists():
        return None
    earlier = read_partial(path)
    other = find_difference(origin, earlier.origin)
    if other is None and replace(earlier.share, start=0) != share:
        its = earlier.share
        other = f"shard {its.shard + 1}/{its.shards}, rank {its.rank} of {its.ranks}"
    if other is not None:
        raise RefusedError(f"it was kept by another run, which has {other}; remove it, or name another file", path=path)
    if not earlier.has_all_before:
        raise CorruptFileError(
            f"it goes on after batch {earlier.position:,}, and does not hold all before",
            path=path,
            remedy="remove it to begin anew",
        )
    return earlier


def describe_platform(device: str) -> Mapping[str, Any]:
    """Describe what last bits depend on."""
    return {
        "bntool": __version__,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device.partition(":")[0],
    }
