"""The files that Keras writes: the ``.keras`` archive of Keras 3 and tf_keras, and the HDF5 files of all versions.

An archive holds configuration, metadata and weights in a zip. An HDF5 file is a whole model (``.h5``), or weights only
(``.weights.h5``, and ``.h5`` before that).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.checkpoint import Checkpoint, Format, GlobalTrust, Loader, LoadingCode, StateDict
from bntool.checkpoints.containers.pickles.nodes import text_of
from bntool.checkpoints.containers.zips.reading import InflatedRecord, read_archive
from bntool.checkpoints.files import FileSlice, SourceFile
from bntool.checkpoints.records import RECORD_KEY, as_history, parse_record
from bntool.errors import CorruptFileError, OtherFormatError

if TYPE_CHECKING:
    from bntool.checkpoints.keras.content import KerasContent

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"  # records of an archive
MODEL_CONFIG, TRAINING_CONFIG = "model_config", "training_config"  # attributes of an HDF5 file
NUMBERED_WEIGHTS = ".weights.h5"  # ends the names of files that Keras 2.12 and later read as numbered weights
_SHOWN = ("keras_version", "backend")


class _Keras(Format):
    """The base of both kinds of files."""

    loader = Loader.KERAS
    loading = LoadingCode(("import keras", "model = keras.models.load_model({path})"))
    graph_reader = "bntool.graphs.stored.keras:keras_graph"
    trains_whole_layers = True
    keeps_order = False  # Keras orders layers by where they lie in the graph

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:
        kind = checkpoint.entries.get("model_config")
        version = text_of(checkpoint.entries.get("keras_version")) or ""
        return f"Keras {version}".strip(), f"{text_of(kind)} model" if kind is not None else "weights only"


class KerasArchive(_Keras):
    """The ``.keras`` archive."""

    name = "keras"
    title = "Keras (.keras)"
    writer = "keras.writing:write_archive"

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        if CONFIG not in archive.records or METADATA not in archive.records:
            raise OtherFormatError("the archive has no config.json and metadata.json")
        if WEIGHTS not in archive.records:
            raise CorruptFileError(f"the archive has no {WEIGHTS}: weights as .npz are not read")
        from bntool.checkpoints.containers.hdf5 import read_hdf5  # a start-up without Keras files needs none of it
        from bntool.checkpoints.keras.content import make_checkpoint, read_content
        from bntool.checkpoints.keras.fit import describe_misfit
        from bntool.checkpoints.keras.model import parse_config

        config = parse_config(archive.read(archive.records[CONFIG]))
        metadata = parse_config(archive.read(archive.records[METADATA]))
        if not isinstance(config, dict) or not isinstance(metadata, dict):
            raise CorruptFileError("the configuration of the model is not a JSON object")
        record = archive.records[WEIGHTS]
        if record.is_deflated:
            source: Any = InflatedRecord(archive, record)
        else:
            source = FileSlice(file, offset=record.data_offset, length=record.size)
        content = read_content(config, read_hdf5(source), archive=archive)
        entries: dict[str, Any] = {name: value for name, value in metadata.items() if name != RECORD_KEY}
        history = as_history(metadata.get(RECORD_KEY))
        return _hold_against(
            describe_misfit(content), make_checkpoint(file, self, content, entries=entries, history=history)
        )

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        from bntool.checkpoints.keras.content import KerasContent

        archive = KerasContent.of(checkpoint).archive
        assert archive is not None
        return archive.check_records()


class KerasHdf5(_Keras):
    """An HDF5 file."""

    name = "keras-hdf5"
    title = "Keras (.h5)"
    writer = "keras.writing:write_hdf5"
    takes_keras_config = True

    def describe_loading(self, checkpoint: Checkpoint, path: str) -> LoadingCode | None:
        from bntool.checkpoints.keras.content import KerasContent, WeightsLayout

        content = KerasContent.of(checkpoint)
        if self.single_file and content.config is not None:
            return self.loading
        is_numbered, ends_so = content.layout is WeightsLayout.NUMBERED, path.endswith(NUMBERED_WEIGHTS)
        comment = ""
        if is_numbered and not ends_so:
            comment = f"  # under a name that ends with {NUMBERED_WEIGHTS}: others are read otherwise"
        elif ends_so and not is_numbered:
            comment = f"  # Keras 2.12 and later: under a name that does not end with {NUMBERED_WEIGHTS}"
        return LoadingCode((*self._make_model(content), "model.load_weights({path})" + comment))

    def _make_model(self, content: KerasContent) -> Sequence[str]:  # noqa: ARG002 (for those that have one)
        """Return lines that make the model which weights alone are loaded into; none where it is the caller's."""
        return ()

    def read(self, file: SourceFile) -> Checkpoint:
        from bntool.checkpoints.containers.hdf5 import read_hdf5  # a start-up without Keras files needs none of it
        from bntool.checkpoints.keras.content import make_checkpoint, read_content
        from bntool.checkpoints.keras.fit import describe_misfit
        from bntool.checkpoints.keras.model import parse_config

        hdf5 = read_hdf5(file)
        text = hdf5.text("", MODEL_CONFIG)
        numbered = any(name.rpartition("/")[2] == "vars" for name in hdf5.groups)
        named = any(hdf5.texts(name, "layer_names") is not None for name in ("", "model_weights"))
        if not numbered and not named:
            raise OtherFormatError("it holds neither layers nor their names")
        content = read_content(parse_config(text) if text is not None else None, hdf5)
        entries: dict[str, Any] = {name: value for name in _SHOWN if (value := hdf5.text("", name)) is not None}
        backend = hdf5.text("", "backend") or hdf5.text("model_weights", "backend")
        history, training = parse_record(hdf5.text("", RECORD_KEY)), hdf5.text("", TRAINING_CONFIG)
        checkpoint = make_checkpoint(
            file,
            TheanoHdf5() if backend == "theano" else Keras1Hdf5() if content.names.is_keras_1 else self,
            content,
            entries=entries,
            history=history,
            training=parse_config(training) if training is not None else None,
        )
        return _hold_against(describe_misfit(content), checkpoint)


class TheanoHdf5(KerasHdf5):
    """One that was saved on Theano, which turns kernels when it convolves (``_need_convert_kernel`` of Keras 2)."""

    def describe_assumptions(self, state_dict: StateDict) -> Sequence[str]:
        kernels = _list_kernels(state_dict)
        said = f"{kernels} lie as Theano keeps kernels, by half a turn from PyTorch's: they are not turned"
        return (said,) if kernels else ()


class Keras1Hdf5(KerasHdf5):
    """One of Keras 1, which notes neither the backend nor, beside weights alone, its version."""

    def describe_assumptions(self, state_dict: StateDict) -> Sequence[str]:
        kernels = _list_kernels(state_dict)
        said = (
            f"{kernels} lie as Keras 1 left them, which does not note the backend: those of Theano are by half a turn "
            "from PyTorch's, and are not turned"
        )
        return (said,) if kernels else ()

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:
        version = text_of(checkpoint.entries.get("keras_version"))
        keeps_variances = any(name.endswith(".running_var") for one in checkpoint.state_dicts for name in one.tensors)
        if version is not None or not keeps_variances:
            return super().describe_origin(checkpoint)
        return "Keras 1", "running_std read as the variance that it is since 1.0.7"


def _list_kernels(state_dict: StateDict) -> str:
    kernels = [name for name, tensor in state_dict.tensors.items() if len(tensor.shape) > 2]
    return f"{kernels[0]} and {len(kernels) - 1} more" if len(kernels) > 1 else "".join(kernels)


def _hold_against(misfit: str, checkpoint: Checkpoint) -> Checkpoint:
    """Refuse weights that are not those of the configuration; what runs code when it is loaded is shown nevertheless.

    Raises:
        CorruptFileError: weights and configuration do not belong together.
    """
    if not misfit:
        return checkpoint
    if all(name.trust is GlobalTrust.KNOWN for name in checkpoint.globals):
        raise CorruptFileError(misfit)
    format_ = copy.copy(checkpoint.format)
    format_.read_only = misfit
    return dataclasses.replace(checkpoint, format=format_)
