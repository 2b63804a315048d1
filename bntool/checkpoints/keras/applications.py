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
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bntool.checkpoints.keras.content import KerasContent
from bntool.checkpoints.keras.model import find_references
from bntool.checkpoints.tensors import read_numbers

PATH = Path(__file__).with_name("applications.bin")
MAGIC = "bntool-keras-applications-1"
# names that Keras makes of the class and a number that counts what the session had made before
_COUNTED = re.compile(r"(conv2d|batch_normalization|dense|separable_conv2d|depthwise_conv2d|normalization)(_\d+)?")
_NORMALIZATION = re.compile(r"(^|\.)normalization(_\d+)?\.[^.]+$")
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as keras.applications has them
_CLOSE = 1e-6
_HEADS = ("predictions", "dense", "probs", "fc1000")  # linear layers that classify, of any number of classes
_DENSE = 2  # dimensions of the kernel of a Dense


class Application(NamedTuple):
    """A model of keras.applications whose layers a file has.

    Attributes:
        name: as Keras calls it, after ``keras:``.
        config: the JSON of the model, with as many classes as the file has.
        is_ambiguous: published weights are run with a Rescaling that models with other weights do not have, and these
            may be either.
    """

    name: str
    config: Any
    is_ambiguous: bool


def fingerprint(layers: Iterable[tuple[str, Sequence[tuple[int, ...]]]]) -> str:
    """64 bits over names of layers and shapes of their variables, in any order; a classifier in any size.

    Args:
        layers: all that have variables, as Keras names and keeps them.
    """
    lines, heads = [], 0
    for name, shapes in layers:
        key = name.lower().replace("/", "_").replace(".", "_")
        counted = _COUNTED.fullmatch(key)
        key = counted[1] if counted else key
        if key in _HEADS and max(map(len, shapes)) == _DENSE:
            heads += 1
        else:
            lines.append(f"{key} {sorted(shapes)}")
    text = "\n".join([f"{heads} classifiers", *sorted(lines)]).encode("utf-8", "surrogatepass")
    return f"{zlib.crc32(text) << 32 | zlib.crc32(text[::-1]):016x}"


def recognise_application(content: KerasContent) -> Application | None:
    """The model of keras.applications that weights alone are of; None where they are of no such model, or more."""
    layers: dict[str, list[str]] = {}
    for name, place in content.names.places.items():
        layers.setdefault(name.rpartition(".")[0], []).append(place)
    if not any(name.endswith(".running_var") for name in content.names.tensors):
        return None
    shapes = {
        owner: [tuple(content.hdf5.datasets[place].shape) for place in places] for owner, places in layers.items()
    }
    index, data = _read_index()
    found = fingerprint(shapes.items())
    entry = next((entry for entry in index["entries"] if entry[0] == found), None)
    if entry is None:
        return None
    _, number, end = entry
    start = sum(index["sizes"][:number])
    config = json.loads(zlib.decompress(data[start : start + index["sizes"][number]]))
    if end is not None:
        _cut(config["config"], end)
    else:
        _set_classes(
            config["config"], [kernel[1] for own in shapes.values() for kernel in own if len(kernel) == _DENSE]
        )
    name = index["names"][number]
    if name not in index["rescaled"]:
        return Application(f"keras:{name}", config, is_ambiguous=False)
    divisors = _find_divisors(content)
    if divisors:
        _rescale(config["config"], divisors)
    return Application(f"keras:{name}", config, divisors is None)


def _find_divisors(content: KerasContent) -> tuple[float, ...] | None:
    """By whose roots Keras divides what the first Normalization gives, where it loads the published weights.

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
