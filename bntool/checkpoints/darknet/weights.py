"""``.weights`` of Darknet: numbers one after the other, whose layers the ``.cfg`` of the same name beside them says.

The order is that of ``load_convolutional_weights`` and its neighbours in Darknet's parser.c: biases, then scales, means
and variances of a BatchNorm, then kernels. Layers are counted from zero behind ``[net]``, as there.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Format, LoadingCode, ModuleInfo, StateDict
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.tensors import Storage, StoredTensor, contiguous_strides
from bntool.errors import CorruptFileError, UnknownFormatError, UnsafeFileError

_ENDING, _BESIDE = ".weights", ".cfg"
_HEADER = struct.Struct("<iii")  # major, minor, revision; then how many images were seen
_FLOAT32 = BY_NAME["float32"]
MAX_CFG = 1 << 20
MAX_LAYERS = 10_000
_LARGEST = 1 << 24  # of a number in a .cfg
_WITHOUT_WEIGHTS = ("yolo", "region", "detection", "dropout", "softmax", "cost", "activation", "gaussian_yolo")
_BATCH_NORM = ModuleInfo("darknet.batchnorm", {})


class Darknet(Format):
    """Weights of Darknet; they are only read."""

    name = "darknet"
    title = "Darknet (.weights)"
    has_records = False
    is_pytorch = False
    loading = LoadingCode(("import cv2", "network = cv2.dnn.readNet({path}, CFG)"))
    read_only = (
        "a .weights of Darknet is run by its .cfg, and some versions add eps to the standard deviation, others to the "
        "variance: bntool inspects and compares it; another program has to make a file of PyTorch or ONNX of it first"
    )

    def recognises(self, path: Location, head: bytes) -> bool:
        return path.name.endswith(_ENDING) and len(head) > _HEADER.size

    def read(self, file: SourceFile) -> Checkpoint:
        beside = file.path.name.removesuffix(_ENDING) + _BESIDE
        cfg = file.folder.find(beside)
        if cfg is None:
            raise UnknownFormatError(
                f"weights of Darknet are numbers without names, whose layers a .cfg says: put {quote(beside)} beside it"
            )
        with cfg:
            if cfg.size > MAX_CFG:
                raise UnsafeFileError(f"{quote(beside)} has {cfg.size} bytes")
            sections = _read_sections(cfg.read(0, cfg.size).decode("utf-8", "replace"))
        major, minor, _ = _HEADER.unpack(file.read(0, _HEADER.size))
        wide = major * 10 + minor >= 2 and major < 1000 and minor < 1000
        network = _Network(file, position=_HEADER.size + (8 if wide else 4), is_transposed=major > 1000 or minor > 1000)
        network.read(sections)
        if network.position != file.size:
            raise CorruptFileError(
                f"{quote(beside)} describes weights that end at byte {network.position}, and the file has {file.size} "
                "bytes: it is of another network, has options that are not known here, or the file is damaged"
            )
        state_dict = StateDict("", "", network.tensors, modules=network.modules)
        return Checkpoint(file, self, (state_dict,) if network.tensors else ())

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:  # noqa: ARG002 (of all alike)
        return ("numbers, named by the .cfg beside them",)


@dataclass(frozen=True)
class _Section:
    """One section of a ``.cfg``."""

    kind: str
    options: Mapping[str, str]

    def number(self, key: str, default: int) -> int:
        text = self.options.get(key)
        try:
            value = default if text is None else int(text)
        except ValueError:
            raise CorruptFileError(f"the .cfg says {key}={quote(text or '')}, which is no number") from None
        if abs(value) > _LARGEST:
            raise UnsafeFileError(f"the .cfg says {key}={value}")
        return value

    def numbers(self, key: str) -> list[int]:
        try:
            return [int(text) for text in self.options.get(key, "").split(",") if text.strip()]
        except ValueError:
            raise CorruptFileError(f"the .cfg says {key}={quote(self.options[key])}, which are no numbers") from None


def _read_sections(text: str) -> list[_Section]:
    sections: list[tuple[str, dict[str, str]]] = []
    for full in text.splitlines():
        line = full.partition("#")[0].partition(";")[0].strip()
        if line.startswith("["):
            sections.append((line.strip("[]").strip().lower(), {}))
        elif "=" in line:
            if not sections:
                raise CorruptFileError("the .cfg does not begin with a section")
            key, _, value = line.partition("=")
            sections[-1][1][key.strip()] = value.strip()
    if not sections or sections[0][0] not in ("net", "network"):
        raise CorruptFileError("the .cfg does not begin with [net]")
    if len(sections) > MAX_LAYERS:
        raise UnsafeFileError(f"the .cfg has {len(sections)} sections")
    return [_Section(kind, options) for kind, options in sections]


Shape = tuple[int, int, int]  # channels, height, width of what a layer gives


@dataclass
class _Network:
    """The layers so far, and where the weights of the next begin.

    Attributes:
        is_transposed: kernels of linear layers are kept by inputs, as old files say by their version.
    """

    file: SourceFile
    position: int
    is_transposed: bool
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    modules: dict[str, ModuleInfo] = field(default_factory=dict)
    given: list[Shape] = field(default_factory=list)

    def read(self, sections: Sequence[_Section]) -> None:
        net = sections[0]
        shape = (net.number("channels", 3), net.number("height", 0), net.number("width", 0))
        layers: Mapping[str, Callable[[int, _Section, Shape], Shape]] = {
            "convolutional": self._convolutional,
            "conv": self._convolutional,
            "connected": self._connected,
            "batchnorm": self._batchnorm,
            "maxpool": self._maxpool,
            "avgpool": lambda _, __, read: (read[0], 1, 1),
            "route": self._route,
            "shortcut": self._shortcut,
            "upsample": self._upsample,
            "reorg": self._reorg,
            **dict.fromkeys(_WITHOUT_WEIGHTS, lambda _, __, read: read),
        }
        for number, section in enumerate(sections[1:]):
            if section.kind not in layers:
                raise CorruptFileError(
                    f"layer {number} of the .cfg is a [{section.kind}], whose weights are not known here",
                    remedy="convert the file with a program that knows them",
                )
            shape = layers[section.kind](number, section, shape)
            self.given.append(shape)

    def _take(self, name: str, *shape: int, is_transposed: bool = False) -> None:
        if min(shape) < 1:
            raise CorruptFileError(f"the .cfg gives {name} the shape {shape}")
        nbytes = 4 * math.prod(shape)
        if self.position + nbytes > self.file.size:
            raise CorruptFileError(
                f"the .cfg describes more weights than the file has: {name} ends at byte {self.position + nbytes} of "
                f"{self.file.size}"
            )
        storage = Storage(self.file, self.position, nbytes, key=str(self.position))
        strides = contiguous_strides(shape[::-1])[::-1] if is_transposed else contiguous_strides(shape)
        self.tensors[name] = StoredTensor(_FLOAT32, shape, strides, 0, storage)
        self.position += nbytes

    def _take_statistics(self, norm: str, channels: int) -> None:
        for role in ("weight", "running_mean", "running_var"):
            self._take(f"{norm}.{role}", channels)
        self.modules[norm] = _BATCH_NORM

    def _shortcut(self, number: int, section: _Section, read: Shape) -> Shape:
        self._refuse(number, section, "weights_type")
        return read

    def _refuse(self, number: int, section: _Section, *options: str) -> None:
        """Refuse options under which the weights are kept in another way."""
        for option in options:
            if section.options.get(option, "0") not in ("0", "none"):
                raise CorruptFileError(
                    f"layer {number} of the .cfg has {option}={quote(section.options[option])}, whose weights are not "
                    "known here",
                    remedy="convert the file with a program that knows them",
                )

    def _convolutional(self, number: int, section: _Section, read: Shape) -> Shape:
        self._refuse(number, section, "flipped", "antialiasing")
        channels, height, width = read
        filters, groups = section.number("filters", 1), section.number("groups", 1)
        size, stride = section.number("size", 1), section.number("stride", 1)
        if groups < 1 or stride < 1 or channels % groups:
            raise CorruptFileError(f"layer {number} of the .cfg has {groups} groups of {channels} channels")
        if "share_index" not in section.options:
            if section.number("batch_normalize", 0):
                self._take(f"{number}.bn.bias", filters)
                self._take_statistics(f"{number}.bn", filters)
            else:
                self._take(f"{number}.conv.bias", filters)
            self._take(f"{number}.conv.weight", filters, channels // groups, size, size)
        padding = size // 2 if section.number("pad", 0) else section.number("padding", 0)
        return filters, (height + 2 * padding - size) // stride + 1, (width + 2 * padding - size) // stride + 1

    def _connected(self, number: int, section: _Section, read: Shape) -> Shape:
        outputs, has_norm = section.number("output", 1), bool(section.number("batch_normalize", 0))
        self._take(f"{number}.bn.bias" if has_norm else f"{number}.linear.bias", outputs)
        self._take(f"{number}.linear.weight", outputs, math.prod(read), is_transposed=self.is_transposed)
        if has_norm:
            self._take_statistics(f"{number}.bn", outputs)
        return outputs, 1, 1

    def _batchnorm(self, number: int, section: _Section, read: Shape) -> Shape:  # noqa: ARG002 (as all)
        self._take_statistics(f"{number}.bn", read[0])
        return read

    def _maxpool(self, number: int, section: _Section, read: Shape) -> Shape:
        stride = section.number("stride", 1)
        size = section.number("size", stride)
        padding = section.number("padding", size - 1)
        if stride < 1:
            raise CorruptFileError(f"layer {number} of the .cfg has the stride {stride}")
        return read[0], (read[1] + padding - size) // stride + 1, (read[2] + padding - size) // stride + 1

    def _upsample(self, number: int, section: _Section, read: Shape) -> Shape:  # noqa: ARG002 (as all)
        stride = section.number("stride", 2)
        return read[0], read[1] * stride, read[2] * stride

    def _reorg(self, number: int, section: _Section, read: Shape) -> Shape:
        stride = section.number("stride", 1)
        if stride < 1:
            raise CorruptFileError(f"layer {number} of the .cfg has the stride {stride}")
        return read[0] * stride * stride, read[1] // stride, read[2] // stride

    def _route(self, number: int, section: _Section, read: Shape) -> Shape:  # noqa: ARG002 (as all)
        groups = section.number("groups", 1)
        places = [place if place >= 0 else number + place for place in section.numbers("layers")]
        if not places or groups < 1 or not all(0 <= place < number for place in places):
            raise CorruptFileError(f"layer {number} of the .cfg reads layers that do not come before it")
        _, height, width = self.given[places[0]]
        return sum(self.given[place][0] // groups for place in places), height, width
