"""``file.py:factory`` and ``package.module:factory``: a Dataset, a DataLoader or any iterable of batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from bntool.data.batches import Batch, Batches, cut_batch, split_batch
from bntool.data.source import DataOptions, DataSource
from bntool.errors import UsageError
from bntool.models.user_code import call_factory, import_object, is_factory_spec, running_user_code


class FactoryDataSource(DataSource):
    form = "FILE.py:factory or package.module:factory"

    def recognises(self, spec: str) -> bool:
        return is_factory_spec(spec)

    def load(self, spec: str, options: DataOptions) -> Batches:
        found = import_object(spec)
        made = _make(found, spec)
        if options.preprocessing is not None:
            raise UsageError(f"--preprocess is for images and pixels; {spec} prepares its data itself")
        one_shot = iter(made) is made if not isinstance(made, Dataset) else False
        first: list[Any] = [made]

        def read() -> Iterator[Batch]:
            # an iterator is used up after one pass: the factory is asked for another
            source = first.pop() if first else (_make(found, spec) if one_shot else made)
            return _read(source, spec, options)

        rank, world = options.share
        dealt = _is_dataset(made) and not isinstance(made, IterableDataset)  # deal() has given this rank its share

        def read_share() -> Iterator[Batch]:
            return read() if dealt or world == 1 else itertools.islice(read(), rank, None, world)

        return Batches(read_share, description=spec, samples=_count(made, options) if world == 1 else None)


def _make(found: Any, spec: str) -> Any:
    if isinstance(found, DataLoader | Dataset | list | tuple):
        return found
    made = call_factory(found, {}, what=spec) if callable(found) else found
    if isinstance(made, Dataset) or _is_map(made) or hasattr(made, "__iter__"):
        return made
    raise UsageError(f"{spec} gives {type(made).__name__}; a Dataset, a DataLoader or an iterable of batches is needed")


def _is_map(value: Any) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not hasattr(value, "__iter__")


def _is_dataset(value: Any) -> bool:
    return _is_map(value) or (isinstance(value, Dataset) and not isinstance(value, DataLoader))


def _count(made: Any, options: DataOptions) -> int | None:
    if _is_dataset(made) and hasattr(made, "__len__"):
        return min(len(made), options.samples or len(made))
    return options.samples


def _read(source: Any, spec: str, options: DataOptions) -> Iterator[Batch]:
    """Batches of a user's source; what it raises becomes a UserCodeError."""
    position = 0
    iterator = None
    while options.samples is None or position < options.samples:
        with running_user_code(f"reading the batch after sample {position} of {spec}"):
            if iterator is None:
                iterator = iter(_wrap(source, options))
            try:
                item = next(iterator)
            except StopIteration:
                return
        batch = split_batch(item, source=spec, position=position)
        if options.samples is not None and position + batch.samples > options.samples:
            batch = cut_batch(batch, options.samples - position)
        position += batch.samples
        yield batch


def _wrap(source: Any, options: DataOptions) -> Any:
    """Batches of the samples of a dataset; anything else gives batches itself."""
    if isinstance(source, IterableDataset):
        return DataLoader(source, batch_size=options.batch_size, num_workers=options.workers)
    if _is_dataset(source):
        return DataLoader(source, batch_sampler=options.deal(len(source)), num_workers=options.workers)
    return source
