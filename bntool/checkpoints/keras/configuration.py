"""Weights of Keras that lie alone in a file, together with the configuration of the model that they belong to."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.hdf5 import MAGIC, Hdf5Contents, read_hdf5
from bntool.checkpoints.containers.zips.reading import LOCAL_MAGIC, read_archive
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.keras.applications import recognise_application
from bntool.checkpoints.keras.content import KerasContent, WeightsLayout, make_checkpoint, read_content
from bntool.checkpoints.keras.files import CONFIG, MODEL_CONFIG, KerasHdf5
from bntool.checkpoints.keras.fit import find_misfit
from bntool.checkpoints.keras.keras_1 import has_unnamed_models, name_models
from bntool.checkpoints.keras.model import MAX_CONFIG, KerasLayer, KerasModel, find_references, parse_config, read_model
from bntool.checkpoints.keras.weights import BATCH_NORMS, KERNELS, expected_variables
from bntool.checkpoints.keras.weights_writing import rewrite_weights
from bntool.checkpoints.keras.writing import change_model
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.records import RECORD_KEY
from bntool.checkpoints.saving import write_checked
from bntool.errors import RefusedError, UnsafeFileError, UsageError
from bntool.plan import Record

# layers that have no weights, so that the order of those that have some can be told from the configuration
_WITHOUT_WEIGHTS = """
InputLayer Activation ReLU LeakyReLU ELU Softmax ThresholdedReLU Dropout SpatialDropout1D SpatialDropout2D
SpatialDropout3D GaussianDropout GaussianNoise AlphaDropout ActivityRegularization Add Subtract Multiply Average Maximum
Minimum Concatenate Dot Flatten Reshape Permute RepeatVector Masking Identity Rescaling Resizing CenterCrop
ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D UpSampling1D UpSampling2D UpSampling3D
MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D GlobalMaxPooling1D
GlobalMaxPooling2D GlobalMaxPooling3D GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D TFOpLambda
SlicingOpLambda CustomScaleLayer Merge
"""
_WITH_WEIGHTS = """
Embedding LSTM GRU SimpleRNN CuDNNLSTM CuDNNGRU ConvLSTM1D ConvLSTM2D ConvLSTM3D Bidirectional MultiHeadAttention PReLU
EinsumDense LocallyConnected1D LocallyConnected2D
"""


def read_configuration(file: SourceFile) -> Any:
    """Return the configuration in a JSON file, as ``model.to_json()`` gives it, or in a whole ``.keras`` or ``.h5``
    model.

    Raises:
        UsageError: a file of weights alone was given.
        CorruptFileError, UnsafeFileError: it cannot be read.
    """
    head = file.read(0, min(file.size, len(MAGIC)))
    if head.startswith(LOCAL_MAGIC):
        archive = read_archive(file)
        if CONFIG not in archive.records:
            raise UsageError(f"this archive has no {CONFIG}: it is no Keras model")
        return parse_config(archive.read(archive.records[CONFIG]))
    if head == MAGIC:
        text = read_hdf5(file).text("", MODEL_CONFIG)
        if text is None:
            raise UsageError("this file holds weights alone, too: give the JSON of the model, or the whole model")
        return parse_config(text)
    if file.size > MAX_CONFIG:
        raise UnsafeFileError(f"the configuration of the model has {file.size} bytes")
    config = parse_config(file.read(0, file.size))
    return parse_config(config) if isinstance(config, str) else config  # a JSON text that was written as JSON


def configure(checkpoint: Checkpoint, config: Any) -> Checkpoint:
    """Return the weights of a file as layers of a model.

    Args:
        checkpoint: a file of weights alone.
        config: the JSON of the model.

    Raises:
        UsageError: the file has a configuration of its own, or this one describes another model.
        RefusedError: the configuration does not say how the layers are connected.
    """
    content = KerasContent.of(checkpoint)
    if content.config is not None:
        raise UsageError("this file holds its configuration: leave out --keras-config", path=checkpoint.path)
    return _configure(checkpoint, config)


def _configure(checkpoint: Checkpoint, config: Any) -> Checkpoint:
    content = KerasContent.of(checkpoint)
    hdf5 = content.hdf5
    config = name_models(config, hdf5.texts(content.root, "layer_names") or ())
    if has_unnamed_models(config):
        raise RefusedError("models inside of this one have no names in it, so that layers and weights are not matched")
    model = read_model(config)
    if model is None or not model.is_connected:
        raise RefusedError(
            "this configuration does not say how the layers are connected: Python code of the model's own does that"
        )
    if content.layout is WeightsLayout.NAMED:
        names = _match_names(hdf5, model, content.root)
        if names:
            config = _rename(config, names)
    content = read_content(config, hdf5)
    assert content.model is not None
    fact = find_misfit(content, content.model)
    if fact:
        raise UsageError(f"the configuration describes another model: {fact}")
    return dataclasses.replace(
        make_checkpoint(
            checkpoint.file,
            ConfiguredWeights(),
            content,
            entries=checkpoint.entries,
            history=checkpoint.records.get("", ()),
        ),
    )


def configure_recognised(checkpoint: Checkpoint, *, writes: bool) -> Checkpoint | None:
    """Return weights alone of a model of keras.applications as layers of that model; None where they are of no such
    model.

    Raises:
        RefusedError: something is to be written, and the model may have layers otherwise than the configuration.
    """
    content = KerasContent.of(checkpoint)
    application = recognise_application(content) if content.config is None else None
    if application is None:
        return None
    if writes and application.doubt:
        raise RefusedError(
            f"names and shapes fit {application.name}, but {application.doubt}: give the configuration of the model "
            "(what model.to_json() says) with --keras-config FILE"
        )
    try:
        configured = _configure(checkpoint, application.config)
    except UsageError:  # layers in another order: not that model, or not as Keras saves it
        return None
    return dataclasses.replace(configured, format=RecognisedWeights(application.name))


class ConfiguredWeights(KerasHdf5):
    """Weights alone with a given configuration; it reads back what it writes by itself."""

    writer = "keras.configuration:write_weights"
    single_file = False
    described_by = ".json"
    _import = "import keras"

    def _make_model(self, content: KerasContent) -> Sequence[str]:
        config = content.config
        name = config.get("class_name") if isinstance(config, dict) else None
        name = {"Functional": "Model", "Model": "Model", "Sequential": "Sequential"}.get(str(name))
        if name is None or content.names.is_keras_1:
            return self._import, "model = keras.models.model_from_json(open({description}).read())"
        # model_from_json of Keras 3 knows no configuration of a whole .h5 model, and none of Keras 2
        make = f"model = keras.models.{name}.from_config(json.load(open({{description}}))['config'])"
        return "import json", self._import, make


class RecognisedWeights(ConfiguredWeights):
    """Weights alone whose configuration is that of a model of keras.applications, by names and shapes."""

    _import = "import keras  # Keras 3"

    def __init__(self, application: str) -> None:
        self.application = application


def edit_configuration(checkpoint: Checkpoint) -> str:
    """Return the JSON of an edited model, in the form in which its configuration was given.

    Raises:
        RefusedError: the layers cannot be counted anew.
    """
    return json.dumps(change_model(checkpoint).config)


def write_weights(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write the file, and hold it against the checkpoint as the edited configuration reads it.

    Raises:
        RefusedError: the layout cannot hold an edit.
    """
    write_checked(dataclasses.replace(checkpoint, format=_Checked(checkpoint)), path, output)


class _Checked(KerasHdf5):
    """Reads back by the configuration that will stand beside the new file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._new = change_model(checkpoint)

    def read(self, file: SourceFile) -> Checkpoint:
        return _configure(KerasHdf5().read(file), self._new.config)

    def write(self, checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
        stream = output.open(path)
        checkpoint.file.copy_to(stream, offset=0, length=checkpoint.file.size)
        if not checkpoint.edits:
            return
        texts: dict[str, str] = {}
        if any(isinstance(edit.step, Record) for edit in checkpoint.edits):
            texts[RECORD_KEY] = json.dumps(list(checkpoint.records[""]))
        new = self._new
        rewrite_weights(stream, checkpoint, new.model, removed=new.removed, frozen=new.frozen, texts=texts)


# names of layers


def _match_names(hdf5: Hdf5Contents, model: KerasModel, root: str) -> dict[str, str]:
    """Map the name of a layer in the configuration to that in the file, where they differ.

    Keras goes by the order of the layers that have weights, whatever their names.

    Raises:
        UsageError: it is the configuration of another model, or the order cannot be told.
    """
    listed = hdf5.texts(root, "layer_names") or ()
    weighted = [name for name in listed if hdf5.texts(f"{root}/{name}" if root else name, "weight_names")]
    known = {layer.name for layer in model.layers}
    unclear = [layer for layer in model.layers if _may_have_weights(layer) is None]
    if known.issuperset(weighted):
        places = {layer.name: place for place, layer in enumerate(model.layers)}
        if sorted(weighted, key=places.__getitem__) != weighted:  # Keras can be told to go by names
            raise UsageError("the layers of the weights have another order than in the configuration, and its names")
        if unclear:
            return {}
    if unclear:
        raise UsageError(
            f"whether layer {quote(unclear[0].name)} of the class {unclear[0].kind} has weights is not known, and the "
            "names of layers are others than in the file: give the configuration that was saved with the weights"
        )
    layers = [layer.name for layer in model.layers if _may_have_weights(layer)]
    if len(layers) != len(weighted):
        raise UsageError(
            f"the configuration has {len(layers)} layers with weights, and the file those of {len(weighted)}: it "
            "describes another model"
        )
    pairs = dict(zip(layers, weighted, strict=True))
    return pairs if any(name != new for name, new in pairs.items()) else {}


def _may_have_weights(layer: KerasLayer) -> bool | None:
    """Return whether a layer has weights; None for classes of which nothing is known here."""
    if layer.model is not None:
        parts = [_may_have_weights(one) for one in layer.model.layers]
        return True if True in parts else None if None in parts else False
    if layer.kind in BATCH_NORMS or layer.kind in KERNELS:
        return expected_variables(layer) != ()
    if layer.kind == "Normalization":
        return layer.config.get("mean") is None  # else it is told what it adapts to
    inside = layer.config.get("layer")
    kind = str(inside.get("class_name")) if layer.kind == "TimeDistributed" and isinstance(inside, dict) else layer.kind
    if kind in KERNELS or kind in _WITH_WEIGHTS.split():
        return True
    return False if kind in _WITHOUT_WEIGHTS.split() or not layer.is_layer else None


def _rename(config: Any, names: Mapping[str, str]) -> Any:
    """Return the configuration with other names of its layers.

    Raises:
        UsageError: two layers would have one name.
    """
    config = copy.deepcopy(config)
    model = read_model(config)
    assert model is not None
    new = [names.get(layer.name, layer.name) for layer in model.layers]
    if len(set(new)) != len(new):
        raise UsageError("under the names in the file two layers of the configuration would have one name")
    known = frozenset(layer.name for layer in model.layers)
    places = [model.entry.get("input_layers"), model.entry.get("output_layers")]
    places += [layer.entry.get("inbound_nodes") for layer in model.layers]
    found = [reference for place in places for reference in find_references(place, known)]
    for reference in found:
        reference[0] = names.get(reference[0], reference[0])
    for layer in model.layers:
        if layer.name in names:
            if "name" in layer.entry:
                layer.entry["name"] = names[layer.name]
            if isinstance(layer.entry.get("config"), dict):
                layer.entry["config"]["name"] = names[layer.name]
    return config
