"""One normalisation layer as a value."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from bntool.errors import UsageError
from bntool.names import join_name
from bntool.representation import html_repr, list_first

DEFAULT_EPS = 1e-5  # of torch.nn.BatchNorm*; a file that holds only tensors cannot tell whether it was changed


class NormKind(Enum):
    """The kind of normalisation of a layer, as far as its tensors (or its class) tell."""

    BATCH_NORM = "BatchNorm"
    FROZEN_BATCH_NORM = "FrozenBatchNorm"
    LAYER_OR_GROUP_NORM = "LayerNorm/GroupNorm"
    NORM_WITHOUT_STATISTICS = "norm without statistics"
    INSTANCE_NORM = "InstanceNorm"
    QUANTIZED_BATCH_NORM = "quantized BatchNorm"
    FUSED_CONV_BATCH_NORM = "quantization-aware ConvBn"
    SWITCH_NORM = "SwitchNorm"
    BATCH_RENORM = "BatchRenorm"
    EVO_NORM = "EvoNorm"
    FILTER_RESPONSE_NORM = "FilterResponseNorm"
    GRAPH_NORM = "GraphNorm"
    HETERO_BATCH_NORM = "HeteroBatchNorm"
    GHOST_BATCH_NORM = "GhostBatchNorm"

    @property
    def is_batch_norm(self) -> bool:
        """Whether it normalises by stored statistics per channel, as BatchNorm does in eval mode."""
        return self in (NormKind.BATCH_NORM, NormKind.FROZEN_BATCH_NORM)


# by a part of the class's name, the first that fits; of PyTorch, its libraries, and forks of Caffe
_CLASS_KINDS = (
    ("InstanceNorm", NormKind.INSTANCE_NORM),
    ("FrozenBatchNorm", NormKind.FROZEN_BATCH_NORM),
    ("FrozenBN", NormKind.FROZEN_BATCH_NORM),
    ("LayerNorm", NormKind.LAYER_OR_GROUP_NORM),
    ("GroupNorm", NormKind.LAYER_OR_GROUP_NORM),
    ("Renorm", NormKind.BATCH_RENORM),
    ("ReNorm", NormKind.BATCH_RENORM),
    ("Switchable", NormKind.SWITCH_NORM),
    ("Ghost", NormKind.GHOST_BATCH_NORM),
    ("Virtual", NormKind.GHOST_BATCH_NORM),
    ("BatchNorm", NormKind.BATCH_NORM),
    ("SyncBN", NormKind.BATCH_NORM),
    ("InplaceAbn", NormKind.BATCH_NORM),
    ("InPlaceABN", NormKind.BATCH_NORM),
)
FUSED_ACTIVATION_CLASSES = ("InplaceAbn", "InPlaceABN")  # their normalisation is in a function that is not torch's


def takes_magnitude(class_path: str) -> bool:
    """Return whether layers of a class scale by (abs(weight) + eps) / sqrt(running_var + eps), as inplace_abn does."""
    return class_path.rpartition(".")[2].startswith(FUSED_ACTIVATION_CLASSES)


def find_class_kind(name: str) -> NormKind | None:
    """Return the kind of normalisation of a class, by its name without modules; None for a class that is not known."""
    if name == "BN":  # of forks of Caffe
        return NormKind.BATCH_NORM
    return next((kind for part, kind in _CLASS_KINDS if part in name), None)


class EpsSource(Enum):
    """The source of an eps. A state dict never holds one."""

    MODULE = "module"
    PROTOTXT = "prototxt"  # that a Caffe model is run by
    ARCHITECTURE = "architecture"
    DEFAULT = "default"
    UNKNOWN = "unknown"


# the tensors of a BatchNorm, in the order of its state_dict()
AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")
VECTORS = (*AFFINE, *STATISTICS)  # one element for each channel; ONNX and torch.export list them in this order
COUNTER = "num_batches_tracked"  # of the batches that the statistics are an average of
BUFFERS = (*STATISTICS, COUNTER)
ROLES = (*AFFINE, *BUFFERS)


class LayerArrays(ABC):
    """The tensors of a layer as numpy arrays, each read when it is asked for."""

    @abstractmethod
    def read(self, role: str) -> Any:
        """Return the tensor of that role; None where the layer has none."""

    @property
    def weight(self) -> Any:
        """See :meth:`read`."""
        return self.read("weight")

    @property
    def bias(self) -> Any:
        """See :meth:`read`."""
        return self.read("bias")

    @property
    def running_mean(self) -> Any:
        """See :meth:`read`."""
        return self.read("running_mean")

    @property
    def running_var(self) -> Any:
        """See :meth:`read`."""
        return self.read("running_var")


@dataclass(frozen=True, repr=False)
class BatchNorm(LayerArrays):
    """One normalisation layer.

    Attributes:
        name: dotted module path, without the prefix of wrappers.
        kind: what it is.
        num_features: number of channels; None where nothing tells.
        tensors: what is present and not read yet, by role (``weight``, ``bias``, ``running_mean``, ``running_var``,
            ``num_batches_tracked``, and whatever else lies beside them).
        eps: None where it is not known.
        eps_source: where it is known from.
        momentum: share of the new batch in the running average, PyTorch's meaning; None where it is not known.
        class_path: class of the module where the file holds it.
        attributes: what else the file says of the module.
        version: version of the module in ``_metadata``.
        computed: roles that the model computes from tensors which stand in their place (pruning's ``weight_orig`` and
            ``weight_mask``, parametrizations), with the names of these.
    """

    name: str
    kind: NormKind
    num_features: int | None
    tensors: Mapping[str, Any]
    eps: float | None = None
    eps_source: EpsSource = EpsSource.UNKNOWN
    momentum: float | None = None
    class_path: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    version: int | None = None
    computed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    _repr_html_ = html_repr

    def __repr__(self) -> str:
        channels = "? channels" if self.num_features is None else f"{self.num_features} channels"
        eps = "eps unknown" if self.eps is None else f"eps={self.eps:g} ({self.eps_source.value})"
        return f"<{self.kind.value} {self.name!r}: {channels}, {eps}, {', '.join(self.tensors)}>"

    def name_of(self, role: str) -> str:
        """Return the name of a tensor of the layer, without the prefix of wrappers."""
        return join_name(self.name, role)

    @property
    def affine(self) -> bool:
        return "weight" in self.tensors

    @property
    def training(self) -> bool | None:
        """Its mode; None where nothing tells."""
        return self._switch("training")

    @property
    def track_running_stats(self) -> bool | None:
        """None where nothing tells."""
        return self._switch("track_running_stats")

    def _switch(self, name: str) -> bool | None:
        value = self.attributes.get(name)
        return value if isinstance(value, bool) else None

    def read(self, role: str) -> Any:
        """Return a tensor as a numpy array, read now; None where it has none. bfloat16 comes as float32, exactly.

        Raises:
            ValueError: the file holds no plain elements for it.
            CorruptFileError, UnreadableFileError: it cannot be read, or the file is closed.
        """
        tensor = self.tensors.get(role)
        return None if tensor is None else tensor.numpy()

    @property
    def num_batches_tracked(self) -> Any:
        """See :meth:`read`."""
        return self.read(COUNTER)

    @property
    def has_statistics(self) -> bool:
        return all(role in self.tensors for role in STATISTICS)


def scale_and_shift(
    *,
    running_mean: Sequence[float],
    running_var: Sequence[float],
    eps: float,
    weight: Sequence[float] | None = None,
    bias: Sequence[float] | None = None,
) -> tuple[list[float], list[float]]:
    """Compute what a BatchNorm does to each channel in eval mode: y = scale * x + shift, in float64.

    scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale (Ioffe and Szegedy 2015, algorithm 2,
    steps 10 and 11). Without ``weight`` it counts as ones, without ``bias`` as zeros.

    Raises:
        ValueError: a value is not finite, or running_var + eps is not positive.
    """
    channels = len(running_var)
    weights = [1.0] * channels if weight is None else weight
    biases = [0.0] * channels if bias is None else bias
    for vector in (running_mean, running_var, weights, biases):
        if not all(map(math.isfinite, vector)):
            channel = next(index for index, value in enumerate(vector) if not math.isfinite(value))
            raise ValueError(f"channel {channel} holds a value that is not finite")
    sums = [variance + eps for variance in running_var]
    if min(sums, default=1.0) <= 0:
        channel = next(index for index, value in enumerate(sums) if value <= 0)
        raise ValueError(f"channel {channel}: running_var + eps = {sums[channel]} is not positive")
    scales = [w / root for w, root in zip(weights, map(math.sqrt, sums), strict=True)]
    shifts = [b - mean * scale for b, mean, scale in zip(biases, running_mean, scales, strict=True)]
    return scales, shifts


def selects(globs: Sequence[str], name: str) -> bool:
    """Return whether a layer is selected: by any of the globs, or by there being none; a text alone is one glob.

    A glob that is the name of a layer letter by letter selects it, also where the name holds brackets.
    """
    globs = (globs,) if isinstance(globs, str) else globs
    return not globs or any(_matches(name, glob) for glob in globs)


def _matches(name: str, glob: str) -> bool:
    return name == glob or fnmatchcase(name, glob)


_SHOWN = 6  # layers that a sentence names


def check_globs(globs: Sequence[str], names: Sequence[str]) -> None:
    """Check that each glob selects a layer; where there are no layers nothing is checked.

    Args:
        names: of all layers that could be selected.

    Raises:
        UsageError: a glob selects none of them; the message says what was probably meant, and what there is.
    """
    for glob in (globs,) if isinstance(globs, str) else globs:
        if names and not any(_matches(name, glob) for name in names):
            meant = _guess(glob, names)
            hint = f"; {meant!r} would select {sum(_matches(n, meant) for n in names)} of them" if meant else ""
            listed = list_first(names, _SHOWN)
            raise UsageError(
                f"--layers {glob!r} selects none of the {len(names)} BatchNorm layers{hint}; there are: {listed}"
            )


def _guess(glob: str, names: Sequence[str]) -> str:
    """Find a glob that selects something and is near the one given; "" where none is."""
    import difflib

    plain = glob.rstrip(".*/").replace("/", ".")
    inner = plain.partition(".")[2]  # without a wrapper's prefix
    candidates = [f"{plain}.*", plain, f"*.{plain}", f"*.{plain}.*", inner, f"{inner}.*", f"*{plain}*"]
    found = next((c for c in candidates if c.strip(".*") and any(_matches(name, c) for name in names)), "")
    return found or next(iter(difflib.get_close_matches(plain, names, n=1)), "")
