"""Writing a ``.caffemodel`` with what changed: new blobs, a bias more, BatchNorm and Scale layers less."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bntool.checkpoints.caffe.blob_names import find_renaming
from bntool.checkpoints.caffe.blobs import CaffeContent
from bntool.checkpoints.caffe.layers import (
    PARAMETERS,
    SHAPE,
    V1_PARAMETERS,
    Layer,
    blobs_number,
    data_field,
    messages_of,
)
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.containers.protobufs.writing import Edits, embed, integer_field, packed_integers, write_content
from bntool.checkpoints.dtypes import FLOAT16, FLOAT32, FLOAT64
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.tensors import LiteralTensor, Tensor
from bntool.errors import RefusedError
from bntool.plan import Record, RemoveEntry, RemoveModule, SetAttribute

BIASED = {
    "Convolution": "convolution_param",
    "DepthwiseConvolution": "convolution_param",
    "Deconvolution": "convolution_param",
    "InnerProduct": "inner_product_param",
}


def write_net(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write the net again; layers and fields that no edit concerns are copied.

    Raises:
        RefusedError: Caffe's format cannot hold an edit.
    """
    content = CaffeContent.of(checkpoint)
    assert content.net is not None
    edits = Edits()
    if checkpoint.edits:
        _plan(checkpoint, content, edits)
    write_content(edits.render(content.net), checkpoint.file, output.open(path))


def removed_layers(checkpoint: Checkpoint) -> frozenset[int]:
    """Return positions of the layers that edits take out: BatchNorm layers, and Scale layers paired with them."""
    content = CaffeContent.of(checkpoint)
    modules = {edit.step.module for edit in checkpoint.edits if isinstance(edit.step, RemoveModule)}
    chosen = {index for index, name in content.names.items() if name in modules}
    return frozenset(chosen | {content.scales[index] for index in chosen if index in content.scales})


def biased_layers(checkpoint: Checkpoint) -> frozenset[int]:
    """Return positions of the layers that gain a bias."""
    content = CaffeContent.of(checkpoint)
    (state_dict,) = checkpoint.state_dicts
    added = state_dict.tensors.keys() - state_dict.stored.keys()
    return frozenset(index for index, name in content.names.items() if f"{name}.bias" in added)


def _plan(checkpoint: Checkpoint, content: CaffeContent, edits: Edits) -> None:
    refused = (RemoveEntry, Record) if content.deployed is not None else (SetAttribute, RemoveEntry, Record)
    for edit in checkpoint.edits:  # what is set of a layer goes to the .prototxt, if there is one
        if isinstance(edit.step, refused):
            raise RefusedError("a .caffemodel holds layers and blobs only; freezing is a matter of its .prototxt")
    (state_dict,) = checkpoint.state_dicts
    removed = removed_layers(checkpoint)
    for name in state_dict.stored.keys() - state_dict.tensors.keys():
        if content.blobs[name].layer.index not in removed:
            raise RefusedError("a Caffe layer needs all of its blobs", tensor=name)
    _take_out(content, removed, edits)
    _set_blobs(checkpoint, content, removed, edits)


def _take_out(content: CaffeContent, removed: frozenset[int], edits: Edits) -> None:
    for index in removed:
        message = _message_of(content.wiring.layers[index])
        assert message.parent is not None
        edits.replace(message.parent[0], message.parent[1])
    renaming = find_renaming(content.wiring, removed)
    for (index, place), top in renaming.tops.items():
        message = _message_of(content.wiring.layers[index])
        edits.replace(message, message.all(4)[place], *embed(4, top.encode()))
    for (index, place), bottom in renaming.bottoms.items():
        message = _message_of(content.wiring.layers[index])
        edits.replace(message, message.all(3)[place], *embed(3, bottom.encode()))


def _set_blobs(checkpoint: Checkpoint, content: CaffeContent, removed: frozenset[int], edits: Edits) -> None:
    (state_dict,) = checkpoint.state_dicts
    source = state_dict.stored
    biased = {f"{content.names[index]}.bias": index for index in biased_layers(checkpoint)}
    statistics: set[int] = set()
    for name, tensor in state_dict.tensors.items():
        if name in biased:
            _add_bias(edits, content.wiring.layers[biased[name]], tensor)
        elif name not in source:
            raise RefusedError("Caffe has no place for this tensor", tensor=name)
        elif tensor is not source[name] and content.blobs[name].is_statistic:
            statistics.add(content.blobs[name].layer.index)
        elif tensor is not source[name]:
            blob = content.blobs[name]
            _set_data(edits, messages_of(blob.layer)[blob.position], tensor)
    for index in statistics - removed:
        _set_statistics(edits, content, index, state_dict.tensors)


def _message_of(layer: Layer) -> Message:
    assert isinstance(layer.source, Message)
    return layer.source


def _set_statistics(edits: Edits, content: CaffeContent, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Set mean and variance to the values given, with the scale factor 1."""
    layer, name = content.wiring.layers[index], content.names[index]
    mean, variance, factor = messages_of(layer)[:3]
    for blob, role in ((mean, "running_mean"), (variance, "running_var")):
        _set_data(edits, blob, tensors[f"{name}.{role}"])
    _set_data(edits, factor, LiteralTensor.from_numbers([1.0], dtype=data_field(factor)[1], shape=(1,)))


def _set_data(edits: Edits, blob: Message, tensor: Tensor) -> None:
    number, dtype = data_field(blob)
    assert tensor.dtype is dtype
    edits.set_field(blob, number, *embed(number, tensor))


def _add_bias(edits: Edits, layer: Layer, tensor: Tensor) -> None:
    message = _message_of(layer)
    if layer.type not in BIASED or len(messages_of(layer)) != 1 or len(tensor.shape) != 1:
        raise RefusedError(f"a {layer.type} layer cannot gain a bias", tensor=layer.name)
    shape = embed(SHAPE, packed_integers(1, tensor.shape))
    if tensor.dtype is FLOAT32:
        data = embed(5, tensor)
    elif tensor.dtype is FLOAT64:
        data = embed(8, tensor)
    elif tensor.dtype is FLOAT16:
        data = (integer_field(10, 2), *embed(12, tensor))
    else:
        raise RefusedError(f"Caffe has no {tensor.dtype} blobs", tensor=layer.name)
    edits.append(message, *embed(blobs_number(message), *data, *shape))
    parameter = BIASED[layer.type]
    if layer.parameters.get(f"{parameter}.bias_term") is False:
        numbers = PARAMETERS[parameter][0] if blobs_number(message) == 7 else V1_PARAMETERS[parameter]
        for holder in message.messages(numbers):
            if holder.last(2) is not None:
                edits.set_field(holder, 2, integer_field(2, 1))
