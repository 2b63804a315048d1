"""``.mar`` of TorchServe and ``.nemo`` of NeMo: the checkpoint inside is read, and code beside it named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, GlobalName, GlobalTrust, LoadingCode
from bntool.checkpoints.containers.json_texts import read_json
from bntool.checkpoints.containers.tar_headers import read_tar_headers
from bntool.checkpoints.containers.zips.reading import InflatedRecord, ZipArchive, read_archive
from bntool.checkpoints.files import ByteSource, FileSlice, FileView, SourceFile, quote
from bntool.errors import CorruptFileError, OtherFormatError, UnknownFormatError, UnsafeFileError

_MANIFEST = "MAR-INF/MANIFEST.json"
_MAX_MANIFEST = 1 << 20
_WEIGHTS = "model_weights.ckpt"
_MAX_MEMBERS = 1000
_CODE = (".py", ".pyc", ".so", ".sh", "requirements.txt")  # what TorchServe imports, runs or installs

_HANDLERS = (  # that TorchServe has itself
    *("image_classifier", "image_segmenter", "object_detector", "text_classifier", "text_handler", "vision_handler"),
    *("base_handler", "dali_image_classifier", "densenet_handler"),
)


@dataclass(frozen=True)
class Packed(Content):
    """The checkpoint inside, the name of its member, and the archive where that has checksums."""

    inside: Checkpoint
    member: str
    archive: ZipArchive | None = None


class _Package(Format):
    has_records = False

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:
        packed = Packed.of(checkpoint)
        inside = packed.inside.format.describe_origin(packed.inside)
        return f"{packed.inside.format.title} in {packed.member}", *inside

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        packed = Packed.of(checkpoint)
        own = packed.archive.check_records() if packed.archive is not None else None
        inside = packed.inside.format.verify_checksums(packed.inside)
        return None if own is None and inside is None else (own or 0) + (inside or 0)


class TorchServeArchive(_Package):
    """A ``.mar`` of torch-model-archiver."""

    name = "torchserve"
    title = "TorchServe (.mar)"
    loading = LoadingCode(("torchserve --start --models {path}",))
    read_only = (
        "a .mar archive is only read: take its state dict out with bntool convert CKPT --to torch -o NEW, change that, "
        "and make the archive again with torch-model-archiver"
    )

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        if _MANIFEST not in archive.records:
            raise OtherFormatError(f"the archive has no {_MANIFEST}")
        record = archive.records[_MANIFEST]
        if record.size > _MAX_MANIFEST:
            raise UnsafeFileError(f"the manifest has {record.size} bytes")
        manifest = read_json(archive.read(record), what="the manifest")
        described = manifest.get("model") if isinstance(manifest, dict) else None
        model: dict[str, Any] = described if isinstance(described, dict) else {}
        name = model.get("serializedFile")
        if not isinstance(name, str) or name not in archive.records:
            raise UnknownFormatError("this archive of TorchServe names no file of weights: its handler fetches them")
        weights = archive.records[name]
        source: ByteSource = InflatedRecord(archive, weights)
        if not weights.is_deflated:
            source = FileSlice(file, offset=weights.data_offset, length=weights.size)
        holds_code = any(one.endswith(_CODE) for one in archive.records)
        about: dict[str, Any] = {
            key: model[key] for key in ("modelName", "modelVersion", "handler", "modelFile") if key in model
        }
        checkpoint = _open(file, TorchServeWithCode() if holds_code else self, name, source, archive, about)
        handler = str(model.get("handler", ""))
        if handler in _HANDLERS or handler in archive.records:
            return checkpoint
        imported = GlobalName(handler, called=True, trust=GlobalTrust.UNKNOWN)
        return dataclasses.replace(checkpoint, globals=(*checkpoint.globals, imported))


class TorchServeWithCode(TorchServeArchive):
    """The same with a handler or a model of its own, which TorchServe imports."""

    holds_code = True


class Nemo(_Package):
    """A ``.nemo``: a tar archive of weights, a configuration and what a tokenizer needs."""

    name = "nemo"
    title = "NeMo (.nemo)"
    loading = LoadingCode(("from nemo.core import ModelPT", "model = ModelPT.restore_from({path})  # imports code"))
    holds_code = True  # the configuration names classes that NeMo imports and makes, by any dotted name
    read_only = (
        "a .nemo archive is only read: take its state dict out with bntool convert CKPT --to torch -o NEW, change "
        "that, load it into the model in NeMo and save the model with save_to"
    )

    def recognises(self, path: Location, head: bytes) -> bool:  # noqa: ARG002 (names say nothing)
        return head[257:262] == b"ustar"

    def read(self, file: SourceFile) -> Checkpoint:
        found = {}
        for header in read_tar_headers(file, limit=_MAX_MEMBERS):
            name = header.name.removeprefix("./")
            if header.is_file and name in found:
                raise CorruptFileError(f"two members of the tar archive are named {quote(name)}")
            if header.is_file:
                found[name] = header
        if _WEIGHTS not in found:
            raise OtherFormatError(f"the archive has no {_WEIGHTS}")
        header = found[_WEIGHTS]
        source = FileSlice(file, offset=header.offset, length=header.size)
        return _open(file, self, _WEIGHTS, source, None, {"members": len(found)})


def _open(
    file: SourceFile, format_: Format, name: str, source: ByteSource, archive: ZipArchive | None, about: dict[str, Any]
) -> Checkpoint:
    """Return the checkpoint inside, as one of the archive.

    Raises:
        UnknownFormatError: it is of no format that is read.
        CorruptFileError, UnsafeFileError: it is damaged, or another archive.
    """
    from bntool.checkpoints.formats import open_file

    try:
        inside = open_file(source if isinstance(source, SourceFile) else FileView(source, like=file))
    except UnknownFormatError as error:
        raise UnknownFormatError(f"{quote(name)} in the archive is of no format that bntool reads") from error
    if isinstance(inside.format, _Package):
        raise UnsafeFileError(f"{quote(name)} in the archive is another archive of this kind")
    if inside.format.holds_code and isinstance(format_, TorchServeArchive):
        format_ = TorchServeWithCode()
    return dataclasses.replace(
        inside, file=file, format=format_, entries={**inside.entries, **about}, content=Packed(inside, name, archive)
    )
