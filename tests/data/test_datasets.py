"""Datasets of the library ``datasets``, where it is installed: ``python -m tests.oracles datasets_library`` has it."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image

from bntool.data.columns import Columns
from bntool.data.loading import load_data
from bntool.data.policies import OnBadData
from bntool.data.preprocessing import Preprocessing
from bntool.data.shares import Share
from bntool.errors import CorruptFileError, UnreadableFileError, UsageError

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = Preprocessing(mean=(0.5,), std=(0.25,))
PIXELS = np.random.default_rng(0).integers(0, 256, size=(11, 8, 8, 3)).astype("uint8")
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()


def make_images():
    features = datasets.Features({
        "name": datasets.Value("string"), "photo": datasets.Image(), "kind": datasets.ClassLabel(num_classes=10)
    })  # fmt: skip
    photos = [Image.fromarray(pixels) for pixels in PIXELS]
    names = [f"n{index}" for index in range(len(PIXELS))]
    return datasets.Dataset.from_dict({"name": names, "photo": photos, "kind": LABELS}, features=features)


def read(spec, **options):
    return list(load_data(str(spec), **{"batch_size": 4, "preprocessing": STEPS, "workers": 0, **options}))


def join(batches):
    return torch.cat([batch.inputs for batch in batches]), torch.cat([batch.labels for batch in batches]).tolist()


@pytest.fixture
def wanted(tmp_path):
    np.savez(tmp_path / "same.npz", images=PIXELS, labels=LABELS)
    return join(read(tmp_path / "same.npz"))[0]


@pytest.mark.parametrize("kind", ["saved", "saved dict", "parquet", "folder of parquet"])
def test_every_kind_gives_the_images_in_order(tmp_path, kind, wanted):
    made, place = make_images(), tmp_path / "made"
    if kind == "saved":
        made.save_to_disk(place)
    elif kind == "saved dict":
        datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(place)
    elif kind == "parquet":
        made.to_parquet(place := tmp_path / "made.parquet")
    else:
        (place / "data").mkdir(parents=True)
        for part in range(2):
            made.select(range(part * 6, min(part * 6 + 6, 11))).to_parquet(
                place / "data" / f"train-{part:05d}-of-00002.parquet"
            )
    inputs, labels = join(read(place))
    assert torch.equal(inputs, wanted)
    assert labels == LABELS
    assert torch.equal(join(read(place, workers=2))[0], wanted)
    assert join(read(f"{place}:train"))[1] == LABELS if kind != "saved" else True
    parts = [batch for shard in range(2) for batch in read(place, share=Share(shard, 2))]
    assert torch.equal(join(sorted(parts, key=lambda batch: batch.position))[0], wanted)
    assert read(place, columns=Columns(labels="none"))[0].labels is None


def test_a_saved_one_is_shuffled_and_a_stream_is_not(tmp_path):
    make_images().save_to_disk(tmp_path / "saved")
    make_images().to_parquet(tmp_path / "a.parquet")
    assert join(read(tmp_path / "saved", seed=1))[1] != LABELS
    assert sorted(join(read(tmp_path / "saved", seed=1))[1]) == sorted(LABELS)
    assert load_data(str(tmp_path / "saved"), batch_size=4, preprocessing=STEPS).samples == 11
    assert join(read(tmp_path / "a.parquet", seed=1))[1] == LABELS
    assert load_data(str(tmp_path / "a.parquet"), batch_size=4, preprocessing=STEPS).samples is None
    assert join(read(tmp_path / "a.parquet", samples=5))[1] == LABELS[:5]


def test_arrays_are_given_as_they_are(tmp_path):
    values = np.random.default_rng(1).normal(size=(5, 2, 3, 3)).astype("float32")
    features = datasets.Features({"x": datasets.Array3D((2, 3, 3), "float32"), "y": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"x": list(values), "y": [4, 3, 2, 1, 0]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "a.parquet")
    for spec in (tmp_path / "saved", tmp_path / "a.parquet"):
        batches = read(spec, preprocessing=None)
        assert np.array_equal(join(batches)[0].numpy(), values)
        assert join(batches)[1] == [4, 3, 2, 1, 0]
        with pytest.raises(UsageError, match="the arrays hold float32"):
            read(spec)


def test_bad_images_are_counted_and_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    good = make_images().cast_column("photo", datasets.Image(decode=False))[0]["photo"]
    broken = {"bytes": good["bytes"][:40], "path": None}
    rows = {"image": [good, broken, None, good], "label": [1, 2, 3, None]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(CorruptFileError, match=r"row 1 of .*a\.parquet cannot be read"):
        read(tmp_path / "a.parquet")
    data = load_data(
        str(tmp_path / "a.parquet"), batch_size=4, preprocessing=STEPS, workers=0, on_bad_data=OnBadData.SKIP
    )
    assert [batch.samples for batch in data] == [1]
    assert [re.search("row .", left_out.reason)[0] for left_out in data.bad_inputs] == ["row 1", "row 2", "row 3"]


def test_what_cannot_be_guessed_is_asked_for(tmp_path):
    made = make_images()
    made = made.add_column("other", [[1.0, 2.0]] * 11)
    datasets.DatasetDict({"a": made, "b": made}).save_to_disk(tmp_path / "two")
    with pytest.raises(UsageError, match="which split"):
        read(tmp_path / "two")
    with pytest.raises(UsageError, match="no split 'c', but a, b"):
        read(f"{tmp_path / 'two'}:c")
    with pytest.raises(UsageError, match="no column 'x', but name, photo, kind, other"):
        read(f"{tmp_path / 'two'}:a", columns=Columns("x"))
    made.remove_columns(["photo", "other"]).save_to_disk(tmp_path / "text")
    with pytest.raises(UsageError, match="which column holds the inputs"):
        read(tmp_path / "text")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UnreadableFileError, match="datasets cannot"):
        read(tmp_path / "broken.parquet")


@pytest.mark.parametrize(
    "feature", [datasets.Array2D((2, 3), "uint8"), datasets.List(datasets.List(datasets.Value("uint8")))]
)
def test_pixels_are_pixels_and_what_is_missing_is_bad_data(tmp_path, feature):
    features = datasets.Features({"x": feature, "y": datasets.Value("int64")})
    values = np.arange(6, dtype="uint8").reshape(2, 3)
    made = datasets.Dataset.from_dict(
        {"x": [None, values, values + 1, values, None], "y": [1, 2, 3, None, 4]}, features=features
    )
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    for spec in (str(tmp_path / "a.parquet"), str(tmp_path / "saved")):
        steps = Preprocessing(mean=(0.0,), std=(1.0,), channels=1)
        data = load_data(spec, batch_size=5, on_bad_data=OnBadData.SKIP, preprocessing=steps)
        (batch,) = data
        assert batch.labels.tolist() == [2, 3]
        assert torch.equal(batch.inputs[:, 0] * 255, torch.from_numpy(np.stack([values, values + 1])).float())
        reasons = [one.reason for one in data.bad_inputs]
        assert len(reasons) == 3
        assert "row 0 of" in reasons[0]
        assert "the label of row 3 of" in reasons[1]
        assert "row 4 of" in reasons[2]
        with pytest.raises(CorruptFileError, match=r"row 0 of .* has no x"):
            load_data(spec, batch_size=5, preprocessing=steps)


def test_a_damaged_file_is_one_sentence(tmp_path, caplog):
    logging.getLogger("datasets").addHandler(caplog.handler)  # they do not reach the root
    make_images().to_parquet(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(UnreadableFileError, match=r"a\.parquet: datasets cannot load it"):
            read(tmp_path / "a.parquet")
    logging.getLogger("datasets").removeHandler(caplog.handler)
    assert not caplog.records
