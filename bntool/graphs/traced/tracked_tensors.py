"""Facts of each tensor of a forward: its labels, or the parameters behind it, and who shares its memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from bntool.modules.calling import tensors_in
from bntool.modules.memory import storage_key


def _by_tensor() -> Any:
    return WeakTensorKeyDictionary()


@dataclass
class _Storage:
    """A storage that was seen, and the parameters that constants in it come from; ``reference`` keeps it alive, so that
    its number is not reused.
    """

    reference: Any
    tensors: Any = field(default_factory=_by_tensor)
    labels: list[Tensor] = field(default_factory=list)
    names: frozenset[str] = frozenset()


class TrackedTensors:
    """Labels of computed tensors and origins of constants, by weak references: tracing keeps no tensor alive."""

    def __init__(self) -> None:
        self._labels = _by_tensor()
        self._constants = _by_tensor()
        self._sized_by_values = _by_tensor()
        self._storages: dict[int, _Storage] = {}

    def labels(self, tensor: Any) -> Tensor | None:
        """Return the labels of a computed tensor; None for everything else."""
        found: Tensor | None = self._labels.get(tensor) if isinstance(tensor, Tensor) else None
        return found

    def origin(self, tensor: Tensor) -> frozenset[str] | None:
        """Return the parameters that a constant was computed from; None for a tensor that is not known as a
        constant.
        """
        found: frozenset[str] | None = self._constants.get(tensor)
        return found

    def hidden_labels(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return labels that an unknown tensor may show because its storage is known."""
        storage = self._storages.get(storage_key(tensor))
        return () if storage is None else storage.labels

    def hidden_origin(self, tensor: Tensor) -> frozenset[str]:
        """Return the parameters that an unknown tensor may come from because its storage is known."""
        storage = self._storages.get(storage_key(tensor))
        return frozenset() if storage is None else storage.names

    def set_labels(self, tensor: Tensor, labels: Tensor) -> None:
        """Note that a tensor was computed, and its labels."""
        self._labels[tensor] = labels
        self._constants.pop(tensor, None)
        storage = self._storage_of(tensor)
        if not any(seen is labels for seen in storage.labels):
            storage.labels.append(labels)

    def set_constant(self, tensor: Tensor, names: frozenset[str]) -> None:
        """Note that a tensor depends on these parameters alone."""
        self._constants[tensor] = names
        self._storage_of(tensor).names |= names  # a later write into a view of it has to be seen here too

    def set_sized_by_values(self, tensor: Tensor) -> None:
        """Note that the shape of a tensor depends on values of the data."""
        self._sized_by_values[tensor] = None

    def is_sized_by_values(self, tensor: Any) -> bool:
        """Return whether the shape of a tensor depends on values of the data."""
        return isinstance(tensor, Tensor) and tensor in self._sized_by_values

    def _storage_of(self, tensor: Tensor) -> _Storage:
        key = storage_key(tensor)
        storage = self._storages.get(key)
        if storage is None:
            reference: Any = StorageWeakRef
            storage = self._storages[key] = _Storage(reference(tensor.untyped_storage()))
        storage.tensors[tensor] = None
        return storage

    def sharing(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return other living tensors that share memory with these."""
        own = {id(tensor) for tensor in tensors}
        found: dict[int, Tensor] = {}
        for tensor in tensors:
            storage = self._storages.get(storage_key(tensor))
            for other in list(storage.tensors.keys()) if storage is not None else ():
                found[id(other)] = other
        return [other for identity, other in found.items() if identity not in own]

    def forget_storages(self, tensors: Sequence[Tensor]) -> None:
        """Forget what was in these storages, after they were written to."""
        for tensor in tensors:
            self._storages.pop(storage_key(tensor), None)

    def outliving(self, outputs: Any, inputs: Any) -> Iterator[Tensor]:
        """Yield labels in storages that belong to the outputs, or that something else keeps alive."""
        kept = {storage_key(tensor) for tensor in tensors_in(outputs)}
        expected = kept | {storage_key(tensor) for tensor in tensors_in(inputs)}
        alive = {key for key, s in self._storages.items() if s.labels and not s.reference.expired()}
        if alive - expected:
            gc.collect()  # perhaps only a cycle keeps it
        for key, storage in self._storages.items():
            if key in kept or not storage.reference.expired():
                yield from storage.labels

    def alive(self) -> Iterator[Tensor]:
        """Yield labels in storages that something can still read."""
        for storage in self._storages.values():
            if not storage.reference.expired():
                yield from storage.labels
