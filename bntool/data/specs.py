"""Telling the kinds of ``--data`` specs and what each needs, apart from the code that needs torch."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from bntool.checkpoints.files import describe_failure
from bntool.errors import MissingExtraError, UnreadableFileError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
LIST_SUFFIXES = (".txt", ".lst")
HUB = "hf://datasets/"
# a command that webdataset would run is no name of data
_TAR = re.compile(r"(?!pipe:).*\.(tar|tar\.gz|tgz)", re.IGNORECASE | re.DOTALL)
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes


def is_tar(spec: str) -> bool:
    """Return whether it names tar archives, one or many: ``shards-{0000..0099}.tar``."""
    return _TAR.fullmatch(spec) is not None


def is_image_list(spec: str) -> bool:
    """Return whether it names a file of the paths of images."""
    return spec.lower().endswith(LIST_SUFFIXES)


def is_dataset(spec: str) -> bool:
    """Return whether it names a dataset: on the hub, a folder that datasets saved, or Parquet."""
    place, _ = split_off(spec)
    return spec.startswith(HUB) or place.lower().endswith(".parquet") or is_saved(place) or holds_parquet(place)


def split_off(spec: str) -> tuple[str, str | None]:
    """Split ``NAME:SPLIT`` in two; None where no split is named."""
    place, colon, split = spec.rpartition(":")
    is_named = bool(colon) and len(place) > 1 and re.fullmatch(r"[A-Za-z_][\w.-]*", split, re.ASCII) is not None
    return (place, split) if is_named else (spec, None)


def is_saved(place: str) -> bool:
    """Return whether it is a folder that ``save_to_disk`` wrote."""
    return any(Path(place, name).is_file() for name in _SAVED)


def holds_parquet(place: str) -> bool:
    """Return whether it is a folder with Parquet files in it, or in its folder ``data`` as on the hub."""
    folder = Path(place)
    return folder.is_dir() and any(any(part.glob("*.parquet")) for part in (folder, folder / "data"))


def check_data(spec: str) -> None:
    """Find out before torch is imported, which takes seconds, whether the package is there that a spec needs.

    Raises:
        MissingExtraError: it is not.
        UnreadableFileError: the system does not say what lies there.
    """
    with asking_system(spec):
        if is_tar(spec):
            _require("webdataset", "webdataset", what="tar archives of samples")
        elif is_dataset(spec):
            _require("datasets", "datasets", what="datasets and Parquet files")
        elif Path(spec).is_dir() or is_image_list(spec):
            _require("PIL", "images", what="images", package="Pillow")


@contextlib.contextmanager
def asking_system(spec: str) -> Iterator[None]:
    """Name the path where the system does not let it be looked at: too long, or in a folder without permission.

    Raises:
        UnreadableFileError
    """
    try:
        yield
    except OSError as error:
        raise UnreadableFileError(describe_failure(error), path=spec) from error


def _require(module: str, extra: str, *, what: str, package: str | None = None) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(
            f"{what} need {package or module}: pip install 'bntool[{extra}]' (No module named '{module}')"
        )
