"""Writing Keras files with what changed: the configuration without layers, and the weights that go with it.

The HDF5 part is copied whole and then edited in the copy by h5py: what no edit concerns keeps its bytes and its place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.zips.reading import ZipArchive, ZipRecord
from bntool.checkpoints.containers.zips.writing import ZipWriter, patched_chunks
from bntool.checkpoints.files import CHUNK
from bntool.checkpoints.keras.content import KerasContent
from bntool.checkpoints.keras.files import CONFIG, METADATA, MODEL_CONFIG, WEIGHTS
from bntool.checkpoints.keras.model import (
    KerasLayer,
    KerasModel,
    find_references,
    order_layers,
    parse_config,
    read_model,
)
from bntool.checkpoints.keras.weights_writing import rewrite_weights
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.records import RECORD_KEY
from bntool.errors import RefusedError
from bntool.plan import Record, RemoveModule, SetAttribute


@dataclass(frozen=True)
class NewModel:
    """A configuration with its edits.

    Attributes:
        config: the JSON; the old one where nothing in it changed.
        model: what it describes.
        removed: paths of the layers that are gone.
        frozen: paths of the layers that no longer train.
    """

    config: Any
    model: KerasModel | None
    removed: frozenset[str]
    frozen: frozenset[str]


def write_archive(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write a ``.keras`` file.

    Raises:
        RefusedError: Keras's format cannot hold an edit.
    """
    import tempfile

    content = KerasContent.of(checkpoint)
    archive = content.archive
    assert archive is not None
    stream = output.open(path)
    if not checkpoint.edits:
        checkpoint.file.copy_to(stream, offset=0, length=checkpoint.file.size)
        return
    new = change_model(checkpoint)
    texts: dict[str, bytes] = {}
    if new.config is not content.config:
        texts[CONFIG] = json.dumps(new.config).encode()
    if any(isinstance(edit.step, Record) for edit in checkpoint.edits):
        metadata = parse_config(archive.read(archive.records[METADATA]))
        texts[METADATA] = json.dumps({**metadata, RECORD_KEY: list(checkpoint.records[""])}).encode()
    writer = ZipWriter(stream)
    for record in archive.records.values():
        if record.name == WEIGHTS:
            with tempfile.TemporaryFile(dir=path.parent) as weights:  # its size is not known before
                _copy_record(archive, record, weights)
                rewrite_weights(weights, checkpoint, new.model, removed=new.removed, frozen=new.frozen)
                writer.add(record.name, _read_whole(weights), size=weights.seek(0, 2))
        elif record.name in texts:
            writer.add(record.name, iter((texts[record.name],)), size=len(texts[record.name]))
        else:
            writer.add(record.name, patched_chunks(archive, record, ()), size=record.size)
    writer.close()


def write_hdf5(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write an ``.h5`` file.

    Raises:
        RefusedError: Keras's format cannot hold an edit.
    """
    content = KerasContent.of(checkpoint)
    stream = output.open(path)
    checkpoint.file.copy_to(stream, offset=0, length=checkpoint.file.size)
    if not checkpoint.edits:
        return
    new = change_model(checkpoint)
    texts: dict[str, str] = {}
    if new.config is not content.config:
        texts[MODEL_CONFIG] = json.dumps(new.config)
    if any(isinstance(edit.step, Record) for edit in checkpoint.edits):
        texts[RECORD_KEY] = json.dumps(list(checkpoint.records[""]))
    rewrite_weights(stream, checkpoint, new.model, removed=new.removed, frozen=new.frozen, texts=texts)


def _copy_record(archive: ZipArchive, record: ZipRecord, stream: IO[bytes]) -> None:
    for chunk in patched_chunks(archive, record, ()):
        stream.write(chunk)


def _read_whole(stream: IO[bytes]) -> Iterator[bytes]:
    stream.seek(0)
    while chunk := stream.read(CHUNK):
        yield chunk


def change_model(checkpoint: Checkpoint) -> NewModel:
    """Return the configuration after the edits: layers gone and their readers connected to what they read, biases,
    flags.

    Raises:
        RefusedError: the file has no configuration, or its layers cannot be counted anew.
    """
    content = KerasContent.of(checkpoint)
    owners = content.names.layers
    (state_dict,) = checkpoint.state_dicts
    removed, frozen = set(), set()
    for edit in checkpoint.edits:
        step = edit.step
        if isinstance(step, RemoveModule):
            removed.add(_path(owners, step.module))
        elif isinstance(step, SetAttribute):
            if (step.attribute, step.value) != ("trainable", False):
                raise RefusedError(f"Keras has no attribute {step.attribute} to set", tensor=step.module)
            frozen.add(_path(owners, step.module))
    added = state_dict.tensors.keys() - state_dict.stored.keys()
    biased = {_path(owners, name.removesuffix(".bias")) for name in added}
    if not removed | frozen | biased:
        return NewModel(content.config, content.model, frozenset(), frozenset())
    assert content.model is not None
    config = copy.deepcopy(content.config)
    model = read_model(config)
    assert model is not None
    for layer in model.walk():
        if layer.path in biased:
            layer.own_config["bias" if layer.is_keras_1 else "use_bias"] = True
        if layer.path in frozen:
            layer.own_config["trainable"] = False
    if removed:
        _take_out(model, "", frozenset(removed))
    return NewModel(config, read_model(config), frozenset(removed), frozenset(frozen))


def _path(owners: Mapping[str, Any], module: str) -> str:
    if module not in owners:
        raise RefusedError("no layer of the configuration goes by this name", tensor=module)
    path: str = owners[module].path
    return path


def _pass_by(reference: list[Any], gone: Mapping[str, KerasLayer], counted: frozenset[str]) -> None:
    """Let a reference to a layer that goes name what that one reads.

    Raises:
        RefusedError: it reads several others.
    """
    if reference[0] not in gone:
        return
    while reference[0] in gone:
        call = gone[reference[0]].calls[reference[1]]
        if len(call) != 1 or reference[2]:
            raise RefusedError("it reads several tensors", tensor=gone[reference[0]].path)
        reference[:3] = call[0]
    reference[1] += reference[0] in counted


def _take_out(model: KerasModel, path: str, removed: frozenset[str]) -> None:
    """Change the JSON of a model and of those in it, and list the layers in the order in which Keras will count them.

    Raises:
        RefusedError: a layer that goes reads several others.
    """
    for layer in model.layers:
        if layer.model is not None:
            _take_out(layer.model, layer.path, removed)
    gone = {layer.name: layer for layer in model.layers if layer.path in removed}
    if not gone:
        return
    entries = model.entry
    if not model.is_sequential:
        known = frozenset(layer.name for layer in model.layers)
        inside = [layer.entry.get("inbound_nodes") for layer in model.layers if layer.name not in gone]
        for places, counted in ((inside, model.counts_own), (entries["output_layers"], model.counts_own_shown)):
            for reference in find_references(places, known):
                _pass_by(reference, gone, counted)
    entries["layers"][:] = [layer.entry for layer in model.layers if layer.name not in gone]
    if model.is_sequential:
        return
    rest = read_model({"class_name": "Functional", "config": entries})
    order = order_layers(rest) if rest is not None else None
    if rest is None or order is None or set(order) != {layer.name for layer in rest.layers}:
        raise RefusedError(f"the layers of {path or 'the model'} cannot be counted as Keras would")
    by_name = {layer.name: layer.entry for layer in rest.layers}
    entries["layers"][:] = [by_name[name] for name in order]
