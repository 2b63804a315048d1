"""``--data``: a spec becomes batches."""

from __future__ import annotations

from bntool.data.arrays import ArraySource
from bntool.data.batches import Batches
from bntool.data.columns import FOUND, Columns
from bntool.data.datasets_library import DatasetSource
from bntool.data.factory import FactoryDataSource
from bntool.data.images import ImageFolderSource, ImageListSource
from bntool.data.policies import OnBadData
from bntool.data.preprocessing import Preprocessing
from bntool.data.shares import WHOLE, Share
from bntool.data.source import DataOptions, DataSource
from bntool.data.specs import asking_system
from bntool.data.tar_shards import TarShardSource
from bntool.errors import UsageError

# tried in this order
DATA_SOURCES: tuple[DataSource, ...] = (
    DatasetSource(),
    TarShardSource(),
    ImageFolderSource(),
    FactoryDataSource(),
    ArraySource(),
    ImageListSource(),
)


def load_data(  # noqa: PLR0913 (one for each option of the command line)
    spec: str,
    *,
    batch_size: int,
    samples: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    preprocessing: Preprocessing | None = None,
    model_preprocessing: Preprocessing | None = None,
    on_bad_data: OnBadData = OnBadData.STOP,
    columns: Columns = FOUND,
    share: Share = WHOLE,
) -> Batches:
    """Open the data that a spec names; it is read when batches are asked for.

    Args:
        spec: a folder of images (class subfolders give labels) or a .txt file of their paths; tar archives of samples;
            a dataset (``hf://datasets/OWNER/NAME:SPLIT``, a folder that was saved, Parquet); a .npy, .npz, .pt or
            .safetensors file; or ``file.py:factory`` or ``package.module:factory`` giving a Dataset, a DataLoader or
            an iterable of batches.
        batch_size: samples of a batch, where bntool makes the batches.
        samples: at most so many.
        seed: shuffle by it; None keeps the order of the source. Data loaders, iterables, archives and streams of
            datasets keep their own order.
        workers: processes that read images or a Dataset beside this one; None for as many as there are cores where
            images are decoded, and none elsewhere. Batches do not depend on it.
        preprocessing: what to do to images or uint8 pixels.
        model_preprocessing: the same, where ``preprocessing`` is None and the data are images or uint8 pixels.
        on_bad_data: what to do about a sample that cannot be read.
        columns: which of the data are inputs and labels.
        share: which of its batches are read, for one of several processes or shards.

    Raises:
        UsageError: the spec or the data cannot be understood.
        FileError: a file cannot be read; also while iterating.
        MissingExtraError: a package is missing.
        UserCodeError: the user's code raised; also while iterating.
    """
    if batch_size < 1 or (workers or 0) < 0 or (samples is not None and samples < 1):
        raise UsageError("batch size and samples must be at least 1, workers at least 0")
    if not spec.strip():
        raise UsageError("the data have no name: --data is empty")
    options = DataOptions(
        batch_size=batch_size,
        samples=samples,
        seed=seed,
        workers=workers,
        preprocessing=preprocessing,
        model_preprocessing=model_preprocessing,
        on_bad_data=on_bad_data,
        columns=columns,
        share=share,
    )
    with asking_system(spec):
        found = next((source for source in DATA_SOURCES if source.recognises(spec)), None)
    if found is not None:
        return found.load(spec, options)
    forms = "; ".join(source.form for source in DATA_SOURCES)
    raise UsageError(f"--data {spec!r} cannot be understood; it can be: {forms}")
