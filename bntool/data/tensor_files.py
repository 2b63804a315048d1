"""Tensors in files of torch.save and in .safetensors: found by their place in the file, without running code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.pickles.nodes import Instance, Node, as_mapping, is_mapping
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import StoredTensor
from bntool.checkpoints.torch.state_dicts import TorchContent
from bntool.data.columns import LABEL_KEYS
from bntool.data.rows import LiveRows, Rows, StackedRows, StoredRows
from bntool.errors import UsageError
from bntool.modules.loading import to_torch

_SAMPLE_DIMENSIONS = 3  # of an image; more are a batch
_DATASET = "torch.utils.data.dataset.TensorDataset"


def open_tensors(path: Path) -> Mapping[str, Rows]:
    """Return the arrays of a file by name.

    A file of torch.save may hold a tensor, ``(inputs, labels)``, a dict of tensors (in dicts, too), a TensorDataset, a
    list of samples or a list of batches ``(input, label)``. Names are made up where the file has none.

    Raises:
        FileError: the file cannot be read.
        UsageError: it holds something else.
    """
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint.content, TorchContent):
        return _name_tensors(checkpoint)
    found = _TensorFile(checkpoint, path).name_arrays(checkpoint.content.pickle.root)
    if not found:
        raise UsageError(
            "there are no tensors to be found in this file without running code: it may hold a tensor, (inputs, "
            "labels), a dict of tensors, a TensorDataset or a list of samples; for anything else give FILE.py:factory",
            path=path,
        )
    return found


def _name_tensors(checkpoint: Checkpoint) -> Mapping[str, Rows]:
    tensors: dict[str, Any] = {}
    for state_dict in checkpoint.state_dicts:
        tensors.update({state_dict.strip(name): tensor for name, tensor in state_dict.tensors.items()})
    return {name: StoredRows(t, checkpoint) for name, t in tensors.items() if isinstance(t, StoredTensor) and t.shape}


class _TensorFile:
    """A pickle of torch.save as arrays."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self._checkpoint = checkpoint
        self._path = path

    def name_arrays(self, node: Node) -> dict[str, Rows]:
        """See :func:`open_tensors`; nothing where the node is none of these."""
        rows = self._rows(node)
        if rows is not None:
            return {"images": rows}
        if is_mapping(node):
            return self._name_mapping(as_mapping(node))
        if isinstance(node, Instance) and node.path == _DATASET:
            tensors = as_mapping(node.state).get("tensors")
            return self._name_sequence(tensors[:2]) if isinstance(tensors, tuple) and tensors else {}
        if isinstance(node, tuple | list) and node:
            return self._name_sequence(node)
        if isinstance(node, Instance) and self._tensor(node) is None:
            raise UsageError(
                f"the file holds an object of {node.path or 'a class without a name'}, which is not made, since that "
                "would run code; save tensors, or give FILE.py:factory",
                path=self._path,
            )
        return {}

    def _name_mapping(self, entries: Mapping[str, Node]) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        for name, value in entries.items():
            rows = self._labels(value) if name in LABEL_KEYS else self._rows(value)
            if rows is not None:
                found[name] = rows
            elif is_mapping(value):
                found.update(self._name_mapping(as_mapping(value)))
        return found

    def _name_sequence(self, items: Sequence[Node]) -> dict[str, Rows]:
        """Name the columns of a sequence: ``[inputs]``, ``(inputs, labels)``, samples, or batches."""
        inputs, labels = self._rows(items[0]), self._labels(items[-1])
        if inputs is not None and len(items) == 1:
            return {"images": inputs}
        if inputs is not None and labels is not None and len(items) == 2 and _go_together(inputs, labels):
            return {"images": inputs, "labels": labels}
        pairs = [self._split(item) for item in items]
        parts = [rows for rows, _ in pairs if rows is not None]
        if len(parts) < len(pairs):
            return {}
        numbers = [number for _, label in pairs if (number := self._number(label)) is not None]
        label_parts = [rows for _, label in pairs if (rows := self._labels(label)) is not None]
        # samples have a number each, batches an array; images without labels tell by their dimensions
        are_batches = len(label_parts) == len(parts) or (not numbers and len(parts[0].shape) > _SAMPLE_DIMENSIONS)
        shapes = {part.shape[1:] if are_batches else part.shape for part in parts}
        if len(shapes) > 1:
            first, second, *_ = sorted(map(list, shapes))
            raise UsageError(f"the samples differ in shape: {first} and {second} for two of them", path=self._path)
        found: dict[str, Rows] = {"images": StackedRows(parts, are_batches=are_batches)}
        if len(label_parts) == len(parts):
            found["labels"] = StackedRows(label_parts, are_batches=True)
        elif len(numbers) == len(parts):
            found["labels"] = LiveRows(torch.tensor(numbers, device="cpu"))
        return found

    def _split(self, item: Node) -> tuple[Rows | None, Node]:
        """Return input and label of a sample or a batch."""
        if isinstance(item, tuple | list):
            return (self._rows(item[0]) if item else None), (item[1] if len(item) > 1 else None)
        if not is_mapping(item):
            return self._rows(item), None
        entries = as_mapping(item)
        label = next((key for key in LABEL_KEYS if key in entries), None)
        inputs = [rows for key, value in entries.items() if key != label and (rows := self._rows(value)) is not None]
        return (inputs[0] if len(inputs) == 1 else None), (entries[label] if label is not None else None)

    def _tensor(self, node: Node) -> StoredTensor | None:
        return TorchContent.of(self._checkpoint).reader.read(node)

    def _rows(self, node: Node) -> Rows | None:
        tensor = self._tensor(node)
        return StoredRows(tensor, self._checkpoint) if tensor is not None and tensor.shape else None

    def _labels(self, node: Node) -> Rows | None:
        """Convert a tensor, or a list of numbers, to labels; None for anything else."""
        if isinstance(node, list | tuple) and node and all(type(value) is int for value in node):
            return LiveRows(torch.tensor(node, device="cpu"))
        return self._rows(node)

    def _number(self, node: Node) -> int | None:
        """Return the label of one sample."""
        tensor = self._tensor(node)
        if tensor is not None and tensor.numel == 1 and len(tensor.shape) == 0:
            return int(to_torch(tensor).item())
        return node if type(node) is int else None


def _go_together(inputs: Rows, labels: Rows) -> bool:
    return inputs.shape[0] == labels.shape[0] and len(labels.shape) < len(inputs.shape)
