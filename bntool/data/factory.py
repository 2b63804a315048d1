"""``file.py:factory`` and ``package.module:factory``: a Dataset, a DataLoader, arrays, or any iterable of batches."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from bntool.data.arrays import read_rows
from bntool.data.batches import Batch, Batches, cut_batch, find_label, split_batch, take_share, to_tensors
from bntool.data.fingerprints import make_fingerprint
from bntool.data.rows import LiveRows, Rows, choose_arrays
from bntool.data.source import DataOptions, DataSource
from bntool.data.workers import iterate
from bntool.errors import UsageError
from bntool.models.user_code import call_factory, import_object, is_factory_spec, running_user_code


class FactoryDataSource(DataSource):
    form = "FILE.py:factory or package.module:factory"

    def recognises(self, spec: str) -> bool:
        return is_factory_spec(spec)

    def load(self, spec: str, options: DataOptions) -> Batches:
        found = import_object(spec)
        made = _make(found, spec)
        arrays = _name_arrays(made)
        if arrays:
            return read_rows(*choose_arrays(arrays, spec, options.columns), spec, options)
        options.columns.refuse_names(spec, what="this data names its own")
        if options.preprocessing is not None:
            raise UsageError(f"--preprocess is for images and pixels; {spec} prepares its data itself")
        if _gives_samples(made, spec):
            return _read_dataset(made, spec, options)
        return _read_batches(_Source(found, made, spec), spec, options)


def _make(found: Any, spec: str) -> Any:
    is_data = isinstance(found, DataLoader | Dataset | list | tuple)
    made = call_factory(found, {}, what=spec) if callable(found) and not is_data else found
    if isinstance(made, Dataset) or _is_map(made) or hasattr(made, "__iter__"):
        return made
    raise UsageError(f"{spec} gives {type(made).__name__}; a Dataset, a DataLoader or an iterable of batches is needed")


class _Source:
    """The result of a user's factory; when an iterator is used up, the factory is called again."""

    def __init__(self, found: Any, made: Any, spec: str) -> None:
        self._found, self._spec = found, spec
        self.made: Any = made
        self.is_iterator = isinstance(made, Iterator)

    def take(self) -> Any:
        made = self.made
        if not self.is_iterator:
            return made
        if made is None and not callable(self._found):
            raise UsageError(
                f"{self._spec} is an iterator, which can be read once only; name the function that makes it"
            )
        self.made = None
        return _make(self._found, self._spec) if made is None else made


def _is_map(value: Any) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not hasattr(value, "__iter__")


def _name_arrays(made: Any) -> dict[str, Rows]:
    """Return the arrays by name, where the data are arrays and not batches: one, ``(inputs, labels)``, or a dict of
    them.
    """
    if isinstance(made, tuple) and len(made) == 2:
        inputs, labels = map(to_tensors, made)
        if isinstance(inputs, torch.Tensor) and isinstance(labels, torch.Tensor) and 0 < labels.ndim < inputs.ndim:
            return {"images": LiveRows(inputs), "labels": LiveRows(labels)}
        return {}
    if isinstance(made, Mapping):
        tensors = {str(name): to_tensors(value) for name, value in made.items()}
        return {name: LiveRows(value) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    single = to_tensors(made) if not isinstance(made, list | tuple) else None
    return {"images": LiveRows(single)} if isinstance(single, torch.Tensor) else {}


def _gives_samples(made: Any, spec: str) -> bool:
    """Return whether it has single samples by index: a Dataset, or a list of samples."""
    if isinstance(made, DataLoader | IterableDataset):
        return False
    if isinstance(made, Dataset) or _is_map(made):
        return True
    with running_user_code(f"reading the first sample of {spec}"):
        return hasattr(made, "__getitem__") and hasattr(made, "__len__") and len(made) > 0 and _is_sample(made[0])


def _is_sample(item: Any) -> bool:
    """Return whether an item is one sample and no batch: its label is a single number."""
    label = find_label(item)
    return isinstance(label, numbers.Number) or getattr(label, "ndim", None) == 0


def _read_dataset(dataset: Any, spec: str, options: DataOptions) -> Batches:
    """Return batches of the samples of a dataset, dealt by bntool."""
    with running_user_code(f"len() of {spec}"):
        count = len(dataset)
    dealt = options.deal(count)

    def read() -> Iterator[Batch]:
        loader = DataLoader(dataset, batch_sampler=list(dealt.batches.values()), num_workers=options.workers or 0)
        items = _iterate(loader, lambda: f"reading a batch of {spec}")
        for (position, indices), item in zip(dealt.batches.items(), items, strict=True):
            batch = split_batch(item, source=spec, position=indices[0])
            names = [f"sample {index} of {spec}" for index in indices]
            description = f"the batch of samples {_list_some(indices)} of {spec}"
            yield replace(batch, names=names, description=description, position=position)

    return Batches(
        read,
        description=spec,
        samples=dealt.samples,
        share=options.share,
        count=dealt.total,
        identify=lambda: dealt.fingerprint,
    )


def _list_some(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:4]))
    return shown + (f" and {len(indices) - 4} more" if len(indices) > 4 else "")


def _read_batches(source: _Source, spec: str, options: DataOptions) -> Batches:
    """Return batches that the user's own source makes, in its order."""
    samples = _count(source.made, options)

    def read_all() -> Iterator[Batch]:
        taken = source.take()
        if isinstance(taken, IterableDataset):
            # each of several workers would read all of it
            taken = DataLoader(taken, batch_size=options.batch_size, num_workers=min(options.workers or 0, 1))
        position = 0
        items = _collate_samples(_iterate(taken, lambda: f"reading what follows sample {position} of {spec}"), options)
        for item in items:
            batch = split_batch(item, source=spec, position=position)
            if options.samples is not None and position + batch.samples > options.samples:
                batch = cut_batch(batch, options.samples - position)
            position += batch.samples
            yield batch
            if options.samples is not None and position >= options.samples:
                return  # before the source is asked for what is not used
        if not position and source.is_iterator:
            raise UsageError(
                f"{spec} gave no batch; an iterator can be read once only, so name a function that makes a new one "
                "each time"
            )

    def read() -> Iterator[Batch]:
        return take_share(read_all(), batches)

    batches = Batches(
        read,
        description=spec,
        samples=samples if options.share.is_all else None,
        share=options.share,
        identify=lambda: make_fingerprint(options.samples, options.batch_size),
    )
    return batches


def _count(made: Any, options: DataOptions) -> int | None:
    """Return the largest number of samples that can come; None if nothing tells."""
    if isinstance(made, DataLoader) and made.batch_size and not isinstance(made.dataset, IterableDataset):
        with running_user_code("len() of the data loader"):
            count = min(len(made) * made.batch_size, len(made.dataset))  # type: ignore[arg-type]
        return count if options.samples is None else min(count, options.samples)
    return options.samples


def _iterate(source: Iterable[Any], describe: Callable[[], str]) -> Iterator[Any]:
    """Yield the items of a user's iterable; what it raises becomes a UserCodeError."""
    iterator = iterate(source)
    while True:
        with running_user_code(describe()):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def _collate_samples(items: Iterator[Any], options: DataOptions) -> Iterator[Any]:
    """Yield batches as they are, and single samples put together."""
    first = list(itertools.islice(items, 1))
    items = itertools.chain(first, items)
    if not first or not _is_sample(first[0]):
        yield from items
        return
    while group := list(itertools.islice(items, options.batch_size)):
        with running_user_code("putting samples together"):
            yield default_collate(group)
