"""The contents of a Keras file: the configuration of the model, and its weights under either of two layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, StateDict
from bntool.checkpoints.containers.hdf5 import Hdf5Contents
from bntool.checkpoints.containers.zips.reading import ZipArchive
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.keras.keras_1 import has_unnamed_models, name_models, parse_version, unnumbered
from bntool.checkpoints.keras.model import KerasLayer, KerasModel, read_model
from bntool.checkpoints.keras.numbering import CONTAINERS, group_of_layers, holds_any, orders_in_file
from bntool.checkpoints.keras.trust import judge_configuration
from bntool.checkpoints.keras.weights import (
    Variables,
    WeightNames,
    expected_variables,
    guess_class,
    guess_variables,
    has_statistics,
    name_variables,
)
from bntool.checkpoints.records import History
from bntool.errors import CorruptFileError

OPTIMIZERS = ("optimizer", "optimizer_weights")


class WeightsLayout(Enum):
    """The layout in which the HDF5 part keeps weights."""

    NUMBERED = "numbered"  # layers/<class>_<n>/vars/<i>: .keras and .weights.h5
    NAMED = "named"  # <layer>/<weight name>, with lists of both: .h5 of Keras 1 and 2, still written by Keras 3


@dataclass(frozen=True)
class KerasContent(Content):
    """A Keras file as it was read.

    Attributes:
        config: the JSON of the model; None in files of weights only.
        model: what it describes; None where code of its own makes the layers.
        hdf5: the weights and what else lies beside them.
        layout: how they are kept.
        root: the group of all weights, "" for the file itself; of numbered ones the container of layers.
        names: of the tensors.
        groups: the layers of the configuration by the group of their numbered weights.
        archive: that holds all of it; None where the file is HDF5.
    """

    config: Any = field(repr=False)
    model: KerasModel | None = field(repr=False)
    hdf5: Hdf5Contents = field(repr=False)
    layout: WeightsLayout
    root: str
    names: WeightNames = field(repr=False)
    groups: Mapping[str, KerasLayer] = field(default_factory=dict, repr=False)
    archive: ZipArchive | None = field(default=None, repr=False)


def read_content(config: Any, hdf5: Hdf5Contents, *, archive: ZipArchive | None = None) -> KerasContent:
    """Bring configuration and weights together.

    Raises:
        CorruptFileError, UnsafeFileError
    """
    named = "model_weights" if "model_weights" in hdf5.groups else ""
    config = name_models(config, hdf5.texts(named, "layer_names") or ())
    model = read_model(config) if config is not None and not has_unnamed_models(config) else None
    if hdf5.texts(named, "layer_names") is not None:
        found = list(_find_named(hdf5, model, named))
        names = name_variables(found, hdf5, version=find_version(config, hdf5))
        return KerasContent(config, model, hdf5, WeightsLayout.NAMED, named, names, archive=archive)
    root = next((name for name in CONTAINERS if name in hdf5.groups), CONTAINERS[0])
    groups = _groups_of_layers(hdf5, model, root) if model is not None else {}
    names = name_variables(list(_find_numbered(hdf5, groups)), hdf5)
    return KerasContent(config, model, hdf5, WeightsLayout.NUMBERED, root, names, groups, archive)


def find_version(config: Any, hdf5: Hdf5Contents) -> tuple[int, ...] | None:
    """Return the version of Keras 1 that a file or configuration says it is of; None for others, and where nothing is
    said.
    """
    said = [hdf5.text("", "keras_version"), config.get("keras_version") if isinstance(config, dict) else None]
    return next((found for one in said if (found := parse_version(one)) is not None), None)


def make_checkpoint(
    file: SourceFile,
    format_: Format,
    content: KerasContent,
    *,
    entries: Mapping[str, Any],
    history: History,
    training: Any = None,
) -> Checkpoint:
    """Return the checkpoint of a Keras file, under PyTorch's names.

    Args:
        training: the JSON of how the model is trained, where that lies beside its configuration.
    """
    tensors = content.names.tensors
    state_dict = StateDict("", "", tensors, modules=content.names.modules)
    optimizer: dict[str, Any] = {
        name: {"state": {}, "param_groups": []} for name in OPTIMIZERS if name in content.hdf5.groups
    }
    kind = content.config.get("class_name") if isinstance(content.config, dict) else None
    about = {"model_config": kind if isinstance(kind, str) else ""} if content.config is not None else {}
    return Checkpoint(
        file=file,
        format=format_,
        state_dicts=(state_dict,) if tensors else (),
        entries={**about, **entries, **optimizer},
        globals=tuple(judge_configuration([content.config, training])),
        records={"": history} if history and tensors else {},
        not_understood=content.names.not_understood,
        content=content,
    )


def _groups_of_layers(hdf5: Hdf5Contents, model: KerasModel, root: str) -> dict[str, KerasLayer]:
    layers = {layer.path: layer for layer in model.walk()}
    groups = group_of_layers(model, order=orders_in_file(model), root=root, has_weights=holds_any(hdf5.datasets))
    return {f"{group}/layer" if layers[path].is_distributed else group: layers[path] for path, group in groups.items()}


def _find_numbered(hdf5: Hdf5Contents, by_group: Mapping[str, KerasLayer]) -> Iterator[Variables]:
    variables: dict[str, list[str]] = {}
    for path in hdf5.datasets:
        group, _, number = path.rpartition("/")
        if not path.startswith(tuple(f"{name}/" for name in OPTIMIZERS)) and number.isdecimal():
            variables.setdefault(group.removesuffix("vars").rstrip("/"), []).append(path)
    order = {group: position for position, group in enumerate(by_group)}
    for group in sorted(variables, key=lambda name: (order.get(name, len(order)), name)):
        paths = sorted(variables[group], key=lambda path: int(path.rpartition("/")[2]))
        layer = by_group.get(group)
        class_name = layer.kind if layer is not None else guess_class(group.rpartition("/")[2])
        names = expected_variables(layer) if layer is not None else guess_variables(class_name, len(paths))
        if names is None or len(names) != len(paths):
            names = tuple(path.rpartition("/")[2] for path in paths)
        owner = layer.path if layer is not None else _name_group(hdf5, group, by_group)
        yield Variables(owner, class_name, layer, dict(zip(names, paths, strict=True)))


def _name_group(hdf5: Hdf5Contents, group: str, by_group: Mapping[str, KerasLayer]) -> str:
    """Return the names of a layer and those around it, which Keras notes since 3.6; else the names of their groups."""
    parts: list[str] = []
    pieces = group.split("/")
    for end in range(1, len(pieces) + 1):
        here = "/".join(pieces[:end])
        if pieces[end - 1] in CONTAINERS:
            continue
        if here in by_group:
            parts = [by_group[here].path]
        else:
            parts.append(hdf5.text(f"{here}/vars", "name") or pieces[end - 1])
    return ".".join(filter(None, parts)) or "model"


def _find_named(hdf5: Hdf5Contents, model: KerasModel | None, root: str) -> Iterator[Variables]:
    layers = {layer.name: layer for layer in model.layers} if model is not None else {}
    for name in (*(hdf5.texts(root, "layer_names") or ()), "top_level_model_weights"):
        group = f"{root}/{name}" if root else name
        layer = layers.get(name)
        inside: dict[str, list[KerasLayer]] = {}
        if layer is not None and layer.model is not None:
            for inner in layer.model.walk():
                inside.setdefault(inner.name, []).append(inner)
        owners: dict[str, tuple[KerasLayer | None, dict[str, str]]] = {}
        for weight in hdf5.texts(group, "weight_names") or ():
            path = f"{group}/{weight}"
            if path not in hdf5.datasets:
                raise CorruptFileError(f"the file names {quote(weight)} of layer {quote(name)}, and does not hold it")
            scope, _, variable = weight.rpartition("/")
            variable = variable.removesuffix(":0")
            if not scope:  # Keras 1 joins the names by an underscore
                scope, variable = _split_name(variable, inside or _names_of(name, layer))
                variable = unnumbered(variable)
            candidates = inside.get(scope.rpartition("/")[2], [])
            owner = candidates[0] if len(candidates) == 1 else None if inside else layer
            place = owner.path if owner is not None else f"{name}.{scope.replace('/', '.')}" if inside else name
            _, found = owners.setdefault(place, (owner, {}))
            found[variable if variable not in found else weight] = path
        for place, (owner, found) in owners.items():
            class_name = owner.kind if owner is not None else ""
            if not class_name and has_statistics(found):
                class_name = "BatchNormalization"
            yield Variables(place, class_name, owner, found)


def _names_of(name: str, layer: KerasLayer | None) -> tuple[str, ...]:
    """Return the name of a layer, and of the one inside a TimeDistributed."""
    inside = layer.own_config.get("name") if layer is not None and layer.is_distributed else None
    return (name, inside) if isinstance(inside, str) else (name,)


def _split_name(weight: str, layers: Iterable[str]) -> tuple[str, str]:
    """Return the layer and the variable in a name such as ``bn_1_gamma``; no layer where none begins so."""
    owner = max((name for name in layers if weight.startswith(f"{name}_")), key=len, default="")
    return (owner, weight[len(owner) + 1 :]) if owner else ("", weight)
