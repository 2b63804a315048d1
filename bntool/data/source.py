"""The interface of each kind of ``--data`` spec."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bntool.data.batches import Batches
from bntool.data.columns import FOUND, Columns
from bntool.data.fingerprints import make_fingerprint
from bntool.data.policies import OnBadData
from bntool.data.preprocessing import Preprocessing
from bntool.data.shares import WHOLE, Share

_WORKERS = 8  # processes at most that nobody asked for


@dataclass(frozen=True)
class DataOptions:
    """Options for reading data.

    Attributes:
        batch_size: at most so many samples in a batch, where bntool makes the batches.
        samples: at most so many; None for all.
        seed: shuffle by it, before the first ``samples`` are taken; None for the order of the source.
        workers: processes that read beside this one; None for as many as the kind of data is worth.
        preprocessing: what the user says is to be done to images and pixels.
        model_preprocessing: what the package of the model says, for images and pixels, where the user says nothing.
        on_bad_data: what to do about an image that cannot be read.
        columns: which of the data are inputs and labels.
        share: which batches of the one list, the same for all shards and ranks, are to be read.
    """

    batch_size: int
    samples: int | None = None
    seed: int | None = None
    workers: int | None = None
    preprocessing: Preprocessing | None = None
    model_preprocessing: Preprocessing | None = None
    on_bad_data: OnBadData = OnBadData.STOP
    columns: Columns = FOUND
    share: Share = WHOLE

    @property
    def decoding_workers(self) -> int:
        """Processes for data that take time to decode: if nothing is said, one for each core of this process's part."""
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), _WORKERS)

    def deal(self, count: int) -> Dealt:
        """Deal ``count`` samples to batches."""
        if self.seed is None:
            order = list(range(count))
        else:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(count, generator=generator, device="cpu").tolist()
        order = order[: self.samples]
        # of nearly equal size: a small last batch would be normalised by statistics of few samples
        number = math.ceil(len(order) / self.batch_size)
        edges = [len(order) * index // number for index in range(number + 1)] if number else []
        batches = {
            position: sorted(order[edges[position] : edges[position + 1]]) for position in self.share.find_run(number)
        }
        return Dealt(batches, number, make_fingerprint(count, edges, array("q", order).tobytes()))


@dataclass(frozen=True)
class Dealt:
    """Samples dealt to batches.

    Attributes:
        batches: the indices of the samples of each batch of this share, by its position in the list of all batches;
            ascending in a batch: files are read in order.
        total: batches of all shares together.
        fingerprint: of the whole list.
    """

    batches: Mapping[int, list[int]]
    total: int
    fingerprint: str

    @property
    def samples(self) -> int:
        """The samples of this share."""
        return sum(map(len, self.batches.values()))


class DataSource(ABC):
    """One kind of data spec."""

    form: str  # how the spec is written, for messages and help

    @abstractmethod
    def recognises(self, spec: str) -> bool:
        """Return whether the spec is of this kind."""

    @abstractmethod
    def load(self, spec: str, options: DataOptions) -> Batches:
        """Open the data; batches are read when they are asked for.

        Raises:
            UsageError: the data cannot be understood.
            FileError: a file cannot be read.
            MissingExtraError: a package is missing.
            UserCodeError: the code that it names raised.
        """
