"""The HDF5 files of Keras: whole models (``.h5``), and weights only (``.weights.h5``, and ``.h5`` before that)."""

from __future__ import annotations

from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint, Format
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.torch.state_dicts import RECORD_KEY, parse_record
from bntool.errors import UnknownFormatError

MODEL_CONFIG = "model_config"
_SHOWN = ("keras_version", "backend")


class KerasHdf5(Format):
    """See the module."""

    name = "keras-hdf5"
    title = "Keras (.h5)"
    writer = "keras.writing:write_hdf5"
    trains_whole_layers = True
    keeps_order = False  # Keras orders layers by where they lie in the graph

    def read(self, file: SourceFile) -> Checkpoint:
        from bntool.checkpoints.containers.hdf5 import read_hdf5  # a start-up without Keras files needs none of it
        from bntool.checkpoints.keras.content import make_checkpoint, read_content
        from bntool.checkpoints.keras.model import parse_config

        hdf5 = read_hdf5(file)
        text = hdf5.text("", MODEL_CONFIG)
        numbered = any(name.rpartition("/")[2] == "vars" for name in hdf5.groups)
        named = any(hdf5.texts(name, "layer_names") is not None for name in ("", "model_weights"))
        if not numbered and not named:
            raise UnknownFormatError("this HDF5 file was not written by Keras: it holds neither layers nor their names")
        content = read_content(parse_config(text) if text is not None else None, hdf5)
        entries: dict[str, Any] = {name: value for name in _SHOWN if (value := hdf5.text("", name)) is not None}
        return make_checkpoint(file, self, content, entries=entries, history=parse_record(hdf5.text("", RECORD_KEY)))
