"""Samples in tar archives by the convention of webdataset: files that differ in what follows the first dot only."""

from __future__ import annotations

import contextlib
import glob
import gzip
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bntool.checkpoints.files import describe_failure
from bntool.data.arrays import choose_pixel_steps
from bntool.data.batches import Batches
from bntool.data.columns import LABEL_KEYS, Columns
from bntool.data.fingerprints import make_fingerprint
from bntool.data.images import choose_image_steps
from bntool.data.numpy_files import read_array
from bntool.data.pixels import read_image
from bntool.data.preprocessing import Preprocessing
from bntool.data.samples import Decoding, Sample, explain, find_first, read_label
from bntool.data.source import DataOptions, DataSource
from bntool.data.specs import IMAGE_SUFFIXES, asking_system, is_tar
from bntool.data.streams import read_stream
from bntool.data.tar_members import read_files
from bntool.errors import BntoolError, CorruptFileError, MissingExtraError, UnreadableFileError, UsageError

_LABELS = ("cls", *LABEL_KEYS)
_META = ("__key__", "__url__", "__local_path__")
_ARRAY = "npy"
_OWN = re.compile(r"__[^/]*__(?:$|/)")  # what webdataset keeps for itself

_RANGE = re.compile(r"\{(-?\d{1,255})\.\.(-?\d{1,255})(?:\.\.(-?\d{1,255}))?\}", re.ASCII)
_ENDED = re.compile(r": exit (-?\d+) \(")  # of the program that webdataset started, among all its arguments
_MOST_NAMES = 1_000_000


class TarShardSource(DataSource):
    form = "tar archives of samples, as shards-{0000..0099}.tar"

    def recognises(self, spec: str) -> bool:
        return is_tar(spec)

    def load(self, spec: str, options: DataOptions) -> Batches:
        shards = expand(spec)
        samples = _open_samples(shards)
        first = next(samples, None)
        if first is None:
            raise UsageError("there is no sample in it: files called KEY.png, KEY.cls and the like", path=spec)
        fields = _Fields.of(first, options.columns, spec)
        field = fields.find_input(first)
        if field is None:
            raise UsageError(
                f"which file of a sample holds the input? {first['__key__']} has {_list_fields(first)}; name it with "
                "--inputs (and the label with --labels)",
                path=spec,
            )
        are_images = not field.endswith(_ARRAY)
        if are_images:
            steps: Preprocessing | None = choose_image_steps(options, spec)
        else:
            stored = map(fields.store, itertools.chain([first], samples))
            usable = find_first(map(_Decoder(None), stored), options.on_bad_data)
            assert usable is not None
            steps = choose_array_steps(usable.values, options, spec)
        decode = _Decoder(steps if are_images else None)

        def identify() -> str:
            sizes = [Path(shard).stat().st_size if _is_local(shard) else None for shard in shards]
            return make_fingerprint(
                list(zip([Path(shard).name for shard in shards], sizes, strict=True)),
                fields,
                options.samples,
                options.batch_size,
            )

        return read_stream(
            lambda: (fields.store(sample) for sample in _open_samples(shards)),
            Decoding(decode, steps, are_images=are_images, spec=spec),
            options,
            has_labels=fields.label is not None,
            identify=identify,
        )


def choose_array_steps(values: Any, options: DataOptions, spec: str) -> Preprocessing | None:
    """Choose what is done to samples that are arrays like this one: something to pixels, nothing to others.

    Raises:
        UsageError: nobody says what, or something is to be done to what is no pixels.
    """
    if values.dtype == "uint8":
        return choose_pixel_steps(options, spec)
    if options.preprocessing is not None:
        raise UsageError(f"--preprocess is for uint8 pixels; the arrays hold {values.dtype}", path=spec)
    return None


def expand(spec: str) -> Sequence[str]:
    """Return the archives that a spec names: braces and environment variables as webdataset has them, globs of local
    files.

    Raises:
        MissingExtraError: webdataset is missing.
        UsageError: the spec cannot be understood, or names none.
        UnreadableFileError: one is not there.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise MissingExtraError(
            f"tar archives of samples need webdataset: pip install 'bntool[webdataset]' ({error})"
        ) from error
    with asking_system(spec):
        is_file = Path(spec).is_file()
    if not is_file and _count_names(spec) > _MOST_NAMES:
        raise UsageError(f"it names more than {_MOST_NAMES:,} archives", path=spec)
    try:
        names = [spec] if is_file else list(expand_urls(spec))
    except (ValueError, AssertionError) as error:
        raise UsageError(f"--data cannot be understood: {error}", path=spec) from error
    shards: list[str] = []
    for name in names:
        if _is_local(name) and glob.has_magic(name) and not Path(name).exists():
            shards += sorted(glob.glob(name))  # noqa: PTH207 a path of any kind
        else:
            shards.append(name)
    if not shards:
        raise UsageError("there is no such file", path=spec)
    for shard in shards:
        if _is_local(shard) and not Path(shard).is_file():
            is_there = Path(shard).exists()
            raise UnreadableFileError("not a regular file" if is_there else "there is no such file", path=shard)
    return shards


def _count_names(spec: str) -> float:
    """How many names the ranges of numbers in braces give, of one in another the largest alone; none is made for it."""
    count = largest = 1.0
    for match in _RANGE.finditer(spec):
        first, last, step = (float(number or 1) for number in match.groups())
        size = abs(last - first) / (abs(step) or 1) + 1
        largest = max(largest, size)
        if spec.count("{", 0, match.start()) == spec.count("}", 0, match.start()):
            count *= size
    return max(count, largest)


def _is_local(shard: str) -> bool:
    return "://" not in shard


def _open_samples(shards: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the samples of all archives, each as webdataset has it: bytes by what follows the first dot of a file's
    name.
    """
    from webdataset.tariterators import group_by_keys

    for shard in shards:
        try:
            yield from group_by_keys(_read_shard(shard))
        except BntoolError:
            raise
        except ValueError as error:  # of webdataset, about its own convention
            raise CorruptFileError(str(error.args[0]).partition(" dict_keys(")[0], path=shard) from error
        except OSError as error:
            ended = None if _is_local(shard) else _ENDED.search(str(error))
            what = describe_failure(error) if ended is None else f"what fetches it ended with code {ended[1]}"
            raise UnreadableFileError(what, path=shard) from error


def _read_shard(shard: str) -> Iterator[dict[str, Any]]:
    with _open(shard) as stream:
        for name, content in read_files(stream, shard):
            if _OWN.match(name) is None:
                yield {"fname": name, "data": content, "__url__": shard}


@contextlib.contextmanager
def _open(shard: str) -> Iterator[BinaryIO]:
    with contextlib.ExitStack() as stack:
        if _is_local(shard):
            stream: Any = stack.enter_context(Path(shard).open("rb"))
        else:
            from webdataset.gopen import gopen

            stream = stack.enter_context(gopen(shard))
        if shard.lower().endswith("gz"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        yield stream


class _Stored(NamedTuple):
    """A sample as an archive has it.

    Attributes:
        name: what to call it.
        field: what its input is, e.g. ``jpg``.
        content: the bytes of that file.
        label: the bytes of another; None where there are to be no labels.
    """

    name: str
    field: str
    content: bytes
    label: bytes | None


@dataclass(frozen=True)
class _Fields:
    """The files of a sample that are its input and its label.

    Attributes:
        input: None for the one image or array of a sample.
        label: None for no labels.
    """

    input: str | None
    label: str | None

    @classmethod
    def of(cls, sample: Mapping[str, Any], columns: Columns, spec: str) -> _Fields:
        for name in columns.named:
            if name.lower() not in sample:
                raise UsageError(
                    f"the sample {sample['__key__']} has no {name!r}, but {_list_fields(sample)}", path=spec
                )
        label = columns.labels or next((name for name in _LABELS if name in sample), None)
        input_ = None if columns.inputs is None else columns.inputs.lower()
        return cls(input_, None if label is None or columns.without_labels else label.lower())

    def find_input(self, sample: Mapping[str, Any]) -> str | None:
        """Return the field of the input; None where there is none, or several can be it."""
        if self.input is not None:
            return self.input if self.input in sample else None
        fields = [name for name in sample if name != self.label and _can_be_input(name)]
        return fields[0] if len(fields) == 1 else None

    def store(self, sample: Mapping[str, Any]) -> _Stored | str:
        """Keep what is needed of a sample; return the reason where it cannot be used."""
        name, field = f"{sample['__key__']} of {sample['__url__']}", self.find_input(sample)
        if field is None:
            return f"{name} has {_list_fields(sample)} and no {self.input or 'single image or array'}"
        if self.label is not None and self.label not in sample:
            return f"{name} has no label {self.label}"
        return _Stored(name, field, sample[field], None if self.label is None else sample[self.label])


def _can_be_input(field: str) -> bool:
    ending = field.rpartition(".")[2]
    return ending == _ARRAY or f".{ending}" in IMAGE_SUFFIXES


def _list_fields(sample: Mapping[str, Any]) -> str:
    return ", ".join(name for name in sample if name not in _META)


class _Decoder:
    """Decodes samples as an archive has them.

    Args:
        steps: of images; None where the inputs are arrays.
    """

    def __init__(self, steps: Preprocessing | None) -> None:
        self._steps = steps

    def __call__(self, stored: _Stored | str) -> Sample | str:
        if isinstance(stored, str):
            return stored
        label = None if stored.label is None else read_label(stored.label, stored.name)
        if isinstance(label, str):
            return label
        is_array = stored.field.endswith(_ARRAY)
        if is_array == (self._steps is not None):
            other = "an array" if is_array else "an image"
            return f"the {stored.field} of {stored.name} is {other}, unlike those before"
        try:
            if self._steps is None:
                values = read_array(stored.content)
            else:
                values = read_image(BytesIO(stored.content), self._steps).numpy()
        except Exception as error:  # noqa: BLE001 (Pillow raises anything on bad files)
            return f"the {stored.field} of {stored.name} cannot be read: {explain(error)}"
        return Sample(stored.name, values, label)
