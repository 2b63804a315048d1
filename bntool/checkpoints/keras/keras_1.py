"""Layers of Keras 1 in the words of Keras 2.

Keras 1 has other names for classes and options. Its kernels lie as the option ``dim_ordering`` says, (out, in, ...) or
(..., in, out), those of one dimension with one dimension more; names of weights are joined to that of the layer by an
underscore. Where Keras 1 computes otherwise than Keras 2 under the same name, a layer gets a name that no class has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

VARIANCE_SINCE = (1, 0, 7)  # before, running_std is a standard deviation
EPS_BELOW_ROOT_SINCE = (1, 0, 8)  # before, Theano's BatchNorm divides by sqrt(variance) + eps
NAMES = {"W": "kernel", "b": "bias"}  # of weights
# Keras numbers the weights of a model that a session makes a second time
_NUMBERED = re.compile(r"(W|b|gamma|beta|running_mean|running_std|depthwise_kernel|pointwise_kernel)_\d+")
_CONVOLUTIONS = {
    "Convolution1D": "Conv1D",
    "AtrousConvolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "AtrousConvolution2D": "Conv2D",
    "Deconvolution2D": "Conv2DTranspose",
    "SeparableConvolution2D": "SeparableConv2D",
    "Convolution3D": "Conv3D",
}
_EXTENTS = (("filter_length",), ("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3"))
_MERGES = {"sum": "Add", "mul": "Multiply", "ave": "Average", "max": "Maximum", "concat": "Concatenate"}
_MAX_NESTING = 32
_ORDERS = {"th": "channels_first", "tf": "channels_last"}


def translate_layer(  # noqa: PLR0911 a list of cases
    kind: str, config: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any]] | None:
    """Return class and options of a layer as Keras 2 has them; None where nothing tells that it is of Keras 1."""
    common = {"data_format": _ORDERS.get(str(config.get("dim_ordering")), "channels_last")}
    if "border_mode" in config:
        common["padding"] = config["border_mode"]
    if kind in _CONVOLUTIONS and "nb_filter" in config:
        window = next(([config[key] for key in keys] for keys in _EXTENTS if config.keys() >= set(keys)), None)
        found = {"filters": config["nb_filter"], "kernel_size": window, "use_bias": config.get("bias", True)}
        if kind == "Deconvolution2D":  # the shape of its output is told: it may reach beyond what the kernel does
            common["padding"] = "same"
        return _CONVOLUTIONS[kind], {**config, **common, **found}
    if kind == "Dense" and "output_dim" in config:
        return kind, {**config, "units": config["output_dim"], "use_bias": config.get("bias", True)}
    if kind == "BatchNormalization" and "mode" in config:
        return kind, config
    if kind == "Merge" and "mode" in config:
        mode = config["mode"]
        if not isinstance(mode, str) or mode not in _MERGES or config.get("mode_type", "raw") != "raw":
            return "Merge of its own", config
        return _MERGES[mode], {**config, "axis": config.get("concat_axis", -1)}
    if "Pooling" in kind and config.keys() & {"border_mode", "dim_ordering"}:
        padded = config.get("border_mode", "valid") != "valid"  # what Theano pads with counts
        return f"{kind} with padding" if padded else kind, {**config, **common}
    if "dim_ordering" in config:
        return kind, {**config, **common}
    return None


def name_models(config: Any, names: Sequence[str]) -> Any:
    """Return the configuration of a Sequential model in which models that are layers have the names that the file
    lists.

    Keras 1 writes a Sequential model as a list of its layers, without its own name.
    """
    layers = config.get("config") if isinstance(config, dict) else None
    if not isinstance(layers, list) or len(layers) != len(names) or not has_unnamed_models(config):
        return config
    named = [
        {**layer, "name": name} if isinstance(layer, dict) and isinstance(layer.get("config"), list) else layer
        for layer, name in zip(layers, names, strict=True)
    ]
    return {**config, "config": named}


def has_unnamed_models(config: Any, depth: int = 0) -> bool:
    """Return whether models of which no name is known are layers of this one, as those are that a first Merge joins."""
    inside = config.get("config") if isinstance(config, dict) and depth < _MAX_NESTING else None
    layers = inside.get("layers") if isinstance(inside, dict) else inside
    if not isinstance(layers, list):
        return False
    return any(
        (isinstance(one.get("config"), list) and not one.get("name"))
        or (one.get("class_name") == "Merge" and isinstance(one.get("config"), dict) and "layers" in one["config"])
        or has_unnamed_models(one, depth + 1)
        for one in layers
        if isinstance(one, dict)
    )


def unnumbered(variable: str) -> str:
    """Return the name of a weight without the number that Keras 1 gives to those of a second model."""
    found = _NUMBERED.fullmatch(variable)
    return found[1] if found else variable


def parse_version(text: object) -> tuple[int, ...] | None:
    """Return the numbers of a version of Keras 1; None for other versions, and where there is none."""
    parts = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text) if isinstance(text, str) else None
    found = tuple(int(part or 0) for part in parts.groups()) if parts else ()
    return found if found[:1] in ((0,), (1,)) else None
