"""Samples that come one after another, of which nobody knows how many: put together to batches in their order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from bntool.data.batches import Batch, Batches, find_share
from bntool.data.policies import LeftOut
from bntool.data.samples import Decoding
from bntool.data.source import DataOptions


def read_stream(
    open_: Callable[[], Iterator[Any]],
    decoding: Decoding,
    options: DataOptions,
    *,
    has_labels: bool,
    identify: Callable[[], str],
) -> Batches:
    """Return batches of a stream. It is read whole for a share of it, but only that share is decoded.

    Args:
        open_: starts the stream from its first sample, as it is stored.
        decoding: of a sample as it is stored.
        options: see there; the order is the stream's own.
        has_labels: whether samples have labels.
        identify: a fingerprint of the stream.
    """
    bad_inputs: list[LeftOut] = []
    workers = options.decoding_workers if decoding.are_images else options.workers or 0

    def read() -> Iterator[Batch]:
        lots = deal(itertools.islice(open_(), options.samples), options.batch_size)
        return decoding.run(
            find_share(lots, batches), workers=workers, on_bad_data=options.on_bad_data, bad_inputs=bad_inputs
        )

    batches = Batches(
        read,
        description=decoding.spec,
        samples=options.samples if options.share.is_all else None,
        has_labels=has_labels,
        bad_inputs=bad_inputs,
        preprocessing=decoding.preprocessing,
        share=options.share,
        identify=identify,
    )
    return batches


def deal(samples: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Deal samples to batches, in order; the last two are of nearly equal size.

    A small last batch would be normalised by statistics of few samples.
    """
    before: list[Any] = []
    while lot := list(itertools.islice(samples, size)):
        if len(lot) < size and before:
            both = [*before, *lot]
            before, lot = both[: (len(both) + 1) // 2], both[(len(both) + 1) // 2 :]
        if before:
            yield before
        before = lot
    if before:
        yield before
