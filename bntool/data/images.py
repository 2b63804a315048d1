"""Images in files: a folder of them, whose subfolders are classes, or a list of their paths."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bntool.checkpoints.files import describe_failure
from bntool.data.batches import Batch, Batches
from bntool.data.fingerprints import make_fingerprint
from bntool.data.pixels import read_image
from bntool.data.policies import LeftOut
from bntool.data.preprocessing import Preprocessing
from bntool.data.samples import Decoding, Sample, explain
from bntool.data.source import DataOptions, DataSource
from bntool.data.specs import IMAGE_SUFFIXES, is_image_list
from bntool.errors import MissingExtraError, UnreadableFileError, UsageError

# a path, which may hold blanks, and what may follow it: the index of a class
_LINE = re.compile(rf"(.+(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))(?:[\s,;]+(\d{{1,18}}))?", re.IGNORECASE)


class ImageFolderSource(DataSource):
    form = "a folder of images"

    def recognises(self, spec: str) -> bool:
        return Path(spec).is_dir()

    def load(self, spec: str, options: DataOptions) -> Batches:
        options.columns.refuse_names(spec, what="of images in a folder the subfolders are the labels")
        steps = choose_image_steps(options, spec)
        try:
            found = find_images(Path(spec))
        except OSError as error:
            raise UnreadableFileError(describe_failure(error), path=spec) from error
        if not found.paths:
            raise UsageError(f"there is no image in this folder (looked for {' '.join(IMAGE_SUFFIXES)})", path=spec)
        return _read_files(found, spec, steps, options, root=Path(spec))


class ImageListSource(DataSource):
    form = "a .txt file of the paths of images"

    def recognises(self, spec: str) -> bool:
        return is_image_list(spec)

    def load(self, spec: str, options: DataOptions) -> Batches:
        options.columns.refuse_names(spec, what="in a list of images they are what follows the paths")
        steps = choose_image_steps(options, spec)
        return _read_files(read_list(Path(spec)), spec, steps, options, root=Path(spec).parent)


def choose_image_steps(options: DataOptions, spec: str) -> Preprocessing:
    """Choose what is done to images, if they can be read.

    Raises:
        MissingExtraError: Pillow is missing.
        UsageError: nobody says what is to be done to them.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"images need Pillow: pip install 'bntool[images]' ({error})") from error
    steps = options.preprocessing or options.model_preprocessing
    if steps is None:
        raise UsageError(
            "say what the model expects, e.g. --preprocess imagenet, or resize=40,crop=32,mean=0.5,std=0.5", path=spec
        )
    return steps


def _read_files(found: ImageFiles, spec: str, steps: Preprocessing, options: DataOptions, *, root: Path) -> Batches:
    """Return batches of images, dealt by bntool."""
    if options.columns.without_labels:
        found = replace(found, labels=None, classes=None)
    dealt = options.deal(len(found.paths))
    bad_inputs: list[LeftOut] = []
    decoding = Decoding(_ImageReader(found, steps), steps, are_images=True, spec=spec)

    def read() -> Iterator[Batch]:
        # a single batch leaves nothing to do meanwhile
        workers = options.decoding_workers if len(dealt.batches) > 1 else options.workers or 0
        return decoding.run(
            dealt.batches.items(), workers=workers, on_bad_data=options.on_bad_data, bad_inputs=bad_inputs
        )

    def identify() -> str:
        places = [(os.path.relpath(path, root).replace(os.sep, "/"), _find_size(path)) for path in found.paths]
        return make_fingerprint(places, found.labels is None, dealt.fingerprint)

    return Batches(
        read,
        description=spec,
        samples=dealt.samples,
        has_labels=found.labels is not None,
        bad_inputs=bad_inputs,
        preprocessing=steps,
        classes=found.classes,
        share=options.share,
        count=dealt.total,
        identify=identify,
    )


def _find_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # of a list: it is said when it is read
        return None


def _waits_for_others(mode: int) -> bool:
    """Whether opening it, or reading it to its end, may never be done."""
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


@dataclass(frozen=True)
class ImageFiles:
    """Images in files.

    Attributes:
        paths: in a fixed order.
        labels: the index of the class of each; None where nothing tells.
        classes: their names, in the order of their indices; None where nothing tells.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None


def find_images(folder: Path) -> ImageFiles:
    """List the images of a folder and of the folders in it.

    Subfolders in sorted order are the classes, as torchvision's ``ImageFolder`` has it; images below a subfolder are of
    its class. Where images also lie beside the subfolders, these are no classes. What is hidden is passed over, and so
    are links to a folder that they lie in.
    """
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    classes = [child for child in children if child.is_dir() and not _leads_back(child)]
    below = [sorted(_images_below(child)) for child in classes]
    beside = [child for child in children if _is_image(child)]
    if beside or not any(below):
        return ImageFiles(tuple(sorted([*beside, *(path for paths in below for path in paths)])))
    return ImageFiles(
        paths=tuple(path for paths in below for path in paths),
        labels=tuple(index for index, paths in enumerate(below) for _ in paths),
        classes=tuple(child.name for child in classes),
    )


def read_list(path: Path) -> ImageFiles:
    """Read a list of images: a path on each line, from the folder of the list on, and perhaps the index of its class.

    Lines that are empty or begin with ``#`` are passed over.

    Raises:
        UnreadableFileError: the system does not give the file.
        UsageError: a line is no path of an image, or only some have an index.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UnreadableFileError(describe_failure(error), path=path) from error
    except UnicodeDecodeError as error:
        raise UsageError("a list of the paths of images is text in UTF-8", path=path) from error
    found: list[tuple[Path, str | None]] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            shown = f"{line[:60]}..." if len(line) > 60 else line
            raise UsageError(f"line {number} is no path of an image ({' '.join(IMAGE_SUFFIXES)}): {shown!r}", path=path)
        found.append((path.parent / match[1], match[2]))
    if not found:
        raise UsageError("there is no path of an image in this list", path=path)
    labels = [int(label) for _, label in found if label is not None]
    if labels and len(labels) < len(found):
        raise UsageError(f"{len(labels)} of {len(found)} images have a class: all of them, or none, must", path=path)
    return ImageFiles(tuple(image for image, _ in found), tuple(labels) or None)


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(Path(parent, name))]
        yield from (Path(parent, name) for name in files if not name.startswith(".") and _is_image(Path(parent, name)))


def _leads_back(folder: Path) -> bool:
    """Return whether it is a link to a folder that it lies in: its images would be found again and again."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


class _ImageReader:
    """Decodes an image by its index."""

    def __init__(self, files: ImageFiles, preprocessing: Preprocessing) -> None:
        self._files = files
        self._preprocessing = preprocessing

    def __call__(self, index: int) -> Sample | str:
        path, labels = self._files.paths[index], self._files.labels
        try:
            if _waits_for_others(path.stat().st_mode):
                return f"{path} cannot be read: not a regular file"
            pixels = read_image(path, self._preprocessing).numpy()
        except Exception as error:  # noqa: BLE001 (Pillow raises anything on bad files)
            return f"{path} cannot be read: {explain(error)}"
        return Sample(str(path), pixels, None if labels is None else labels[index])
