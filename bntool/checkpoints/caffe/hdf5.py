"""Caffe's ``.caffemodel.h5``: blobs by layer and number; what the layers are only the ``.prototxt`` says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bntool.checkpoints.caffe.prototxt import Prototxt
from bntool.checkpoints.checkpoint import Checkpoint, Format, Loader, LoadingCode, StateDict
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.tensors import StoredTensor
from bntool.errors import OtherFormatError


class CaffeHdf5(Format):
    """A ``.caffemodel.h5``: blobs by the names of their layers."""

    name = "caffe-hdf5"
    title = "Caffe (.caffemodel.h5)"
    is_pytorch = False
    has_records = False  # Caffe's own files have no place for notes, and those of one net should be alike
    writer = "caffe.hdf5_writing:copy_file"
    loader = Loader.CAFFE
    loading = LoadingCode(("import caffe", "net = caffe.Net({description}, {path}, caffe.TEST)"))
    graph_reader = "bntool.graphs.stored.caffe:caffe_graph"
    needs_prototxt = True
    described_by = ".prototxt"

    def read(self, file: SourceFile) -> Checkpoint:
        from bntool.checkpoints.caffe.trust import judge_net_beside

        tensors = {".".join(key): tensor for key, tensor in read_blobs(file).items()}
        state_dict = StateDict("", "", tensors)
        return Checkpoint(file, self, (state_dict,) if tensors else (), globals=tuple(judge_net_beside(file)))

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:
        return ("blobs only: --prototxt says of which layers",) if checkpoint.content is None else ()


class DeployedCaffeHdf5(CaffeHdf5):
    """The same with the net that says what its blobs are; it reads back what it writes by itself."""

    writer = "caffe.hdf5_writing:write_blobs"
    single_file = False


def read_blobs(file: SourceFile) -> dict[tuple[str, str], StoredTensor]:
    """Return the datasets under ``data``, by layer and number, in order.

    Raises:
        CorruptFileError, UnsafeFileError, MissingExtraError
        OtherFormatError: it is another HDF5 file.
    """
    from bntool.checkpoints.containers.hdf5 import read_hdf5  # a start-up without HDF5 files needs none of it

    found = read_hdf5(file)
    blobs: dict[tuple[str, str], StoredTensor] = {}
    for path, tensor in found.datasets.items():
        layer, _, number = path.removeprefix("data/").rpartition("/")
        if path.startswith("data/") and layer and number.isdecimal():
            blobs[layer, number] = tensor
    if not blobs:
        raise OtherFormatError("it holds no blobs of layers")
    return {key: blobs[key] for key in sorted(blobs, key=lambda key: (key[0], int(key[1])))}


def name_blobs(checkpoint: Checkpoint, prototxt: Prototxt) -> Checkpoint:
    """Return the checkpoint with the layers that a ``.prototxt`` describes, in its order.

    Raises:
        CorruptFileError: a layer has other blobs than its type.
    """
    from bntool.checkpoints.caffe.blobs import NetReading

    blobs: dict[str, list[StoredTensor]] = {}
    for (layer, _), tensor in read_blobs(checkpoint.file).items():
        blobs.setdefault(layer, []).append(tensor)
    layers = [dataclasses.replace(layer, source=tuple(blobs.get(layer.name, ()))) for layer in prototxt.layers]
    reading = NetReading(layers)
    state_dict = StateDict("", "", reading.tensors, modules=reading.modules)
    return dataclasses.replace(
        checkpoint,
        format=DeployedCaffeHdf5(),
        state_dicts=(state_dict,) if reading.tensors else (),
        content=dataclasses.replace(reading.content(), prototxt=prototxt),
        not_understood=tuple(reading.find_not_understood()),
    )
