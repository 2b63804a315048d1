"""A folder of images; subfolders are classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bntool.data.batches import Batch, Batches, LeftOut, name_some
from bntool.data.policies import OnBadData
from bntool.data.preprocessing import Preprocessing
from bntool.data.source import DataOptions, DataSource
from bntool.errors import CorruptFileError, MissingExtraError, UsageError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolderSource(DataSource):
    form = "a folder of images"

    def recognises(self, spec: str) -> bool:
        return Path(spec).is_dir()

    def load(self, spec: str, options: DataOptions) -> Batches:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(f"images need Pillow: pip install 'bntool[images]' ({error})") from error
        if options.preprocessing is None:
            raise UsageError(
                "say what the model expects, e.g. --preprocess imagenet, or resize=40,crop=32,mean=0.5,std=0.5",
                path=spec,
            )
        paths, labels = _list_images(Path(spec))
        if not paths:
            raise UsageError(f"there is no image in this folder (looked for {' '.join(_SUFFIXES)})", path=spec)
        preprocessing = options.preprocessing
        folder = _Images(paths, preprocessing)
        dealt = options.deal(len(paths))
        bad_inputs: list[LeftOut] = []

        def read() -> Iterator[Batch]:
            loader = DataLoader(folder, batch_sampler=dealt, num_workers=options.workers, collate_fn=list)
            for indices, items in zip(dealt, loader, strict=True):
                good = [(i, image) for i, image in zip(indices, items, strict=True) if isinstance(image, torch.Tensor)]
                bad = [text for text in items if isinstance(text, str)]
                if bad and options.on_bad_data is OnBadData.STOP:
                    raise CorruptFileError(f"{bad[0]}; --on-bad-data skip leaves such images out")
                bad_inputs.extend(LeftOut(text, 1) for text in bad)
                if good:
                    yield _collate(good, paths, labels, preprocessing)

        return Batches(
            read,
            description=spec,
            samples=sum(map(len, dealt)),
            has_labels=labels is not None,
            bad_inputs=bad_inputs,
        )


def _list_images(folder: Path) -> tuple[list[Path], list[int] | None]:
    """Images in a fixed order, and the index of the class of each; classes are the subfolders in sorted order."""
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and any(_images_below(child)))
    if not classes:
        return sorted(_images_below(folder)), None
    paths, labels = [], []
    for index, child in enumerate(classes):
        found = sorted(_images_below(child))
        paths += found
        labels += [index] * len(found)
    return paths, labels


def _images_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


class _Images(Dataset[Any]):
    """Pixels of each image, uint8 (3, H, W); a sentence where an image cannot be read."""

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.paths = paths
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return read_image(self.paths[index], self.preprocessing)
        except (OSError, ValueError, SyntaxError, MemoryError, IndexError) as error:  # what Pillow raises on bad files
            return f"{self.paths[index]} cannot be read: {' '.join(str(error).split())}"


def read_image(path: Path, preprocessing: Preprocessing) -> torch.Tensor:
    """Pixels of an image, resized and cropped, as RGB.

    The shorter side is resized with antialiased bilinear interpolation and the middle is cropped, rounding as
    torchvision's ``Resize`` and ``CenterCrop`` do for PIL images.

    Returns:
        uint8, shape (3, H, W).

    Raises:
        OSError, ValueError, SyntaxError: Pillow cannot read it.
    """
    from PIL import Image

    with Image.open(path) as opened:
        try:
            image = opened.convert("RGB")
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
    if preprocessing.resize is not None:
        width, height = image.size
        short, long = sorted((width, height))
        size = (preprocessing.resize, int(preprocessing.resize * long / short))
        image = image.resize(size if width <= height else size[::-1], Image.Resampling.BILINEAR)
    if preprocessing.crop is not None:
        left = round((image.width - preprocessing.crop) / 2)
        top = round((image.height - preprocessing.crop) / 2)
        image = image.crop((left, top, left + preprocessing.crop, top + preprocessing.crop))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).permute(2, 0, 1)


def _collate(
    good: Sequence[tuple[int, torch.Tensor]],
    paths: Sequence[Path],
    labels: Sequence[int] | None,
    preprocessing: Preprocessing,
) -> Batch:
    shapes = {tuple(image.shape) for _, image in good}
    if len(shapes) > 1:
        raise UsageError("the images differ in size: give --preprocess with resize and crop", path=paths[good[0][0]])
    names = [str(paths[index]) for index, _ in good]
    inputs = preprocessing.normalize(torch.stack([image for _, image in good]))
    targets = None if labels is None else torch.tensor([labels[index] for index, _ in good])
    return Batch(inputs, targets, "the batch of " + name_some(names), len(good), names)
