"""A folder of images; subfolders are classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bntool.checkpoints.files import describe_failure
from bntool.data.batches import Batch, Batches, name_some
from bntool.data.fingerprints import make_fingerprint
from bntool.data.pixels import read_image
from bntool.data.policies import LeftOut, OnBadData
from bntool.data.preprocessing import Preprocessing
from bntool.data.source import DataOptions, DataSource
from bntool.data.workers import LostWorkerError, iterate
from bntool.errors import CorruptFileError, MissingExtraError, RefusedError, UnreadableFileError, UsageError

_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


class ImageFolderSource(DataSource):
    form = "a folder of images"

    def recognises(self, spec: str) -> bool:
        return Path(spec).is_dir()

    def load(self, spec: str, options: DataOptions) -> Batches:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(f"images need Pillow: pip install 'bntool[images]' ({error})") from error
        preprocessing = options.preprocessing or options.model_preprocessing
        if preprocessing is None:
            raise UsageError(
                "say what the model expects, e.g. --preprocess imagenet, or resize=40,crop=32,mean=0.5,std=0.5",
                path=spec,
            )
        try:
            found = find_images(Path(spec))
        except OSError as error:
            raise UnreadableFileError(describe_failure(error), path=spec) from error
        if not found.paths:
            raise UsageError(f"there is no image in this folder (looked for {' '.join(_SUFFIXES)})", path=spec)
        paths = found.paths
        folder = _Images(paths, preprocessing)
        dealt = options.deal(len(paths))
        bad_inputs: list[LeftOut] = []

        def read() -> Iterator[Batch]:
            indices_of_each = list(dealt.batches.values())
            loader = DataLoader(folder, batch_sampler=indices_of_each, num_workers=options.workers, collate_fn=list)
            for (position, indices), items in zip(dealt.batches.items(), _watch_workers(loader), strict=True):
                good = [(i, image) for i, image in zip(indices, items, strict=True) if isinstance(image, torch.Tensor)]
                bad = [text for text in items if isinstance(text, str)]
                if bad and options.on_bad_data is OnBadData.STOP:
                    raise CorruptFileError(f"{bad[0]}; --on-bad-data skip leaves such images out")
                bad_inputs.extend(LeftOut(text, 1) for text in bad)
                if good:
                    yield replace(_collate(good, found, preprocessing), position=position)

        def identify() -> str:
            places = [(path.relative_to(spec).as_posix(), path.stat().st_size) for path in paths]
            return make_fingerprint(places, dealt.fingerprint)

        return Batches(
            read,
            description=spec,
            samples=dealt.samples,
            has_labels=found.labels is not None,
            bad_inputs=bad_inputs,
            preprocessing=preprocessing,
            classes=found.classes,
            share=options.share,
            count=dealt.total,
            identify=identify,
        )


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.

    Attributes:
        paths: in a fixed order.
        labels: the index of the class of each; None where the folder does not tell.
        classes: their names, in the order of their indices.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None


def find_images(folder: Path) -> ImageFolder:
    """List the images of a folder and of the folders in it.

    Subfolders in sorted order are the classes, as torchvision's ``ImageFolder`` has it; images below a subfolder are of
    its class. Where images also lie beside the subfolders, these are no classes. What is hidden is passed over.
    """
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    classes = [child for child in children if child.is_dir()]
    below = [sorted(_images_below(child)) for child in classes]
    beside = [child for child in children if _is_image(child)]
    if beside or not any(below):
        return ImageFolder(tuple(sorted([*beside, *(path for paths in below for path in paths)])))
    return ImageFolder(
        paths=tuple(path for paths in below for path in paths),
        labels=tuple(index for index, paths in enumerate(below) for _ in paths),
        classes=tuple(child.name for child in classes),
    )


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith(".") and _is_image(Path(parent, name)))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


class _Images(Dataset[Any]):
    """Pixels of each image, uint8 (C, H, W); a sentence where an image cannot be read."""

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.paths = paths
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return read_image(self.paths[index], self.preprocessing)
        except Exception as error:  # noqa: BLE001 (Pillow raises anything on bad files)
            return f"{self.paths[index]} cannot be read: {_explain(error)}"


def _explain(error: Exception) -> str:
    """The reason why an image cannot be read, without the path that Pillow and the system add."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is empty or no image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _watch_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """The items of a loader.

    Raises:
        RefusedError: a worker was lost.
    """
    try:
        yield from iterate(loader)
    except LostWorkerError as error:
        raise RefusedError(" ".join(str(error).split())) from error


def _collate(good: Sequence[tuple[int, torch.Tensor]], folder: ImageFolder, preprocessing: Preprocessing) -> Batch:
    names = [str(folder.paths[index]) for index, _ in good]
    sizes = {tuple(image.shape[1:]) for _, image in good}
    if len(sizes) > 1:
        other = next(index for index, (_, image) in enumerate(good) if image.shape != good[0][1].shape)
        (_, height, width), (_, other_height, other_width) = good[0][1].shape, good[other][1].shape
        raise UsageError(
            f"the images differ in size: this one is {width}x{height}, {names[other]} {other_width}x{other_height}; "
            "give --preprocess with resize and crop",
            path=names[0],
        )
    inputs = preprocessing.normalize(torch.stack([image for _, image in good]))
    targets = None if folder.labels is None else torch.tensor([folder.labels[index] for index, _ in good], device="cpu")
    return Batch(inputs, targets, "the batch of " + name_some(names), len(good), names)
