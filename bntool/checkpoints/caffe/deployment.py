"""A ``.caffemodel`` together with the ``.prototxt`` that it is run by, and what folding and freezing do to that."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from bntool.batchnorm import DEFAULT_EPS, EpsSource
from bntool.checkpoints.caffe.blob_names import find_renaming
from bntool.checkpoints.caffe.blobs import CaffeContent, momentum_of
from bntool.checkpoints.caffe.hdf5 import name_blobs
from bntool.checkpoints.caffe.layers import Layer, Wiring, blobs_of
from bntool.checkpoints.caffe.prototxt import Prototxt, TextField
from bntool.checkpoints.caffe.trust import judge_layers
from bntool.checkpoints.caffe.writing import BIASED, biased_layers, removed_layers
from bntool.checkpoints.checkpoint import Checkpoint, ModuleInfo
from bntool.errors import RefusedError, UsageError
from bntool.plan import SetAttribute


def deploy(checkpoint: Checkpoint, prototxt: Prototxt) -> Checkpoint:
    """Return the checkpoint as the net in a ``.prototxt`` runs it: with its wiring and its eps, which win over the
    model's.

    The net also says what the blobs of an HDF5 file are.

    Raises:
        UsageError: it is another net.
        RefusedError: it scales a BatchNorm layer by another Scale layer than the net in the file.
    """
    if checkpoint.content is None:
        checkpoint = name_blobs(checkpoint, prototxt)
    content = CaffeContent.of(checkpoint)
    wiring = Wiring.of(prototxt.layers)
    by_name = {layer.name: layer for layer in wiring.layers}
    missing = [name for index, name in content.names.items() if index in content.scale_factors and name not in by_name]
    if missing:
        raise UsageError(f"the .prototxt has no layer {missing[0]!r}: it describes another net", path=checkpoint.path)
    positions = {name: index for index, name in content.names.items()}
    modules: dict[str, ModuleInfo] = {}
    (state_dict,) = checkpoint.state_dicts
    for name, module in state_dict.modules.items():
        index, layer = positions[name], by_name.get(name)
        modules[name] = module
        if layer is None or index not in content.scale_factors:
            continue
        scale = wiring.scale_of(layer)
        own = content.names.get(content.scales.get(index, -1))
        if own != (scale.name if scale is not None else None):
            raise RefusedError("the .prototxt scales it by another layer than the model", tensor=name)
        modules[name] = ModuleInfo(module.class_path, {**module.attributes, **_attributes(layer)})
    acting = judge_layers((*prototxt.layers, *prototxt.training))
    return dataclasses.replace(
        checkpoint,
        globals=tuple(dict.fromkeys((*checkpoint.globals, *acting))),
        state_dicts=(dataclasses.replace(state_dict, modules=modules),),
        content=dataclasses.replace(content, deployed=wiring),
    )


def _attributes(layer: Layer) -> dict[str, object]:
    """Return the attributes as Caffe reads them: what the ``.prototxt`` leaves out has Caffe's default, whatever the
    model says.
    """
    found: dict[str, object] = {
        "eps": layer.parameters.get("batch_norm_param.eps", DEFAULT_EPS),
        "eps_source": EpsSource.PROTOTXT.value,
        "momentum": momentum_of(layer),
    }
    if "batch_norm_param.use_global_stats" in layer.parameters:
        found["use_global_stats"] = layer.parameters["batch_norm_param.use_global_stats"]
    return found


def edit_prototxt(checkpoint: Checkpoint, prototxt: Prototxt) -> str:
    """Return the text that runs the edited model: without layers that were taken out, with biases that were added,
    frozen.

    Args:
        checkpoint: with its edits.
        prototxt: of the model before.

    Raises:
        RefusedError: the names of its blobs do not allow it.
    """
    content = CaffeContent.of(checkpoint)
    wiring = Wiring.of(prototxt.layers)
    gone = {content.names[index] for index in removed_layers(checkpoint)}
    biased = {content.names[index] for index in biased_layers(checkpoint)}
    removed = frozenset(layer.index for layer in wiring.layers if layer.name in gone)
    renaming = find_renaming(wiring, removed)
    edits = find_freezing_edits(prototxt, _frozen_layers(checkpoint))
    for layer in wiring.layers:
        text = _text_of(layer)
        if layer.index in removed:
            edits.add((*_whole_lines(prototxt.text, text), ""))
            continue
        for key, names in (("top", renaming.tops), ("bottom", renaming.bottoms)):
            for place, found in enumerate(text.all(key)):
                if (layer.index, place) in names:
                    edits.add(_set_value(found, names[layer.index, place]))
        parameter = text.last(BIASED[layer.type]) if layer.name in biased else None
        if parameter is not None:
            term = parameter.last("bias_term")
            if term is not None:
                edits.add((term.value_start, term.end, "true"))
    return prototxt.edited(sorted(edits))


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """The settings of a BatchNorm layer that stay while the net is trained.

    Attributes:
        statistics: mean, variance and scale factor.
        affine: weight and bias, in the Scale layer that reads it or, of five blobs, in itself.
        blobs: how many it has.
    """

    statistics: bool
    affine: bool
    blobs: int = 3


def find_freezing_edits(prototxt: Prototxt, layers: Mapping[str, FrozenLayer]) -> set[tuple[int, int, str]]:
    """Find what keeps layers in training: use_global_stats, and lr_mult and decay_mult 0.

    Returns:
        Ranges and new texts, in the net that is tested and in the one that is trained.
    """
    edits: set[tuple[int, int, str]] = set()
    for wiring in (Wiring.of(prototxt.layers), Wiring.of(prototxt.training)):
        for layer in wiring.layers:
            frozen = layers.get(layer.name)
            if frozen is None or layer.type != "BatchNorm":
                continue
            own = 3 if frozen.statistics else 0  # blobs like any other
            if frozen.statistics:
                edits.update(_set_in_message(_text_of(layer), "batch_norm_param", "use_global_stats", "true"))
            scale = wiring.scale_of(layer)
            if frozen.affine and frozen.blobs == 5:
                own = 5
            elif frozen.affine and scale is not None:
                edits.update(_stop_learning(_text_of(scale), 2 if scale.parameters.get("scale_param.bias_term") else 1))
            if own:
                edits.update(_stop_learning(_text_of(layer), own))
    return edits


def _frozen_layers(checkpoint: Checkpoint) -> dict[str, FrozenLayer]:
    """Return the layers that the edits of a checkpoint freeze; edits are worded as those of pickled modules."""
    content = CaffeContent.of(checkpoint)
    kept: dict[str, set[str]] = {}
    for edit in checkpoint.edits:
        if isinstance(edit.step, SetAttribute):
            kept.setdefault(edit.step.module, set()).add(edit.step.attribute)
    return {
        name: FrozenLayer(
            statistics="training" in kept[name],
            affine=bool(kept[name] & {"weight.requires_grad", "bias.requires_grad"}),
            blobs=len(blobs_of(content.wiring.layers[index])),
        )
        for index, name in content.names.items()
        if name in kept
    }


def _set_in_message(layer: TextField, message: str, name: str, value: str) -> Collection[tuple[int, int, str]]:
    found = layer.last(message)
    if found is None or found.body_end is None:
        assert layer.body_end is not None
        return [(layer.body_end, layer.body_end, f"{message} {{ {name}: {value} }} ")]
    old = found.last(name)
    if old is not None:
        return [(old.value_start, old.end, value)]
    return [(found.body_end, found.body_end, f"{name}: {value} ")]


def _stop_learning(layer: TextField, count: int) -> Collection[tuple[int, int, str]]:
    """Set lr_mult and decay_mult of each blob to 0."""
    assert layer.body_end is not None
    specs = [one for one in layer.all("param") if one.body_end is not None]
    edits: list[tuple[int, int, str]] = []
    for spec in specs[:count]:
        for name in ("lr_mult", "decay_mult"):
            old = spec.last(name)
            place = spec.body_end or 0
            edits.append((place, place, f"{name}: 0 ") if old is None else (old.value_start, old.end, "0"))
    missing = "param { lr_mult: 0 decay_mult: 0 } " * (count - len(specs))
    return [*edits, (layer.body_end, layer.body_end, missing)]


def _text_of(layer: Layer) -> TextField:
    assert isinstance(layer.source, TextField)
    return layer.source


def _set_value(found: TextField, value: str) -> tuple[int, int, str]:
    return (found.value_start, found.end, f'"{value}"')


def _whole_lines(text: str, found: TextField) -> tuple[int, int]:
    """Widen the place of a field by the line break after it, where it stands alone on its lines."""
    end = found.end
    while end < len(text) and text[end] in " \t\r":
        end += 1
    return found.start, end + 1 if text[end : end + 1] == "\n" else found.end
