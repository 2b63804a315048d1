"""The weights of Keras layers under PyTorch's names and in PyTorch's order of dimensions.

Keras keeps kernels as (height, width, in, out); they are shown as views of the same bytes with the dimensions as
PyTorch has them, so that one arithmetic serves both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bntool.batchnorm import STATISTICS
from bntool.checkpoints.checkpoint import ModuleInfo, NotUnderstood
from bntool.checkpoints.containers.hdf5 import Hdf5Contents
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.checkpoints.keras import keras_1
from bntool.checkpoints.keras.model import KerasLayer
from bntool.checkpoints.tensors import StoredTensor, Tensor

BATCH_NORMS = ("BatchNormalization", "SyncBatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2")
CONVOLUTIONS = {"Conv1D": 1, "Conv2D": 2, "Conv3D": 3, "Convolution1D": 1, "Convolution2D": 2, "Convolution3D": 3}
TRANSPOSED = {"Conv1DTranspose": 1, "Conv2DTranspose": 2, "Conv3DTranspose": 3}
DEPTHWISE = {"DepthwiseConv1D": 1, "DepthwiseConv2D": 2}
SEPARABLE = {"SeparableConv1D": 1, "SeparableConv2D": 2}
KERNELS = {**CONVOLUTIONS, **TRANSPOSED, **DEPTHWISE, **SEPARABLE, "Dense": 0}  # dimensions of space
_MOMENTUM, _EPS = 0.99, 1e-3  # Keras's defaults

_STATISTICS = ("moving_mean", "moving_variance")
_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
_NORM_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "running_mean": "running_mean",
    "running_std": "running_var",  # of Keras 1, which keeps a variance under this name since 1.0.7
}
_STATISTIC = re.compile(r"(moving|running)_?(mean|avg|average|var|variance|std)", re.IGNORECASE)
_MAYBE_NORM = re.compile(r"batch_?norm|(?<![a-z])bn(?![a-z])", re.IGNORECASE)
_OF_OLD_KERAS = "running_std is no variance in files of Keras before 1.0.7, but a standard deviation"
_FEWEST_VECTORS = 3  # of one length, that a layer of an unknown class must have to be taken for a BatchNorm


@dataclass(frozen=True)
class Variables:
    """The variables of one layer in a file.

    Attributes:
        owner: the name of the layer in the state dict.
        class_name: of the layer, "" where nothing tells.
        layer: in the configuration; None where there is no configuration, or nothing in it owns them.
        names: of the variables, in Keras's words, and the dataset of each.
    """

    owner: str
    class_name: str
    layer: KerasLayer | None
    names: Mapping[str, str]


@dataclass(frozen=True)
class WeightNames:
    """The names of a state dict's tensors in the file.

    Attributes:
        tensors: by PyTorch's name.
        modules: by layer.
        places: the dataset of each tensor.
        layers: the layer of the configuration by its name in the state dict.
        not_understood: layers that may be BatchNorms, of classes or with variables that are not known.
        is_keras_1: names or classes are those of Keras 1.
    """

    tensors: Mapping[str, Tensor]
    modules: Mapping[str, ModuleInfo]
    places: Mapping[str, str]
    layers: Mapping[str, KerasLayer] = field(repr=False)
    not_understood: tuple[NotUnderstood, ...] = ()
    is_keras_1: bool = False


def to_snake_case(name: str) -> str:
    """Convert the name of a class as Keras names the group of a layer after it."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


_CLASSES = {to_snake_case(name): name for name in (*BATCH_NORMS, *KERNELS)}


def expected_variables(layer: KerasLayer) -> tuple[str, ...] | None:
    """Return the variables of a layer in the order in which Keras numbers them; None for classes that are not known."""
    config, name = layer.config, layer.kind
    if name in BATCH_NORMS:
        affine = tuple(v for v, option in (("gamma", "scale"), ("beta", "center")) if config.get(option, True))
        return (*affine, *_STATISTICS, *(_RENORM if config.get("renorm") else ()))
    if name not in KERNELS:
        return None
    kernels = ("depthwise_kernel", "pointwise_kernel") if name in SEPARABLE else ("kernel",)
    return (*kernels, "bias") if config.get("use_bias", config.get("bias", True)) else kernels  # the latter in Keras 1


def guess_variables(class_name: str, count: int) -> tuple[str, ...] | None:
    """Return the variables of a layer of which only the class and their number are known."""
    if class_name in BATCH_NORMS:
        affine: Mapping[int, tuple[str, ...]] = {0: (), 1: ("gamma_or_beta",), 2: ("gamma", "beta")}
        rest = (*_STATISTICS, *(_RENORM if count > 4 else ()))
        return (*affine[count - len(rest)], *rest) if count - len(rest) in affine else None
    if class_name not in KERNELS:
        return None
    names = ("depthwise_kernel", "pointwise_kernel", "bias") if class_name in SEPARABLE else ("kernel", "bias")
    return names[:count] if count in (len(names) - 1, len(names)) else None


def guess_class(group: str) -> str:
    """Return the class after which Keras named the group of a layer; "" for those that are not known."""
    return _CLASSES.get(re.sub(r"_[0-9]+$", "", group), "")


def name_variables(
    found: Sequence[Variables], contents: Hdf5Contents, *, version: tuple[int, ...] | None = None
) -> WeightNames:
    """Give every variable its name.

    Args:
        version: of Keras 1, where it is known that the file is of that.
    """
    keeps_variance = version is None or version >= keras_1.VARIANCE_SINCE
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    modules: dict[str, ModuleInfo] = {}
    layers: dict[str, KerasLayer] = {}
    taken: set[str] = set()
    not_understood: list[NotUnderstood] = []
    for one in found:
        owner = unused_name(one.owner, taken)
        taken.add(owner)
        reason = _explain_doubt(one, contents) if keeps_variance or "running_std" not in one.names else _OF_OLD_KERAS
        if reason:
            not_understood.append(NotUnderstood(owner, reason))
        for variable, dataset in one.names.items():
            role, tensor = _translate(one, variable, contents.datasets[dataset])
            if variable == "running_std" and not keeps_variance:
                role = variable
            name = unused_name(f"{owner}.{role}", tensors)
            tensors[name], places[name] = tensor, dataset
        if one.layer is not None:
            layers[owner] = one.layer
        if one.class_name:
            own = one.layer is None or one.class_name == one.layer.class_name
            class_path = f"keras.layers.{one.class_name}" if own else one.class_name
            modules[owner] = ModuleInfo(class_path, _attributes(one.layer))
    is_keras_1 = any(one.layer.is_keras_1 for one in found if one.layer is not None) or any(
        variable in ("W", "running_std") for one in found for variable in one.names
    )
    return WeightNames(tensors, modules, places, layers, tuple(not_understood), is_keras_1)


def has_statistics(variables: Collection[str]) -> bool:
    """Return whether the names of variables are those of a BatchNorm, whatever its class."""
    return {_NORM_NAMES.get(variable, "") for variable in variables} >= set(STATISTICS)


def _explain_doubt(one: Variables, contents: Hdf5Contents) -> str:
    """Explain why variables may be those of a BatchNorm and are not taken for them; "" where there is no doubt."""
    if one.class_name in BATCH_NORMS:
        return "" if has_statistics(one.names) else f"it has other variables than Keras gives it: {_list(one.names)}"
    if has_statistics(one.names):
        return ""
    statistics = [name for name in one.names if _STATISTIC.search(name)]
    if statistics:
        return f"it has {_list(statistics)}, but not the other statistics of a BatchNorm"
    is_known = one.layer is not None and one.class_name == one.layer.class_name
    config = one.layer.config if one.layer is not None else {}
    named_so = bool(_MAYBE_NORM.search(f"{one.owner} {one.class_name}"))
    lengths = [tensor.shape for name in one.names.values() if len((tensor := contents.datasets[name]).shape) == 1]
    vectors = max(map(lengths.count, lengths), default=0)
    if "moving_variance_initializer" in config or (
        not is_known and not one.class_name and (vectors >= _FEWEST_VECTORS or (named_so and vectors > 1))
    ):
        what = f"of the class {one.class_name}, which is not Keras's" if one.class_name else "of no known class"
        return f"a layer {what}, with {len(one.names)} variables without names"
    return ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:8])


def _translate(one: Variables, variable: str, tensor: StoredTensor) -> tuple[str, StoredTensor]:
    class_name = one.class_name
    if class_name in BATCH_NORMS or has_statistics(one.names):
        return _NORM_NAMES.get(variable, variable), tensor
    space = KERNELS.get(class_name)
    if space is not None and space and (variable == "W" or (one.layer is not None and one.layer.is_keras_1)):
        return _translate_keras_1(one, variable, tensor)
    if space is not None:
        variable = keras_1.NAMES.get(variable, variable)
    if space is None or not variable.endswith("kernel") or tensor.wrapper or len(tensor.shape) != space + 2:
        return variable, tensor
    if variable == "depthwise_kernel" and class_name in SEPARABLE:
        return "depthwise_weight", _view_depthwise(tensor)
    view: Callable[[StoredTensor], StoredTensor] = _view_depthwise if class_name in DEPTHWISE else _view_kernel
    return "weight", view(tensor)


def _translate_keras_1(one: Variables, variable: str, tensor: StoredTensor) -> tuple[str, StoredTensor]:
    """Return kernels as ``dim_ordering`` lays them out; what is laid out otherwise keeps its name in the file."""
    config = one.layer.config if one.layer is not None else {}
    if variable == "b":
        return "bias", tensor
    is_first = config.get("data_format") == "channels_first"
    space = KERNELS[one.class_name]
    order: Sequence[int] | None = None
    if variable == "W" and one.class_name in CONVOLUTIONS and space == 1 and len(tensor.shape) == 4:
        filters, (length, *_) = config.get("filters"), config.get("kernel_size") or [None]
        if tensor.shape[:2] == (length, 1) and tensor.shape[3] == filters:
            order = (3, 2, 0)
        elif tensor.shape[0] == filters and tensor.shape[2:] == (length, 1):  # before 1.1
            order = (0, 1, 2)
    elif len(tensor.shape) == space + 2:
        near, far = range(space), range(2, space + 2)
        if variable == "W" and one.class_name in TRANSPOSED:
            order = (1, 0, *far) if is_first else (space, space + 1, *near)
        elif variable in ("W", "pointwise_kernel"):
            order = (0, 1, *far) if is_first else (space + 1, space, *near)
        elif variable == "depthwise_kernel" and not is_first:
            return "depthwise_weight", _view_depthwise(tensor)
        elif variable == "depthwise_kernel" and tensor.shape[0] == 1:
            return "depthwise_weight", _permute(tensor, (1, 0, *far))
    return ("weight", _permute(tensor, order)) if order is not None and not tensor.wrapper else (variable, tensor)


def _permute(tensor: StoredTensor, order: Sequence[int]) -> StoredTensor:
    return dataclasses.replace(
        tensor, shape=tuple(tensor.shape[i] for i in order), strides=tuple(tensor.strides[i] for i in order)
    )


def _view_kernel(tensor: StoredTensor) -> StoredTensor:
    """View a kernel (..., in, out) as (out, in, ...); of a transposed convolution (..., out, in) as (in, out, ...)."""
    return _permute(tensor, (len(tensor.shape) - 1, len(tensor.shape) - 2, *range(len(tensor.shape) - 2)))


def _view_depthwise(tensor: StoredTensor) -> StoredTensor:
    """View a depthwise kernel (..., in, multiplier) as (in * multiplier, 1, ...)."""
    *space, channels, multiplier = tensor.shape
    return dataclasses.replace(tensor, shape=(channels * multiplier, 1, *space), strides=(1, 1, *tensor.strides[:-2]))


def _attributes(layer: KerasLayer | None) -> dict[str, Any]:
    """Return epsilon and momentum in PyTorch's meaning, and what else tells how a layer computes."""
    if layer is None:
        return {}
    config = layer.config
    found: dict[str, Any] = {"trainable": config.get("trainable", True)}
    if layer.kind in BATCH_NORMS:
        eps, kept = config.get("epsilon", _EPS), config.get("momentum", _MOMENTUM)
        if _is_number(eps):
            found["eps"] = float(eps)
        if _is_number(kept):
            found["momentum"] = round(1.0 - kept, 12)
        found.update(axis=config.get("axis", -1), affine=(config.get("scale", True), config.get("center", True)))
        if layer.is_keras_1:
            found["moves_untrained"] = True
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
