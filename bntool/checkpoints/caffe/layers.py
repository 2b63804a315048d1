"""The layers of a Caffe net: names, wiring, blobs, and the parameters that matter to BatchNorm.

Field numbers are those of BVLC's caffe.proto; NVCaffe's half precision fields beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.containers.protobufs.tensors import read_fixed
from bntool.checkpoints.dtypes import FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.tensors import (
    MAX_DIMENSIONS,
    StoredTensor,
    Tensor,
    count_elements,
    describe_shape,
    read_numbers,
)
from bntool.errors import CorruptFileError, UnsafeFileError

MAX_LAYERS = 100_000
_REMOVABLE = ("BatchNorm", "BN", "Scale")

# NetParameter
LAYERS, V1_LAYERS, INPUTS = 100, 2, 3
# BlobProto
_OLD_SHAPE, DATA, SHAPE, DOUBLE_DATA, RAW_TYPE, RAW_DATA = (1, 2, 3, 4), 5, 7, 8, 10, 12
_RAW_DTYPES = {0: FLOAT64, 1: FLOAT32, 2: FLOAT16}

# of Caffe's own: whatever else there is belongs to a fork of it
CAFFES_TYPES = """
AbsVal Accuracy ArgMax BNLL BatchNorm BatchReindex Bias Clip Concat ContrastiveLoss Convolution Crop Data Deconvolution
Dropout DummyData ELU Eltwise Embed EuclideanLoss Exp Filter Flatten HDF5Data HDF5Output HingeLoss Im2col ImageData
InfogainLoss InnerProduct Input LRN LSTM LSTMUnit Log MVN MemoryData MultinomialLogisticLoss None PReLU Parameter
Pooling Power Python RNN ReLU Recurrent Reduction Reshape SPP Scale Sigmoid SigmoidCrossEntropyLoss Silence Slice
Softmax SoftmaxWithLoss Split Swish TanH Threshold Tile WindowData
"""

# all that the enum of V1LayerParameter has
_V1_TYPES = {
    0: "None", 1: "Accuracy", 2: "BNLL", 3: "Concat", 4: "Convolution", 5: "Data", 6: "Dropout", 7: "EuclideanLoss",
    8: "Flatten", 9: "HDF5Data", 10: "HDF5Output", 11: "Im2col", 12: "ImageData", 13: "InfogainLoss",
    14: "InnerProduct", 15: "LRN", 16: "MultinomialLogisticLoss", 17: "Pooling", 18: "ReLU", 19: "Sigmoid",
    20: "Softmax", 21: "SoftmaxWithLoss", 22: "Split", 23: "TanH", 24: "WindowData", 25: "Eltwise", 26: "Power",
    27: "SigmoidCrossEntropyLoss", 28: "HingeLoss", 29: "MemoryData", 30: "ArgMax", 31: "Threshold", 32: "DummyData",
    33: "Slice", 34: "MVN", 35: "AbsVal", 36: "Silence", 37: "ContrastiveLoss", 38: "Exp", 39: "Deconvolution",
}  # fmt: skip

# of V0LayerParameter, by the names that a net of that format has for them
V0_TYPES = {
    "concat": "Concat", "conv": "Convolution", "data": "Data", "dropout": "Dropout", "flatten": "Flatten",
    "hdf5_data": "HDF5Data", "hdf5_output": "HDF5Output", "innerproduct": "InnerProduct", "lrn": "LRN",
    "pool": "Pooling", "relu": "ReLU", "sigmoid": "Sigmoid", "softmax": "Softmax", "softmax_loss": "SoftmaxWithLoss",
    "split": "Split", "tanh": "TanH",
}  # fmt: skip
_V0_LAYER = 1  # of V1LayerParameter
_BLOBS = {LAYERS: 7, V1_LAYERS: 6, _V0_LAYER: 50}  # by the field that the message of a layer is

Number = bool | int | float | str | tuple[float, ...]

# of LayerParameter: the messages of parameters by field number, with their fields
PARAMETERS: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "convolution_param": (
        106,
        {
            "num_output": 1,
            "bias_term": 2,
            "pad": 3,
            "group": 5,
            "stride": 6,
            "pad_h": 9,
            "pad_w": 10,
            "stride_h": 13,
            "stride_w": 14,
            "axis": 16,
        },
    ),
    "inner_product_param": (117, {"num_output": 1, "bias_term": 2, "axis": 5, "transpose": 6}),
    "batch_norm_param": (139, {"use_global_stats": 1, "moving_average_fraction": 2, "eps": 3}),
    "scale_param": (142, {"axis": 1, "num_axes": 2, "bias_term": 4}),
    "bias_param": (141, {"axis": 1, "num_axes": 2}),
    "concat_param": (104, {"concat_dim": 1, "axis": 2}),
    "dropout_param": (108, {"dropout_ratio": 1}),
    "eltwise_param": (110, {"operation": 1, "coeff": 2}),
    "flatten_param": (135, {"axis": 1, "end_axis": 2}),
    "pooling_param": (121, {"pool": 1, "pad": 4, "pad_h": 9, "pad_w": 10, "global_pooling": 12}),
    "power_param": (122, {"power": 1, "scale": 2, "shift": 3}),
    "shuffle_channel_param": (0, {"group": 1}),  # of forks, each with a number of its own
    "slice_param": (126, {"slice_dim": 1, "slice_point": 2, "axis": 3}),
}
V1_PARAMETERS = {
    "convolution_param": 10, "inner_product_param": 17, "concat_param": 9, "eltwise_param": 24, "pooling_param": 19,
    "power_param": 21, "slice_param": 31, "dropout_param": 12,
}  # fmt: skip
_FLOATS = ("moving_average_fraction", "eps", "power", "scale", "shift", "dropout_ratio")
_BOOLEANS = ("bias_term", "use_global_stats", "transpose", "global_pooling")
WORDS: Mapping[str, tuple[str, ...]] = {  # what numbers stand for
    "operation": ("PROD", "SUM", "MAX"),
    "pool": ("MAX", "AVE", "STOCHASTIC"),
}
LISTS = ("coeff", "slice_point")
LARGEST = ("pad", "stride")  # of several numbers, one for each dimension of space
UNKNOWN = "unknown"  # a parameter that stands for all that are not listed above, of messages where any may matter
WHOLE = ("dropout_param", "eltwise_param")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a net.

    Attributes:
        index: its position.
        name: as in the file, or made up where the file has none.
        type: Caffe's name, e.g. ``BatchNorm``.
        bottoms, tops: blobs that it reads and writes, by name.
        parameters: what is set, by message and field, e.g. ``batch_norm_param.eps``.
        shared: names under which its blobs are shared with other layers.
        source: where the layer was read from: a message or a block of text.
    """

    index: int
    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    parameters: Mapping[str, Number]
    shared: tuple[str, ...] = ()
    source: object = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Wiring:
    """The wiring of a net: which layer reads what another wrote. A blob that is written again, as in-place layers do,
    is another blob.

    Attributes:
        layers: of the net.
        producers: for each layer the layers that wrote its bottoms; None for an input of the net.
    """

    layers: tuple[Layer, ...]
    producers: tuple[tuple[int | None, ...], ...]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Wiring:
        writers: dict[str, int] = {}
        producers = []
        for layer in layers:
            producers.append(tuple(writers.get(bottom) for bottom in layer.bottoms))
            writers.update(dict.fromkeys(layer.tops, layer.index))
        return cls(tuple(layers), tuple(producers))

    @cached_property
    def readers(self) -> Mapping[int, tuple[int, ...]]:
        """The layers that read what a layer wrote; one that reads it twice is listed twice."""
        found: dict[int, list[int]] = {}
        for index, sources in enumerate(self.producers):
            for source in sources:
                if source is not None:
                    found.setdefault(source, []).append(index)
        return {index: tuple(readers) for index, readers in found.items()}

    @cached_property
    def readers_of_blobs(self) -> Mapping[tuple[int | None, str], tuple[int, ...]]:
        """The layers that read a blob, by the layer that wrote it and its name; one that reads it twice is listed
        twice.
        """
        found: dict[tuple[int | None, str], list[int]] = {}
        for layer in self.layers:
            for blob in zip(self.producers[layer.index], layer.bottoms, strict=True):
                found.setdefault(blob, []).append(layer.index)
        return {blob: tuple(readers) for blob, readers in found.items()}

    @cached_property
    def leading_to_results(self) -> frozenset[int]:
        """The layers that give a result of the net, or would if those behind them that may be removed were."""
        found: set[int] = set()
        for layer in reversed(self.layers):
            readers = self.readers.get(layer.index, ())
            if not readers or any(self.layers[one].type in _REMOVABLE and one in found for one in readers):
                found.add(layer.index)
        return frozenset(found)

    def only_reader(self, layer: Layer) -> Layer | None:
        """Return the one layer that reads the one top of a layer; None where there are more or none."""
        readers = self.readers.get(layer.index, ())
        return self.layers[readers[0]] if len(readers) == 1 and len(layer.tops) == 1 else None

    def scale_of(self, layer: Layer) -> Layer | None:
        """Return the Scale layer with parameters of its own, per channel, that alone reads a BatchNorm layer."""
        reader = self.only_reader(layer)
        if reader is None or reader.type != "Scale" or len(reader.bottoms) != 1 or len(reader.tops) != 1:
            return None
        axis, count = reader.parameters.get("scale_param.axis", 1), reader.parameters.get("scale_param.num_axes", 1)
        return reader if (axis, count) == (1, 1) else None


def read_layers(net: Message) -> tuple[Layer, ...]:
    """Return the layers of a NetParameter, of the present format or of one before (``V1LayerParameter``, and in it
    V0's).

    Raises:
        CorruptFileError, UnsafeFileError
    """
    found = net.all(LAYERS)
    if found and net.all(V1_LAYERS):
        raise CorruptFileError("it has layers of two versions of the format, layer and layers, which Caffe refuses")
    read = _read_layer if found else _read_v1_layer
    found = found or net.all(V1_LAYERS)
    if len(found) > MAX_LAYERS:
        raise UnsafeFileError(f"the net has {len(found)} layers")
    return tuple(read(index, net.message_of(one)) for index, one in enumerate(found))


def _read_layer(index: int, message: Message) -> Layer:
    parameters: dict[str, Number] = {}
    for name, (number, fields) in PARAMETERS.items():
        _read_parameters(message, name, number, fields, parameters)
    return Layer(
        index=index,
        name=message.text(1),
        type=message.text(2),
        bottoms=message.texts(3),
        tops=message.texts(4),
        parameters=parameters,
        shared=tuple(name for spec in message.messages(6) if (name := spec.text(1))),
        source=message,
    )


def _read_v1_layer(index: int, message: Message) -> Layer:
    before = message.message(_V0_LAYER)
    if before is not None:
        kind = before.text(2)
        return Layer(
            index=index,
            name=before.text(1),
            type=V0_TYPES.get(kind, f"V0 type {kind}"),
            bottoms=message.texts(2),
            tops=message.texts(3),
            parameters={},
            shared=(),
            source=before,
        )
    parameters: dict[str, Number] = {}
    for name, number in V1_PARAMETERS.items():
        _read_parameters(message, name, number, PARAMETERS[name][1], parameters)
    code = message.integer(5)
    return Layer(
        index=index,
        name=message.text(4),
        type=_V1_TYPES.get(code, f"V1 type {code}"),
        bottoms=message.texts(2),
        tops=message.texts(3),
        parameters=parameters,
        shared=tuple(name for name in message.texts(1001) if name),
        source=message,
    )


def _read_parameters(
    layer: Message, name: str, number: int, fields: Mapping[str, int], found: dict[str, Number]
) -> None:
    for message in layer.messages(number):  # parts of a singular message are merged, the last value of each field wins
        if name in WHOLE and any(one.number not in fields.values() for one in message.fields):
            found[f"{name}.{UNKNOWN}"] = True
        for key, inner in fields.items():
            if message.last(inner) is None:
                continue
            if key in _FLOATS:
                found[f"{name}.{key}"] = message.float32(inner, 0.0)
            elif key in LARGEST:  # one for each dimension of space
                found[f"{name}.{key}"] = max(message.integers(inner))
            elif key in LISTS:
                found[f"{name}.{key}"] = message.floats(inner) if key == "coeff" else message.integers(inner)
            elif key in WORDS:
                code = message.integer(inner)
                found[f"{name}.{key}"] = WORDS[key][code] if 0 <= code < len(WORDS[key]) else str(code)
            else:
                value = message.integer(inner)
                found[f"{name}.{key}"] = bool(value) if key in _BOOLEANS else value


def blobs_of(layer: Layer) -> tuple[Message | StoredTensor, ...]:
    """Return the blobs of a layer that was read from a file: BlobProtos, or datasets of an HDF5 file."""
    return layer.source if isinstance(layer.source, tuple) else messages_of(layer)


def messages_of(layer: Layer) -> tuple[Message, ...]:
    """Return the BlobProtos of a layer that was read from a ``.caffemodel``."""
    message = layer.source
    assert isinstance(message, Message)
    return tuple(message.messages(blobs_number(message)))


def blobs_number(message: Message) -> int:
    """Return the field number of the blobs of a layer: each version of the format has another one."""
    assert message.parent is not None
    return _BLOBS[message.parent[1].number]


def read_blob(blob: Message | StoredTensor, *, key: str) -> Tensor:
    """Return the elements of a blob, lazily.

    Raises:
        CorruptFileError: data and shape disagree.
    """
    if isinstance(blob, StoredTensor):
        return blob
    number, dtype = data_field(blob)
    return read_fixed(blob, number, dtype=dtype, shape=_read_shape(blob), key=key)


def data_field(blob: Message) -> tuple[int, DType]:
    """Return the field of a BlobProto that counts, of those that may hold its elements, and its dtype.

    Raises:
        CorruptFileError: the file names a type that NVCaffe does not have.
    """
    if any(one.length for one in blob.all(DOUBLE_DATA)):
        return DOUBLE_DATA, FLOAT64
    if blob.last(RAW_DATA) is not None:
        dtype = _RAW_DTYPES.get(blob.integer(RAW_TYPE))
        if dtype is None:
            raise CorruptFileError(f"unknown raw_data_type {blob.integer(RAW_TYPE)}")
        return RAW_DATA, dtype
    return DATA, FLOAT32


def _read_shape(blob: Message) -> tuple[int, ...]:
    if any(blob.last(number) is not None for number in _OLD_SHAPE):
        shape = tuple(blob.integer(number) for number in _OLD_SHAPE)
    else:
        message = blob.message(SHAPE)
        shape = message.integers(1) if message is not None else ()
    if any(extent < 0 for extent in shape) or len(shape) > MAX_DIMENSIONS:
        raise CorruptFileError(f"impossible shape {describe_shape(shape)}")
    return shape


def read_scale_factor(blob: Message | StoredTensor, *, key: str) -> float:
    """Return the third blob of a BatchNorm layer, by which the statistics are to be divided.

    Raises:
        CorruptFileError: it is not one number.
    """
    tensor = read_blob(blob, key=key)
    if count_elements(tensor.shape) != 1:
        raise CorruptFileError("the scale factor is not one number", tensor=key)
    return read_numbers(tensor)[0]
