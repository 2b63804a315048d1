"""Editing the weights of a Keras file in place: elements, a bias more, a layer less, and what counts or lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import IO, Any

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.hdf5 import import_h5py, named_errors
from bntool.checkpoints.dtypes import BFLOAT16
from bntool.checkpoints.keras.content import KerasContent, WeightsLayout
from bntool.checkpoints.keras.model import KerasModel
from bntool.checkpoints.keras.numbering import group_of_layers, holds_any, orders_in_file
from bntool.checkpoints.tensors import StoredTensor, Tensor, read_bytes
from bntool.errors import RefusedError
from bntool.plan import RemoveEntry

_ATTRIBUTE_LIMIT = 64512  # bytes: Keras cuts longer lists of names into several attributes


def rewrite_weights(
    stream: IO[bytes],
    checkpoint: Checkpoint,
    model: KerasModel | None,
    *,
    removed: frozenset[str],
    frozen: frozenset[str],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Edit a copy of the HDF5 part.

    Args:
        stream: the copy, readable and writable.
        model: as it is after the edits.
        removed, frozen: paths of layers.
        texts: attributes of the root to write.

    Raises:
        RefusedError: the layout cannot hold an edit.
    """
    library = import_h5py()
    stream.flush()
    with named_errors(), library.File(stream, "r+") as file:
        _Rewriting(checkpoint, file, library).run(model, removed, frozen)
        for name, text in (texts or {}).items():
            old = file.attrs.get_id(name).dtype if name in file.attrs else None
            kind = old if old is not None and library.check_string_dtype(old) else library.string_dtype()
            file.attrs.create(name, text, dtype=kind if library.check_string_dtype(kind).length is None else None)


class _Rewriting:
    def __init__(self, checkpoint: Checkpoint, file: Any, library: Any) -> None:
        self.checkpoint, self.file, self.h5py = checkpoint, file, library
        self.content = KerasContent.of(checkpoint)
        (self.state_dict,) = checkpoint.state_dicts
        self.places = self.content.names.places

    def run(self, model: KerasModel | None, removed: frozenset[str], frozen: frozenset[str]) -> None:
        self._set_tensors()
        self._check_removed(removed)
        for edit in self.checkpoint.edits:
            if isinstance(edit.step, RemoveEntry):
                del self.file[edit.step.path[0]]
        numbered = self.content.layout is WeightsLayout.NUMBERED
        if removed and model is not None:
            (self._renumber if numbered else self._remove_names)(model, removed)
        if frozen and not numbered:
            self._reorder_names(frozen)

    def _set_tensors(self) -> None:
        for name, tensor in self.state_dict.tensors.items():
            source = self.state_dict.stored.get(name)
            if source is None:
                self._add_bias(name, tensor)
            elif tensor is not source:
                assert isinstance(source, StoredTensor)
                self._set_elements(self.places[name], source, tensor)

    def _check_removed(self, removed: frozenset[str]) -> None:
        gone = {owner for owner, layer in self.content.names.layers.items() if layer.path in removed}
        for name in self.state_dict.stored.keys() - self.state_dict.tensors.keys():
            if name.rpartition(".")[0] not in gone:
                raise RefusedError("a Keras layer needs all of its weights", tensor=name)

    def _set_elements(self, path: str, stored: StoredTensor, tensor: Tensor) -> None:
        import numpy as np

        from bntool.checkpoints.arrays import place_in_span

        dataset = self.file[path]
        _, data = place_in_span(stored, tensor)
        dataset[()] = np.frombuffer(data, dtype=dataset.dtype).reshape(dataset.shape)

    def _add_bias(self, name: str, tensor: Tensor) -> None:
        import numpy as np

        owner, _, role = name.rpartition(".")
        kernel = f"{owner}.weight"
        if role != "bias" or kernel not in self.places or len(tensor.shape) != 1:
            raise RefusedError("Keras has no place for this tensor", tensor=name)
        beside = self.places[kernel]
        group, _, leaf = beside.rpartition("/")
        if self.content.layout is WeightsLayout.NUMBERED:
            path = f"{group}/{int(leaf) + 1}"
        else:
            path = f"{group}/{_name_bias(leaf)}"
            self._insert_name(beside, path)
        old = self.file[beside]
        values = np.frombuffer(read_bytes(tensor), dtype=old.dtype.newbyteorder("<"))
        added = self.file.create_dataset(path, data=values.astype(old.dtype))
        if tensor.dtype is BFLOAT16:
            added.attrs["dtype"] = old.attrs["dtype"]

    # numbered weights

    def _renumber(self, model: KerasModel, removed: frozenset[str]) -> None:
        assert self.content.model is not None
        old, root = self.content.model, self.content.root
        held = holds_any(self.content.hdf5.datasets)
        before = group_of_layers(old, order=orders_in_file(old), root=root, has_weights=held)
        weighted = {path for path, group in before.items() if held(path, group)}
        after = group_of_layers(
            model, order=orders_in_file(model), root=root, has_weights=lambda path, _: path in weighted
        )
        for path in sorted(removed):  # the same file each time
            if before[path] in self.file:
                del self.file[before[path]]
        moved = {
            path: f"__moved_{number}"
            for number, (path, group) in enumerate(after.items())
            if before[path].rpartition("/")[2] != group.rpartition("/")[2] and before[path] in self.file
        }
        deepest_first = sorted(moved, key=lambda path: -before[path].count("/"))
        for path in deepest_first:
            self.file.move(before[path], moved[path])
        for path in reversed(deepest_first):
            self.file.move(moved[path], after[path])

    # named weights

    def _group(self, path: str) -> Any:
        """Return the group of the top-level layer that a path lies in."""
        root = f"{self.content.root}/" if self.content.root else ""
        return self.file[root + path.removeprefix(root).split("/")[0]]

    def _read_names(self, group: Any, name: str) -> list[str]:
        return list(self.content.hdf5.texts(group.name.strip("/"), name) or ())

    def _insert_name(self, kernel: str, bias: str) -> None:
        group = self._group(kernel)
        names = self._current(group)
        start = len(group.name.strip("/")) + 1
        names.insert(names.index(kernel[start:]) + 1, bias[start:])
        self._write_names(group, "weight_names", names)

    def _current(self, group: Any) -> list[str]:
        """Return the names of weights as they are by now."""
        if "weight_names" in group.attrs:
            return [_text(one) for one in group.attrs["weight_names"]]
        names: list[str] = []
        number = 0
        while f"weight_names{number}" in group.attrs:
            names += [_text(one) for one in group.attrs[f"weight_names{number}"]]
            number += 1
        return names

    def _write_names(self, group: Any, name: str, names: list[str]) -> None:
        """Write the names of weights as Keras writes them."""
        import numpy as np

        for old in [one for one in group.attrs if one == name or one.removeprefix(name).isdecimal()]:
            del group.attrs[old]
        data, count = np.asarray([one.encode() for one in names]), 1
        pieces = np.array_split(data, count)
        while any(piece.nbytes > _ATTRIBUTE_LIMIT for piece in pieces):
            count += 1
            pieces = np.array_split(data, count)
        for number, piece in enumerate(pieces):
            group.attrs[name if count == 1 else f"{name}{number}"] = piece

    def _remove_names(self, model: KerasModel, removed: frozenset[str]) -> None:
        old = self.content.model
        assert old is not None
        self._check_nested_order(model)
        owners = {layer.path: owner for owner, layer in self.content.names.layers.items()}
        for path in sorted(removed):  # the same file each time
            places = [p for n, p in self.places.items() if n.rpartition(".")[0] == owners[path]]
            group = self._group(places[0])
            start = len(group.name.strip("/")) + 1
            names = [name for name in self._current(group) if name not in {p[start:] for p in places}]
            if "." not in path and not names:
                del self.file[group.name]
                continue
            for place in places:
                del self.file[place]
            self._write_names(group, "weight_names", names)
        root = self.file[self.content.root or "/"]
        listed = set(self._read_names(root, "layer_names"))
        if unknown := [name for name in sorted(listed - {one.name for one in old.layers}) if self._has_weights(name)]:
            raise RefusedError("the file lists this layer, and the configuration has it not", tensor=unknown[0])
        self._write_names(root, "layer_names", [layer.name for layer in model.layers if layer.name in listed])

    def _has_weights(self, layer: str) -> bool:
        root = f"{self.content.root}/" if self.content.root else ""
        return bool(self.content.hdf5.texts(root + layer, "weight_names"))

    def _check_nested_order(self, model: KerasModel) -> None:
        """Check that the layers that go leave the order by which the weights of nested models are loaded.

        Raises:
            RefusedError: the order of a nested model's layers changes with those that go.
        """
        assert self.content.model is not None
        after = {layer.path: layer.model for layer in model.walk() if layer.model is not None}
        for layer in self.content.model.walk():
            if layer.model is None or layer.path not in after:
                continue
            new = [one.name for one in after[layer.path].layers]
            if new != [one.name for one in layer.model.layers if one.name in set(new)]:
                raise RefusedError(
                    "folding would change the order in which Keras loads the weights of this nested model from an .h5 "
                    "file; save it as .keras and fold that, or use --layout same-keys",
                    tensor=layer.path,
                )

    def _reorder_names(self, frozen: frozenset[str]) -> None:
        """List the weights of a nested model again in Keras's order: those that train before those that do not."""
        owners = {layer.path: owner for owner, layer in self.content.names.layers.items()}
        for path in sorted(frozen):
            own = {
                name.rpartition(".")[2]: place
                for name, place in self.places.items()
                if name.rpartition(".")[0] == owners[path]
            }
            group = self._group(next(iter(own.values())))
            start = len(group.name.strip("/")) + 1
            names = self._current(group)
            affine = [own[role][start:] for role in ("weight", "bias") if role in own]
            rest = [name for name in names if name not in affine]
            at = rest.index(own["running_mean"][start:])
            if "." in path and rest[at:at] + affine != names:
                self._write_names(group, "weight_names", [*rest[:at], *affine, *rest[at:]])


def _name_bias(kernel: str) -> str:
    """Name a bias as Keras does beside a kernel; Keras 1 joins the name of the layer to it."""
    name, end = kernel.removesuffix(":0"), ":0" if kernel.endswith(":0") else ""
    number = re.fullmatch(r"(.+_)(?:W|pointwise_kernel)(_\d+)?", name)
    return f"{number[1]}b{number[2] or ''}{end}" if number else f"bias{end}"


def _text(one: Any) -> str:
    return one.decode("utf-8") if isinstance(one, bytes) else str(one)
