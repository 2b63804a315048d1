"""The ``.keras`` archive of Keras 3 and tf_keras: configuration, metadata and weights in a zip."""

from __future__ import annotations

from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint, Format
from bntool.checkpoints.containers.zips.reading import InflatedRecord, ZipArchive, read_archive
from bntool.checkpoints.files import FileSlice, SourceFile
from bntool.checkpoints.torch.state_dicts import RECORD_KEY, as_history
from bntool.errors import CorruptFileError, UnknownFormatError

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"


class KerasArchive(Format):
    """See the module."""

    name = "keras"
    title = "Keras (.keras)"
    writer = "keras.writing:write_archive"
    trains_whole_layers = True
    keeps_order = False  # Keras orders layers by where they lie in the graph

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        if CONFIG not in archive.records or METADATA not in archive.records:
            raise UnknownFormatError("this zip archive was not written by Keras: it has no config.json")
        if WEIGHTS not in archive.records:
            raise CorruptFileError(f"the archive has no {WEIGHTS}: weights as .npz are not read")
        from bntool.checkpoints.containers.hdf5 import read_hdf5  # a start-up without Keras files needs none of it
        from bntool.checkpoints.keras.content import make_checkpoint, read_content
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
        content = read_content(config, read_hdf5(source), place=archive)
        entries: dict[str, Any] = {name: value for name, value in metadata.items() if name != RECORD_KEY}
        return make_checkpoint(file, self, content, entries=entries, history=as_history(metadata.get(RECORD_KEY)))

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        archive: ZipArchive = checkpoint.content.place
        return archive.check_records()
