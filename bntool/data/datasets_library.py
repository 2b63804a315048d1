"""Datasets of the library ``datasets``: on the hub, saved in a folder, or Parquet."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from bntool.data.batches import Batch, Batches
from bntool.data.columns import INPUT_KEYS, LABEL_KEYS, Columns
from bntool.data.fingerprints import make_fingerprint
from bntool.data.images import choose_image_steps
from bntool.data.pixels import read_image
from bntool.data.policies import LeftOut
from bntool.data.preprocessing import Preprocessing
from bntool.data.samples import Decoding, Sample, explain, find_first, read_label
from bntool.data.source import DataOptions, DataSource
from bntool.data.specs import HUB, is_dataset, is_saved, split_off
from bntool.data.streams import read_stream
from bntool.data.tar_shards import choose_array_steps
from bntool.errors import MissingExtraError, UnreadableFileError, UsageError

_PREFERRED_SPLIT = "train"


class DatasetSource(DataSource):
    form = "a dataset: hf://datasets/OWNER/NAME, a folder that datasets saved, Parquet; each with :SPLIT"

    def recognises(self, spec: str) -> bool:
        return is_dataset(spec)

    def load(self, spec: str, options: DataOptions) -> Batches:
        dataset, identity = _open(spec)
        features = dataset.features
        if features is None:  # a stream that says nothing of itself before it is read
            features = dataset._resolve_features().features  # noqa: SLF001 what the library itself asks
        chosen = _Choice.of(features, options.columns, spec)
        if chosen.is_image:
            from datasets import Image

            dataset = dataset.cast_column(chosen.input, Image(decode=False))
        dataset = dataset.with_format("numpy")
        if chosen.is_image:
            steps: Preprocessing | None = choose_image_steps(options, spec)
        else:
            steps = choose_array_steps(_take_first(dataset, chosen, options, spec).values, options, spec)
        reader = _RowReader(chosen, steps if chosen.is_image else None, spec)
        if not hasattr(dataset, "__len__"):
            return read_stream(
                lambda: _number(dataset),
                Decoding(reader, steps, are_images=chosen.is_image, spec=spec),
                options,
                has_labels=chosen.label is not None,
                identify=lambda: make_fingerprint(identity, chosen.names, options.samples, options.batch_size),
            )
        dealt = options.deal(len(dataset))
        bad_inputs: list[LeftOut] = []
        decoding = Decoding(_IndexReader(dataset, reader), steps, are_images=chosen.is_image, spec=spec)
        worth_it = chosen.is_image and len(dealt.batches) > 1
        workers = options.decoding_workers if worth_it else options.workers or 0

        def read() -> Iterator[Batch]:
            return decoding.run(
                dealt.batches.items(), workers=workers, on_bad_data=options.on_bad_data, bad_inputs=bad_inputs
            )

        return Batches(
            read,
            description=spec,
            samples=dealt.samples,
            has_labels=chosen.label is not None,
            bad_inputs=bad_inputs,
            preprocessing=steps,
            share=options.share,
            count=dealt.total,
            identify=lambda: make_fingerprint(identity, chosen.names, dealt.fingerprint),
        )


def _open(spec: str) -> tuple[Any, Any]:
    """Return the dataset, and what tells it from another one.

    Raises:
        MissingExtraError: the library is missing.
        UnreadableFileError: the library cannot load it.
        UsageError: it has several splits and none is named.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"datasets and Parquet files need datasets: pip install 'bntool[datasets]' ({error})"
        ) from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors that it logs it raises, too
    place, wanted = split_off(spec)
    try:
        if is_saved(place):
            found: Any = datasets.load_from_disk(place)
        elif spec.startswith(HUB):
            found = datasets.load_dataset(place.removeprefix(HUB), streaming=True)
        elif Path(place).is_dir():
            found = datasets.load_dataset(place, streaming=True)
        else:
            files = [place] if Path(place).is_file() else sorted(glob.glob(place))  # noqa: PTH207 a path of any kind
            if not files:
                raise UnreadableFileError("there is no such file", path=place)
            found = datasets.load_dataset("parquet", data_files={_PREFERRED_SPLIT: files}, streaming=True)
    except UnreadableFileError:
        raise
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableFileError(f"datasets cannot load it: {what}", path=spec, remedy="") from error
    if isinstance(found, Mapping):
        chosen = _choose_split(found, wanted, spec)
        return found[chosen], (getattr(found[chosen], "_fingerprint", None) or place, chosen)
    if wanted is not None:
        raise UsageError(f"the dataset has no splits; name it without :{wanted}", path=spec)
    # a saved one says what it was made of; of a stream nothing tells before it is read
    return found, (getattr(found, "_fingerprint", None) or place, None)


def _choose_split(splits: Mapping[str, Any], wanted: str | None, spec: str) -> str:
    names = [str(name) for name in splits]
    if wanted is not None and wanted not in names:
        raise UsageError(f"the dataset has no split {wanted!r}, but {', '.join(names)}", path=spec)
    if wanted is not None:
        return wanted
    if len(names) == 1 or _PREFERRED_SPLIT in names:
        return names[0] if len(names) == 1 else _PREFERRED_SPLIT
    raise UsageError(f"which split? The dataset has {', '.join(names)}; name it as {spec}:{names[0]}", path=spec)


class _Choice:
    """The columns that are the input and the label.

    Args:
        input_, label: their names; no label where there are to be no labels.
        feature: what the library says of the input.
    """

    def __init__(self, input_: str, label: str | None, feature: Any) -> None:
        self.input = input_
        self.label = label
        self.is_image = _kind(feature) == "Image"  # and no array
        self.dtype = _find_dtype(feature)

    @property
    def names(self) -> tuple[str, str | None]:
        return self.input, self.label

    @classmethod
    def of(cls, features: Mapping[str, Any], columns: Columns, spec: str) -> _Choice:
        """Find what the user does not name.

        Raises:
            UsageError: a name is none of the dataset's, or it is not told which column is the input.
        """
        for name in columns.named:
            if name not in features:
                raise UsageError(f"the dataset has no column {name!r}, but {', '.join(features)}", path=spec)
        found = (name for name in _order(features, LABEL_KEYS) if _is_label(name, features[name]))
        label = None if columns.without_labels else columns.labels or next(found, None)
        input_ = columns.inputs or _find_input({n: f for n, f in features.items() if n != label})
        if input_ is None:
            raise UsageError(
                f"which column holds the inputs, as images or arrays? The dataset has {', '.join(features)}; name it "
                "with --inputs (and the labels with --labels), or give FILE.py:factory",
                path=spec,
            )
        return cls(input_, label, features[input_])


def _find_input(features: Mapping[str, Any]) -> str | None:
    """Return the one image, or else the one array; of several the one of a usual name."""
    images = [name for name, feature in features.items() if _kind(feature) == "Image"]
    candidates = images or [name for name, feature in features.items() if _is_array(feature)]
    known = next((name for name in INPUT_KEYS if name in candidates), None)
    return known or (candidates[0] if len(candidates) == 1 else None)


def _order(features: Mapping[str, Any], first: tuple[str, ...]) -> Iterator[str]:
    """Order the columns, those with usual names first."""
    yield from (name for name in first if name in features)
    yield from (name for name in features if name not in first)


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _is_array(feature: Any) -> bool:
    return isinstance(feature, list) or _kind(feature).startswith("Array") or _kind(feature) in ("Sequence", "List")


def _find_dtype(feature: Any) -> str | None:
    """Find the dtype of the elements of an array, as numpy calls it; None where it is none that numpy has."""
    while not hasattr(feature, "dtype") and (isinstance(feature, list) or hasattr(feature, "feature")):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    dtype = getattr(feature, "dtype", None)
    return dtype if isinstance(dtype, str) and hasattr(np, dtype) else None


def _is_label(name: str, feature: Any) -> bool:
    is_integer = _kind(feature) == "Value" and "int" in str(feature.dtype)
    return _kind(feature) == "ClassLabel" or (name in LABEL_KEYS and is_integer)


def _number(dataset: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    iterator = enumerate(dataset)
    while True:
        try:
            item = next(iterator, None)
        except Exception as error:
            what = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableFileError(f"datasets cannot read on: {what}", remedy="") from error
        if item is None:
            return
        yield item


def _take_first(dataset: Any, choice: _Choice, options: DataOptions, spec: str) -> Sample:
    """Take the first sample that can be used, which is an array.

    Raises:
        UsageError: there is none.
        CorruptFileError: it cannot be read.
    """
    samples = map(_RowReader(choice, None, spec), _number(dataset))
    first = find_first(samples, options.on_bad_data)
    if first is None:
        raise UsageError("the dataset is empty", path=spec)
    return first


class _RowReader:
    """Decodes a row of a dataset, given with its number."""

    def __init__(self, choice: _Choice, steps: Preprocessing | None, spec: str) -> None:
        self._choice = choice
        self._steps = steps
        self._spec = spec

    def __call__(self, stored: tuple[int, Mapping[str, Any]]) -> Sample | str:
        number, row = stored
        name = f"row {number} of {self._spec}"
        content = row[self._choice.input]
        label = None if self._choice.label is None else read_label(row[self._choice.label], name)
        if isinstance(label, str):
            return label
        if content is None:
            return f"{name} has no {self._choice.input}"
        if self._steps is None:
            return self._read_array(name, content, label)
        try:
            pixels = read_image(_open_image(content), self._steps).numpy()
        except Exception as error:  # noqa: BLE001 (Pillow raises anything on bad files)
            return f"the image of {name} cannot be read: {explain(error)}"
        return Sample(name, pixels, label)

    def _read_array(self, name: str, values: Any, label: int | None) -> Sample | str:
        if values.dtype.kind not in "fiub":
            return f"{name} holds no numbers"
        # numpy is given pixels as int64, and NaN for whole numbers that are missing
        if self._choice.dtype is not None and np.dtype(self._choice.dtype).kind in "iu":
            if values.dtype.kind == "f":
                return f"{name} has no {self._choice.input}, or lacks numbers of it"
            values = values.astype(self._choice.dtype)
        return Sample(name, values, label)


class _IndexReader:
    """Decodes a row by its number."""

    def __init__(self, dataset: Any, reader: _RowReader) -> None:
        self._dataset = dataset
        self._reader = reader

    def __call__(self, index: int) -> Sample | str:
        return self._reader((index, self._dataset[index]))


def _open_image(stored: Mapping[str, Any]) -> BytesIO:
    """Return the file of an image: in the dataset itself, or where it says that it lies."""
    content = stored["bytes"]
    if content is None:
        from datasets.utils.file_utils import xopen

        with xopen(stored["path"], "rb") as stream:
            content = stream.read()
    return BytesIO(content)
