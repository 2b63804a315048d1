"""The formats bntool knows, and the two verbs on files: open and save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bntool.checkpoints.addresses import Address, Location, as_location
from bntool.checkpoints.batchnorms import find_unknown_statistics
from bntool.checkpoints.checkpoint import Checkpoint, Format
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.hub_files import CONFIG, choose_file, describe_choice
from bntool.errors import BntoolError, OtherFormatError, UnknownFormatError, UnreadableFileError, UnsafeFileError
from bntool.extensions import load_extensions

_JSON = (b"{", b" ", b"\t", b"\n", b"\r", b"\v", b"\f")  # perhaps after white space
_ZIP, _HDF5, _PICKLE = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"\x80"


class _Known(NamedTuple):
    """A format before its module is imported, and which files may be of it; ``Format.recognises`` decides.

    Attributes:
        place: module of this package, and class.
        starts: one of these stands at ``offset`` of its files.
        endings: or the name of the file ends so.
        has_folders: a path may name a folder or several files; ``Format.locate`` finds the one to read first.
    """

    place: str
    starts: tuple[bytes, ...] = ()
    offset: int = 0
    endings: tuple[str, ...] = ()
    has_folders: bool = False

    def may_hold(self, path: Location, head: bytes) -> bool:
        return head.startswith(self.starts, self.offset) or path.name.endswith(self.endings)


class Formats:
    """The formats in the order they are tried, each imported when a file may be of it: most listings need one."""

    def __init__(self, *known: _Known) -> None:
        self._known = known

    def __iter__(self) -> Iterator[Format]:
        return (_load(known.place) for known in self._known)

    def of_folders(self) -> Iterator[Format]:
        """Yield the formats whose checkpoints may be a folder or several files."""
        return (_load(known.place) for known in self._known if known.has_folders)

    def of_file(self, path: Location, head: bytes) -> Iterator[Format]:
        """Yield the formats that a file may have, judged by its name and first bytes."""
        possible = (_load(known.place) for known in self._known if known.may_hold(path, head))
        return (format_ for format_ in possible if format_.recognises(path, head))


@functools.cache
def _load(place: str) -> Format:
    module, _, name = place.rpartition(".")
    format_: Format = getattr(importlib.import_module(f"bntool.checkpoints.{module}"), name)()
    return format_


# tried in this order: those with an unmistakable signature first
FORMATS = Formats(
    _Known("torch.zip.TorchZip", (_ZIP,)),
    _Known("torch_programs.torchscript.TorchScript", (_ZIP,)),
    _Known("keras.files.KerasArchive", (_ZIP,)),
    _Known("packages.archives.TorchServeArchive", (_ZIP,)),
    _Known("torch_programs.exported.ExportedProgram", (_ZIP,)),
    _Known("torch_programs.exported_before_2_8.LegacyExport", (_ZIP,)),
    _Known("numpy.archive.NumpyArchive", (_ZIP,)),
    _Known("torch.legacy.TorchLegacy", (_PICKLE,)),
    _Known("torch.tar.TorchTar", (b"ustar",), offset=257),
    _Known("packages.archives.Nemo", (b"ustar",), offset=257),
    _Known("torch.distributed.Distributed", endings=(".metadata",), has_folders=True),
    _Known("keras.files.KerasHdf5", (_HDF5,)),
    _Known("caffe.hdf5.CaffeHdf5", (_HDF5,)),
    _Known("safetensors.sharded.Sharded", _JSON, endings=(".index.json",)),
    _Known("safetensors.file.Safetensors", (b"{",), offset=8, endings=(".safetensors",)),
    _Known("torch.numpy_pickle.NumpyPickle", (_PICKLE,), endings=(".pkl", ".pickle")),
    _Known("flax.file.Flax", tuple(bytes((code,)) for code in (*range(0x81, 0x90), 0xDE, 0xDF)), endings=(".msgpack",)),
    _Known("mxnet.params.Mxnet", (b"\x12\x01\0\0\0\0\0\0",)),
    _Known("tensorflow.checkpoint.Tensorflow", (b"\0\0",), endings=(".index",), has_folders=True),
    _Known("onnx.model.Onnx", (b"\x08",), endings=(".onnx",)),
    _Known("mindspore.checkpoint.Mindspore", (b"\x0a",)),
    _Known("caffe.caffemodel.Caffe", (b"\x0a",), endings=(".caffemodel",)),
    _Known("darknet.weights.Darknet", endings=(".weights",)),
)

_HEAD = 4096
_ENDINGS_OF_HDF5 = (".h5", ".hdf5")
_ENDINGS_OF_ZIP = (".keras", ".pt2")
_END_OF_ZIP = 22 + (1 << 16)  # bytes in which the directory of a zip archive ends
_OF_FOLDERS = ".distcp"  # ends names of files that say nothing without .metadata
_PART = ".data-"  # in names of files that say nothing without another, TensorFlow's


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """List what a checkpoint file holds, without running its code and without reading its tensors.

    Args:
        path: a file of any of :data:`FORMATS`, the ``.index.json`` of a sharded checkpoint, a folder of
            torch.distributed.checkpoint, a SavedModel, a folder of checkpoints or the prefix of one of TensorFlow,
            the folder of a hub repository, or an address: ``https://...`` or ``hf://OWNER/NAME[@REVISION][/PATH]``.

    Raises:
        UnreadableFileError: the system does not give the file.
        UnknownFormatError: it is no format that bntool knows.
        CorruptFileError: it contradicts its own format.
        UnsafeFileError: it is built to do harm.
        ExtensionError: no format of bntool's own takes it, and the package of another one cannot be imported.
    """
    location = as_location(path)
    if isinstance(location, Address):
        from bntool.checkpoints.remote.opening import open_address  # files that lie here need no network

        return open_file(open_address(location))
    place = _locate(location)
    if os.path.isdir(place) and (place / CONFIG).is_file():  # noqa: PTH112 (as below)
        return _open_hub_folder(place)
    if os.path.isdir(place):  # noqa: PTH112 (Path.is_dir raises where no file can have the name)
        from bntool.checkpoints.unread_formats import describe_folder  # what can be read needs no words for the rest

        raise UnreadableFileError(describe_folder(place), path=place)
    return open_file(SourceFile(place))


def _locate(path: Path) -> Path:
    """Return the file to read first, where the path is a folder or the prefix of several files."""
    try:
        if path.is_file() and _PART not in path.name:
            return path
        return next((found for one in FORMATS.of_folders() if (found := one.locate(path)) is not None), path)
    except (OSError, ValueError):  # no name that a file can have; opening it says so
        return path


def _open_hub_folder(folder: Path) -> Checkpoint:
    """Return the weights in the folder of a hub repository."""
    names = [path.name for path in folder.iterdir()]
    chosen = choose_file(names)
    if chosen is None:
        raise UnreadableFileError(f"this is a folder, and {describe_choice(names)}", path=folder)
    file = SourceFile(folder / chosen.name)
    file.notes = (chosen.reason,)
    return open_file(file)


def open_file(file: SourceFile) -> Checkpoint:
    """Read a file that is open already, and close it if it cannot be read; see :func:`open_checkpoint`."""
    try:
        if file.size == 0:
            raise UnreadableFileError("the file is empty")
        if file.path.name.endswith(_OF_FOLDERS):
            raise UnknownFormatError("this is a part of a torch.distributed.checkpoint folder; name the folder")
        if isinstance(file.path, Address) and _PART in file.path.name:
            raise UnknownFormatError("this is a part of a TensorFlow checkpoint; name its .index file")
        head = file.read(0, min(file.size, _HEAD))
        _check_one_reading(file, head)
        for candidate in FORMATS.of_file(file.path, head):
            with contextlib.suppress(OtherFormatError):  # formats share the signatures of their containers
                return _look_for_more(candidate.read(file))
        for other in load_extensions("bntool.formats"):
            candidate = other()
            if candidate.recognises(file.path, head):
                with contextlib.suppress(OtherFormatError):
                    return _look_for_more(candidate.read(file))
        from bntool.checkpoints.unread_formats import describe_unknown  # as above

        raise UnknownFormatError(describe_unknown(file.path, head))
    except BntoolError as error:
        file.close()
        raise error.about(file.path) from error.__cause__
    except MemoryError as error:
        file.close()
        raise UnreadableFileError("there is not enough memory to read it", path=file.path) from error


def _check_one_reading(file: SourceFile, head: bytes) -> None:
    """Refuse a file whose usual reader, by its name, finds something else in it than its first bytes say.

    Raises:
        UnsafeFileError: h5py finds an HDF5 file behind other bytes, or a reader of zip archives one that only ends so.
    """
    name, behind = file.path.name, ""
    if name.endswith(_ENDINGS_OF_HDF5) and not head.startswith(_HDF5):
        offset = 512
        while offset + len(_HDF5) <= file.size and not behind:  # where the standard has it, too
            behind = "an HDF5 file" if file.read(offset, len(_HDF5)) == _HDF5 else ""
            offset *= 2
    elif name.endswith(_ENDINGS_OF_ZIP) and not head.startswith(_ZIP):
        tail = min(file.size, _END_OF_ZIP)
        behind = "a zip archive" if b"PK\5\6" in file.read(file.size - tail, tail) else ""
    if behind:
        raise UnsafeFileError(f"this file can be read in two ways: by its first bytes, and as {behind} behind them")


def _look_for_more(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint, with a note of tensors that look like statistics of a layer that its format does not
    know.
    """
    if not checkpoint.format.is_pytorch:  # the others translate all names of theirs
        return checkpoint
    found = [one for state_dict in checkpoint.state_dicts for one in find_unknown_statistics(state_dict)]
    if not found:
        return checkpoint
    return dataclasses.replace(checkpoint, not_understood=(*checkpoint.not_understood, *found))
