"""Weights alone of the models of ``keras.applications``, known by names and shapes: the file ``applications.bin``.

``python -m catalogue.keras_applications`` writes the file from the real models. Its first line says how long the
compressed index is; then the index follows, and one compressed configuration for each model. Names and shapes prove
neither a forward nor an eps: whoever goes on with such a configuration says that it is assumed.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bntool.checkpoints.keras.content import KerasContent, WeightsLayout
from bntool.checkpoints.keras.model import find_references
from bntool.checkpoints.tensors import read_numbers

PATH = Path(__file__).with_name("applications.bin")
MAGIC = "bntool-keras-applications-1"
# names that Keras makes of the class and a number that counts what the session had made before
_COUNTED = re.compile(r"(conv2d|batch_normalization|dense|separable_conv2d|depthwise_conv2d|normalization)(_\d+)?")
_NORMALIZATION = re.compile(r"(^|\.)normalization(_\d+)?\.[^.]+$")
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as keras.applications has them
_CLOSE = 1e-6
HEADS = ("predictions", "dense", "probs", "fc1000")  # linear layers that classify, of any number of classes
_DENSE, _CONVOLUTION = 2, 4  # dimensions of the kernel of a Dense, of a Conv2D
_RGB, _IMAGENET = 3, 1000  # channels and classes of the published models
_NAMED_BEFORE = re.compile(r"bn[2-5][a-z]\d*_branch\d[a-c]?")


class Application(NamedTuple):
    """A model of keras.applications whose layers a file has.

    Attributes:
        name: as Keras calls it, after ``keras:``.
        config: the JSON of the model, with as many classes as the file has.
        doubt: what the model may have otherwise than the configuration; "" where nothing tells that it may.
    """

    name: str
    config: Any
    doubt: str = ""


def fingerprint(layers: Iterable[tuple[str, Sequence[tuple[int, ...]]]]) -> str:
    """Hash the names of layers and the shapes of their variables to 64 bits, in any order; a classifier may have any
    size.

    Args:
        layers: all that have variables, as Keras names and keeps them.
    """
    lines, heads = [], 0
    for name, shapes in layers:
        key = _find_key(name)
        if key in HEADS and max(map(len, shapes)) == _DENSE:
            heads += 1
        else:
            lines.append(f"{key} {sorted(shapes)}")
    text = "\n".join([f"{heads} classifiers", *sorted(lines)]).encode("utf-8", "surrogatepass")
    return f"{zlib.crc32(text) << 32 | zlib.crc32(text[::-1]):016x}"


def _find_key(name: str) -> str:
    key = name.lower().replace("/", "_").replace(".", "_")
    counted = _COUNTED.fullmatch(key)
    return counted[1] if counted else key


def recognise_application(content: KerasContent) -> Application | None:
    """Return the model of keras.applications that weights alone are of; None where they are of no such model, or
    more.
    """
    if not any(name.endswith(".running_var") for name in content.names.tensors):
        return None
    shapes = _list_shapes(content)
    channels, entry = _RGB, _find_entry(shapes)
    if entry is None:
        channels, shapes_of_rgb = _give_rgb(shapes)
        entry = _find_entry(shapes_of_rgb)
    if entry is None:
        return None
    index, data = _read_index()
    _, number, end = entry
    start = sum(index["sizes"][:number])
    config = json.loads(zlib.decompress(data[start : start + index["sizes"][number]]))
    if channels != _RGB and not _set_channels(config["config"], channels):
        return None
    title, doubt = f"keras:{index['names'][number]}", ""
    if end is not None:
        _cut(config["config"], end)
    else:
        doubt = _doubt_classifier(content, shapes, config["config"], index["classifier_inputs"][number])
        _set_classes(
            config["config"], [kernel[1] for own in shapes.values() for kernel in own if len(kernel) == _DENSE]
        )
    if index["names"][number] not in index["rescaled"]:
        return Application(title, config, doubt)
    divisors = _find_divisors(content)
    if divisors:
        _rescale(config["config"], divisors)
    elif divisors is None:
        doubt = "its input is rescaled once more where the weights are the published ones"
    return Application(title, config, doubt)


def describe_relatives(content: KerasContent) -> str:
    """Describe which known models weights alone are close to, where they are not one as they stand; "" where they are
    close to none.
    """
    shapes = _list_shapes(content)
    if any(_NAMED_BEFORE.fullmatch(name) for name in shapes):
        return "names like bn2a_branch2a occur with different eps, 1e-3 in older keras.applications"
    backbone = {name: own for name, own in shapes.items() if max(map(len, own)) != _DENSE}
    entry = _find_entry(backbone) if len(backbone) < len(shapes) else None
    if entry is None:
        return ""
    index, _ = _read_index()
    name = index["names"][entry[1]]
    return f"these are the layers of keras:{name} with others behind, of which the file does not say how they follow"


def _list_shapes(content: KerasContent) -> dict[str, list[tuple[int, ...]]]:
    """Return shapes of the variables of each layer, in the order of the file."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, place in content.names.places.items():
        shapes.setdefault(name.rpartition(".")[0], []).append(tuple(content.hdf5.datasets[place].shape))
    return shapes


def _find_entry(shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> tuple[str, int, str | None] | None:
    """Find a known model: its fingerprint, its number, and the layer that it ends with where it has no classifier."""
    found = fingerprint(shapes.items())
    return next((tuple(entry) for entry in _read_index()[0]["entries"] if entry[0] == found), None)


def _give_rgb(shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> tuple[int, dict[str, list[tuple[int, ...]]]]:
    """Return how many channels the first convolution reads, and the shapes as they were if it read three."""
    kernels = [(name, one) for name, own in shapes.items() for one in own if len(one) == _CONVOLUTION]
    if not kernels:
        return _RGB, {}
    first, (*window, channels, filters) = kernels[0]
    changed = (*window, _RGB, filters)
    return channels, {
        name: [changed if name == first and one == kernels[0][1] else one for one in own]
        for name, own in shapes.items()
    }


def _set_channels(model: Any, channels: int) -> bool:
    """Let the model read other images than those of three channels; False where it is another model then.

    Those that normalise their input do so otherwise where it has not three channels.
    """
    layers = model["layers"]
    if any(layer["class_name"] in ("Rescaling", "Normalization") for layer in layers):
        return False
    shape = next(layer["config"]["batch_shape"] for layer in layers if layer["class_name"] == "InputLayer")
    shape[-1] = channels
    return True


def _doubt_classifier(
    content: KerasContent, shapes: Mapping[str, Sequence[tuple[int, ...]]], model: Any, inputs: int | None
) -> str:
    """Explain why a classifier may not be the one of the application; "" where its name and shape are that one's.

    Args:
        inputs: how many channels the application's own reads; None where it has no Dense.
    """
    own = next((layer["name"] for layer in reversed(model["layers"]) if layer["class_name"] == "Dense"), None)
    kernels = ((name, one) for name, found in shapes.items() for one in found if len(one) == _DENSE)
    found = next(((name, one) for name, one in kernels if _find_key(name) in HEADS), None)
    if own is None or found is None or inputs is None:
        return ""
    name, (reads, classes) = found
    if reads == inputs and classes > 1:
        is_counted = content.layout is WeightsLayout.NUMBERED and _COUNTED.fullmatch(name) is not None
        if name == own or (is_counted and classes == _IMAGENET):
            return ""
    return "the layers behind the last convolution may be your own (the file says neither pooling nor activation)"


def _find_divisors(content: KerasContent) -> tuple[float, ...] | None:
    """Return the numbers by whose roots Keras divides what the first Normalization gives, where it loads the published
    weights.

    They bring a mean and a variance of ImageNet along, of which the variance is a standard deviation by mistake; the
    Rescaling mends that. A new model normalises by zeros and ones, and has no Rescaling.

    Returns:
        An empty tuple for those of a new model; None for other numbers.
    """
    known = {((0.0,) * 3, (1.0,) * 3): (), (_MEAN, _DEVIATION): _DEVIATION}
    names = [name for name in content.names.tensors if _NORMALIZATION.search(name)]
    tensors = [content.names.tensors[name] for name in names[:2]]
    if [tuple(tensor.shape) for tensor in tensors] != [(3,), (3,)]:
        return None
    found = [tuple(read_numbers(tensor)) for tensor in tensors]
    for wanted, divisors in known.items():
        if all(
            abs(a - b) <= _CLOSE
            for one, other in zip(found, wanted, strict=True)
            for a, b in zip(one, other, strict=True)
        ):
            return divisors
    return None


def _rescale(model: Any, divisors: Sequence[float]) -> None:
    """Put the Rescaling behind the Normalization."""
    layers = model["layers"]
    place = next(position for position, layer in enumerate(layers) if layer["class_name"] == "Normalization")
    name, new = layers[place]["name"], "rescaling_1"
    known = frozenset(layer["name"] for layer in layers)
    for layer in layers[place + 1 :]:
        for reference in find_references(layer["inbound_nodes"], known):
            reference[0] = new if reference[0] == name else reference[0]
    config = {"name": new, "scale": [1 / math.sqrt(one) for one in divisors], "offset": 0.0}
    added = {"class_name": "Rescaling", "config": config, "name": new, "inbound_nodes": [[[name, 0, 0, {}]]]}
    layers.insert(place + 1, added)


@cache
def _read_index() -> tuple[Any, bytes]:
    head, _, rest = PATH.read_bytes().partition(b"\n")
    magic, size = head.decode().split()
    if magic != MAGIC:
        raise ValueError(f"{PATH} is not of this version")
    return json.loads(zlib.decompress(rest[: int(size)])), rest[int(size) :]


def _cut(model: Any, end: str) -> None:
    """Leave out the classifier."""
    last = [layer["name"] for layer in model["layers"]].index(end)
    model["layers"] = model["layers"][: last + 1]
    model["output_layers"] = [[end, 0, 0]]


def _set_classes(model: Any, classes: Sequence[int]) -> None:
    for layer in model["layers"]:
        if layer["class_name"] == "Dense" and len(classes) == 1:
            layer["config"]["units"] = classes[0]
