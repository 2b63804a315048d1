"""The blobs of a Caffe net under PyTorch's names.

What Caffe calls BatchNorm only normalises; the Scale layer that reads it holds what PyTorch calls its weight and bias.
The running sums of mean and variance are divided by the scale factor beside them, as Caffe does when it runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bntool.batchnorm import DEFAULT_EPS, STATISTICS, VECTORS
from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.caffe.layers import (
    CAFFES_TYPES,
    Layer,
    Wiring,
    blobs_of,
    read_blob,
    read_scale_factor,
)
from bntool.checkpoints.caffe.prototxt import Prototxt
from bntool.checkpoints.checkpoint import Content, ModuleInfo, NotUnderstood
from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.checkpoints.dtypes import DType, decode_numbers, encode_numbers
from bntool.checkpoints.files import quote
from bntool.checkpoints.tensors import StoredTensor, Tensor, contiguous_strides, count_elements
from bntool.errors import CorruptFileError

_FEWEST_VECTORS = 2
_FOLDED = "BN"  # of forks, with scale and shift alone
_NORMS = re.compile(r"(?i)batch_?norm|(?-i:BN)")
_OTHER_NORMS = re.compile(r"(?i)(group|layer|instance|l2|rms)_?norm")

_FRACTION = 0.999  # the default of moving_average_fraction

# what the blobs of a layer are in PyTorch's words
_ROLES: Mapping[str, tuple[str, ...]] = {
    "Convolution": ("weight", "bias"),
    "DepthwiseConvolution": ("weight", "bias"),
    "Deconvolution": ("weight", "bias"),
    "InnerProduct": ("weight", "bias"),
    "Embed": ("weight", "bias"),
    "Scale": ("weight", "bias"),
    "PReLU": ("weight",),
    "Bias": ("bias",),
}


@dataclass(frozen=True, slots=True)
class MultipliedTensor(AsArray):
    """A small tensor times a number, in float64, rounded once to its dtype, computed when it is read."""

    source: Tensor
    factor: float

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def chunks(self) -> Iterator[bytes]:
        """See :class:`~bntool.checkpoints.tensors.Tensor`.

        Raises:
            CorruptFileError: a product is too large for the dtype.
        """
        rest = b""
        for chunk in self.source.chunks():
            data = rest + chunk
            whole = len(data) - len(data) % self.dtype.itemsize
            numbers = [number * self.factor for number in decode_numbers(data[:whole], self.dtype)]
            try:
                yield encode_numbers(numbers, self.dtype)
            except OverflowError as error:
                raise CorruptFileError(f"statistics divided by the scale factor are too large: {error}") from error
            rest = data[whole:]


@dataclass(frozen=True, slots=True)
class Blob:
    """The place of a tensor of the state dict.

    Attributes:
        layer: that holds it.
        position: among the blobs of the layer.
        is_statistic: divided by the scale factor of the layer.
    """

    layer: Layer
    position: int
    is_statistic: bool = False


@dataclass(frozen=True)
class CaffeContent(Content):
    """A net as it was read.

    Attributes:
        net: the whole message; None in HDF5 files.
        wiring: of the net in the file.
        names: of the layers in the state dict, by position.
        blobs: where each tensor lies.
        scales: the Scale layer of each BatchNorm layer that has one, by position.
        scale_factors: of each BatchNorm layer, by position.
        deployed: of the net in a ``.prototxt``, where one was given.
        prototxt: that an HDF5 file was read by.
    """

    net: Message | None = field(repr=False)
    wiring: Wiring
    names: Mapping[int, str]
    blobs: Mapping[str, Blob]
    scales: Mapping[int, int]
    scale_factors: Mapping[int, float]
    deployed: Wiring | None = None
    prototxt: Prototxt | None = field(default=None, repr=False)


class NetReading:
    """Gives every blob its name."""

    def __init__(self, layers: Sequence[Layer], net: Message | None = None) -> None:
        self.net = net
        self.wiring = Wiring.of(layers)
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, ModuleInfo] = {}
        self._blobs: dict[str, Blob] = {}
        self._scales: dict[int, int] = {}
        self._factors: dict[int, float] = {}
        self._names: dict[int, str] = {}
        taken: set[str] = set()
        for layer in self.wiring.layers:
            name = unused_name(layer.name or f"{layer.type}_{layer.index}", taken)
            taken.add(name)
            self._names[layer.index] = name
        for layer in self.wiring.layers:
            self._read_layer(layer)

    def find_not_understood(self) -> Iterator[NotUnderstood]:
        """Yield the layers that may be BatchNorms of a fork of Caffe, by their blobs or by the name of their type.

        A BatchNorm has two vectors of one length at least; of a type that is not Caffe's own no more is known.
        """
        for layer in self.wiring.layers:
            name, is_caffes = self._names[layer.index], layer.type in CAFFES_TYPES.split()
            is_read = f"{name}.{STATISTICS[0]}" in self.tensors or layer.type == _FOLDED
            if is_read or (is_caffes and layer.type != "BatchNorm") or _OTHER_NORMS.search(layer.type):
                continue
            vectors = [length for blob in blobs_of(layer) if (length := _length_of_vector(blob)) > 1]
            length, count = next(iter(Counter(vectors).most_common(1)), (0, 0))
            if count < _FEWEST_VECTORS and not (blobs_of(layer) and _NORMS.search(layer.type)):
                continue
            held = f"{count} vectors of {length} elements" if count > 1 else "tensors"
            whose = "with other blobs than Caffe's" if is_caffes else "which is none of Caffe's own"
            yield NotUnderstood(name, f"a layer of type {quote(layer.type)}, {whose}, has {held}")

    def content(self) -> CaffeContent:
        return CaffeContent(self.net, self.wiring, self._names, self._blobs, self._scales, self._factors)

    def _read_layer(self, layer: Layer) -> None:
        blobs = blobs_of(layer)
        name = self._names[layer.index]
        if not blobs or layer.index in self._scales.values():
            return
        attributes: dict[str, object] = {}
        if layer.type == "BatchNorm" and len(blobs) in (3, 5):
            attributes = self._read_batchnorm(layer, blobs)
        else:
            roles = VECTORS if layer.type == "BN" else _ROLES.get(layer.type, ())
            for position, blob in enumerate(blobs):
                role = roles[position] if len(blobs) <= len(roles) else f"blobs.{position}"
                self._add(f"{name}.{role}", blob, Blob(layer, position))
        self.modules[name] = ModuleInfo(f"caffe.{layer.type}", attributes)

    def _read_batchnorm(self, layer: Layer, blobs: Sequence[Message | StoredTensor]) -> dict[str, object]:
        """Read the three blobs of BVLC's layer, or the five of NVCaffe's, which has weight and bias in the layer
        itself.
        """
        name = self._names[layer.index]
        key = f"{name}.scale_factor"
        factor = read_scale_factor(blobs[2], key=key)
        self._factors[layer.index] = factor
        scale = self.wiring.scale_of(layer) if len(blobs) == 3 else None
        attributes: dict[str, object] = {
            "eps": layer.parameters.get("batch_norm_param.eps", DEFAULT_EPS),
            "momentum": momentum_of(layer),
            "scale_factor": factor,
        }
        if "batch_norm_param.use_global_stats" in layer.parameters:
            attributes["use_global_stats"] = layer.parameters["batch_norm_param.use_global_stats"]
        if len(blobs) == 5:
            self._add(f"{name}.weight", blobs[3], Blob(layer, 3))
            self._add(f"{name}.bias", blobs[4], Blob(layer, 4))
        elif scale is not None and self._fits(blobs_of(scale), blobs[0]):
            for position, blob in enumerate(blobs_of(scale)):
                self._add(f"{name}.{('weight', 'bias')[position]}", blob, Blob(scale, position))
            self._scales[layer.index] = scale.index
            attributes["scale_layer"] = self._names[scale.index]
        for position, role in enumerate(STATISTICS):
            self._add(f"{name}.{role}", blobs[position], Blob(layer, position, is_statistic=True))
        first, second = (count_elements(self.tensors[f"{name}.{role}"].shape) for role in STATISTICS)
        if first != second:
            raise CorruptFileError(f"{first} means do not go with {second} variances", tensor=name)
        return attributes

    def _fits(self, blobs: Sequence[Message | StoredTensor], mean: Message | StoredTensor) -> bool:
        wanted = count_elements(read_blob(mean, key="").shape)
        return len(blobs) in (1, 2) and all(count_elements(read_blob(b, key="").shape) == wanted for b in blobs)

    def _add(self, name: str, message: Message | StoredTensor, blob: Blob) -> None:
        try:
            tensor = _in_pytorch_shape(read_blob(message, key=name), name, blob.layer.type)
        except CorruptFileError as error:
            error.tensor = error.tensor or name
            raise
        factor = self._factors.get(blob.layer.index, 1.0) if blob.is_statistic else 1.0
        if factor != 1.0:
            tensor = MultipliedTensor(tensor, 0.0 if factor == 0 else 1.0 / factor)
        if name in self.tensors:
            raise CorruptFileError("two blobs have this name", tensor=name)
        self.tensors[name] = tensor
        self._blobs[name] = blob


def _length_of_vector(blob: Message | StoredTensor) -> int:
    """Return how many elements a blob with one axis longer than 1 has; 0 for any other."""
    shape = [size for size in read_blob(blob, key="").shape if size != 1]
    return shape[0] if len(shape) == 1 else 0


def momentum_of(layer: Layer) -> float:
    """Return the share of the new batch in the running average; Caffe's fraction is what is kept."""
    fraction = layer.parameters.get("batch_norm_param.moving_average_fraction", _FRACTION)
    return round(1.0 - float(fraction), 12)  # type: ignore[arg-type]  # only some parameters are lists


def _in_pytorch_shape(tensor: Tensor, name: str, layer_type: str) -> Tensor:
    """Return a tensor in PyTorch's shape: old files store vectors as (1, 1, 1, C) and matrices as (1, 1, N, K)."""
    shape = tensor.shape
    leaf = name.rpartition(".")[2]
    if len(shape) == 4 and shape[:3] == (1, 1, 1) and (leaf != "weight" or shape[3] != 1):
        shape = shape[3:]
    elif layer_type == "InnerProduct" and leaf == "weight" and len(shape) == 4 and shape[:2] == (1, 1):
        shape = shape[2:]
    elif leaf in ("bias", *STATISTICS):
        shape = (count_elements(shape),)
    if shape == tensor.shape:
        return tensor
    if isinstance(tensor, StoredTensor):
        return dataclasses.replace(tensor, shape=shape, strides=contiguous_strides(shape))
    return dataclasses.replace(tensor, shape=shape)  # type: ignore[type-var]  # GatheredTensor is a dataclass too
