"""Writing a ``.caffemodel.h5`` with what changed: copied whole, then edited in the copy by h5py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import IO, Any

from bntool.checkpoints.caffe.blobs import CaffeContent
from bntool.checkpoints.caffe.deployment import edit_prototxt
from bntool.checkpoints.caffe.hdf5 import CaffeHdf5, name_blobs
from bntool.checkpoints.caffe.layers import blobs_of
from bntool.checkpoints.caffe.prototxt import parse_prototxt
from bntool.checkpoints.caffe.writing import BIASED, biased_layers, removed_layers
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.hdf5 import import_h5py, named_errors
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.saving import write_checked
from bntool.checkpoints.tensors import Tensor, read_bytes
from bntool.errors import RefusedError


def copy_file(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write the file as it is: without its net, nothing is known of its blobs.

    Raises:
        RefusedError: something is to change.
    """
    if checkpoint.edits:
        raise RefusedError("what the layers of a .caffemodel.h5 are is said by its .prototxt: give it too")
    checkpoint.file.copy_to(output.open(path), offset=0, length=checkpoint.file.size)


def write_blobs(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write the file, and hold it against the checkpoint as the edited net reads it.

    Raises:
        RefusedError: the layers have no place for an edit.
    """
    write_checked(dataclasses.replace(checkpoint, format=_Checked(checkpoint)), path, output)


class _Checked(CaffeHdf5):
    """Reads back by the net that will stand beside the new file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        content = CaffeContent.of(checkpoint)
        assert content.prototxt is not None
        self._net = parse_prototxt(edit_prototxt(checkpoint, content.prototxt))

    def read(self, file: SourceFile) -> Checkpoint:
        return name_blobs(CaffeHdf5().read(file), self._net)

    def write(self, checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
        stream = output.open(path)
        checkpoint.file.copy_to(stream, offset=0, length=checkpoint.file.size)
        stream.flush()
        if checkpoint.edits:
            _edit(checkpoint, stream)


def _edit(checkpoint: Checkpoint, stream: IO[bytes]) -> None:
    content = CaffeContent.of(checkpoint)
    (state_dict,) = checkpoint.state_dicts
    removed = removed_layers(checkpoint)
    for name in state_dict.stored.keys() - state_dict.tensors.keys():
        if content.blobs[name].layer.index not in removed:
            raise RefusedError("a Caffe layer needs all of its blobs", tensor=name)
    with named_errors(), import_h5py().File(stream, "r+") as file:
        data = file["data"]
        for index in removed:
            del data[content.names[index]]
        for index in _set_tensors(content, state_dict, data) - removed:
            name = content.names[index]  # mean and variance as they are, with the scale factor 1
            for position, role in enumerate(("running_mean", "running_var")):
                _set_elements(data[f"{name}/{position}"], state_dict.tensors[f"{name}.{role}"])
            data[f"{name}/2"][...] = 1.0
        for index in biased_layers(checkpoint):
            _add_bias(content, index, state_dict, data)


def _set_tensors(content: CaffeContent, state_dict: StateDict, data: Any) -> set[int]:
    """Write what changed; the positions of the layers whose statistics did."""
    statistics = set()
    for name, tensor in state_dict.tensors.items():
        if name not in state_dict.stored or tensor is state_dict.stored[name]:
            continue
        blob = content.blobs[name]
        if blob.is_statistic:
            statistics.add(blob.layer.index)
        else:
            _set_elements(data[f"{content.names[blob.layer.index]}/{blob.position}"], tensor)
    return statistics


def _add_bias(content: CaffeContent, index: int, state_dict: StateDict, data: Any) -> None:
    layer, name = content.wiring.layers[index], content.names[index]
    if layer.type not in BIASED or len(blobs_of(layer)) != 1:
        raise RefusedError(f"a {layer.type} layer cannot gain a bias", tensor=name)
    group = data[name]
    group.create_dataset("1", data=_array(state_dict.tensors[f"{name}.bias"], group["0"].dtype))


def _set_elements(dataset: Any, tensor: Tensor) -> None:
    dataset[...] = _array(tensor, dataset.dtype).reshape(dataset.shape)


def _array(tensor: Tensor, dtype: Any) -> Any:
    import numpy as np

    return np.frombuffer(read_bytes(tensor), dtype=dtype.newbyteorder("<")).astype(dtype)
