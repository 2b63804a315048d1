"""Write bntool/checkpoints/keras/applications.bin from the models of keras.applications that have BatchNorm layers.

    python -m catalogue.keras_applications

Needs Keras 3, with a backend that has all of them (TensorFlow or JAX), beside h5py; nothing is downloaded. What is kept
of a configuration is what differs from the defaults of the classes, in the way of writing that Keras 2 has, too.
"""

from __future__ import annotations

import inspect
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from bntool.checkpoints.keras.applications import HEADS, MAGIC, PATH, fingerprint

_WITHOUT_BATCH_NORM = ("VGG", "ConvNeXt")
# published weights of these are run with a Rescaling more than models with weights of one's own
_RESCALED_WHEN_PUBLISHED = tuple(f"EfficientNetB{digit}" for digit in range(8))


def build() -> bytes:
    import keras

    blocks: list[tuple[str, bytes]] = []
    entries: list[list[Any]] = []
    inputs: list[int | None] = []
    for name in sorted(name for name in dir(keras.applications) if name[0].isupper()):
        if not name.startswith(_WITHOUT_BATCH_NORM):
            model = getattr(keras.applications, name)(weights=None)
            config = _shorten(keras, json.loads(model.to_json()))
            end = _find_end(config)
            layers = [(one.name, type(one).__name__, [tuple(w.shape) for w in one.weights]) for one in model.layers]
            variants = {None: layers, end: layers[: 1 + [one[0] for one in layers].index(end)]}
            for cut, some in variants.items():
                weighted = [one for one in some if one[2]]
                for by_class in (False, True):
                    keys = ((_snake(keras, kind) if by_class else own, shapes) for own, kind, shapes in weighted)
                    entries.append([fingerprint(keys), len(blocks), cut])
            dense = [one.kernel.shape[0] for one in model.layers if type(one).__name__ == "Dense" and one.name in HEADS]
            inputs.append(int(dense[0]) if len(dense) == 1 else None)
            blocks.append((name, zlib.compress(json.dumps(config, separators=(",", ":")).encode(), 9)))
            print(name, len(blocks[-1][1]), flush=True)
            keras.backend.clear_session()
    index = {
        "names": [name for name, _ in blocks],
        "sizes": [len(block) for _, block in blocks],
        "entries": entries,
        "classifier_inputs": inputs,
        "rescaled": [name for name, _ in blocks if name in _RESCALED_WHEN_PUBLISHED],
        "version": keras.__version__,
    }
    head = zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)
    return b"%s %d\n" % (MAGIC.encode(), len(head)) + head + b"".join(block for _, block in blocks)


def _snake(keras: Any, class_name: str) -> str:
    return str(keras.src.utils.naming.to_snake_case(class_name))


def _shorten(keras: Any, config: Any) -> Any:
    """The configuration without what Keras supposes anyway."""
    own = config["config"]
    known = all(hasattr(keras.layers, one["class_name"]) and _is_plain(one) for one in own["layers"])
    layers = [
        {
            "class_name": one["class_name"],
            **({} if known else {"module": one["module"], "registered_name": one["registered_name"]}),
            "config": dict(_needed(keras, getattr(keras.layers, one["class_name"], None), one["config"])),
            "name": one["name"],
            "inbound_nodes": [_shorten_call(node) if known else node for node in one["inbound_nodes"]],
        }
        for one in own["layers"]
    ]
    kept = {"name": own["name"], "layers": layers}
    kept |= {key: [own[key]] if isinstance(own[key][0], str) else own[key] for key in ("input_layers", "output_layers")}
    return {"module": config["module"], "class_name": "Functional", "config": kept}


def _needed(keras: Any, kind: Any, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    defaults = {} if kind is None else {k: p.default for k, p in inspect.signature(kind.__init__).parameters.items()}
    if kind is not None and kind.from_config.__func__ is not keras.layers.Layer.from_config.__func__:
        defaults = {}  # it reads its configuration by itself, and may want all of it (Rescaling: offset)
    for key, value in config.items():
        default = defaults.get(key, inspect.Parameter.empty)
        plain = tuple(value) if isinstance(value, list) else value
        initial = isinstance(value, dict) and key.endswith("_initializer")
        if kind is not None and (key in ("dtype", "trainable") or initial or value is None or plain == default):
            continue
        if kind is not None and isinstance(value, list) and value == [1, 1] and default in ((1, 1), 1):
            continue
        if isinstance(value, float):
            assert math.isfinite(value)
        yield key, value


def _is_plain(layer: Any) -> bool:
    """Whether its calls say nothing but what it reads."""
    return all(
        len(node["args"]) == 1 and not any(value is not None for value in node["kwargs"].values())
        for node in layer["inbound_nodes"]
    )


def _shorten_call(node: Any) -> Any:
    """``[[layer, call, output, {}], ...]``."""
    (given,) = node["args"]
    tensors = given if isinstance(given, list) else [given]
    return [[*one["config"]["keras_history"], {}] for one in tensors]


def _find_end(config: Any) -> str:
    """The layer that gives the output without the classifier: what the last global pooling reads."""
    pooling = [one for one in config["config"]["layers"] if one["class_name"] == "GlobalAveragePooling2D"][-1]
    (node,) = pooling["inbound_nodes"]
    reference = node[0] if isinstance(node, list) else node["args"][0]["config"]["keras_history"]
    return str(reference[0])


if __name__ == "__main__":
    PATH.write_bytes(build())
