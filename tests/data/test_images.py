"""Folders of images."""

import pytest
import torch

from bntool.data.loading import load_data
from bntool.data.policies import OnBadData
from bntool.data.preprocessing import PRESETS, Preprocessing, parse_preprocessing
from bntool.errors import CorruptFileError, MissingExtraError, UsageError

Image = pytest.importorskip("PIL.Image")

STEPS = Preprocessing(resize=10, crop=8, mean=(0.5,), std=(0.25,))


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        for index in range(3):
            path = tmp_path / name / "deeper" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 12 + index), (100 * label, 50, index)).save(path)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_subfolders_are_labels(folder):
    data = load_data(str(folder), batch_size=4, preprocessing=STEPS)
    batches = list(data)
    assert data.has_labels
    assert torch.cat([b.labels for b in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    images = torch.cat([b.inputs for b in batches])
    assert images.shape == (6, 3, 8, 8)
    torch.testing.assert_close(images[5, :, 4, 4], (torch.tensor([100.0, 50.0, 2.0]) / 255 - 0.5) / 0.25)


def test_a_flat_folder_has_no_labels(folder):
    (batch,) = load_data(str(folder / "cat"), batch_size=4, preprocessing=STEPS, workers=1)
    assert batch.labels is not None  # its one subfolder
    (batch,) = load_data(str(folder / "cat" / "deeper"), batch_size=4, preprocessing=STEPS)
    assert batch.labels is None
    assert "0.png" in batch.description


def test_corrupt_images_are_named_and_counted(folder):
    good = (folder / "cat" / "deeper" / "0.png").read_bytes()
    (folder / "cat" / "deeper" / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "dog" / "noise.jpg").write_bytes(b"\xff\xd8noise")
    with pytest.raises(CorruptFileError, match=r"cut\.png"):
        list(load_data(str(folder), batch_size=4, preprocessing=STEPS))
    data = load_data(str(folder), batch_size=4, preprocessing=STEPS, on_bad_data=OnBadData.SKIP)
    for _ in range(2):
        assert sum(batch.samples for batch in data) == 6
        assert len(data.bad_inputs) == 2
    assert any("noise.jpg" in left_out.reason for left_out in data.bad_inputs)


def test_what_cannot_be_guessed_is_asked_for(folder, monkeypatch):
    with pytest.raises(UsageError, match="--preprocess imagenet"):
        load_data(str(folder), batch_size=4)
    with pytest.raises(UsageError, match="no image"):
        load_data(str(folder / "empty"), batch_size=4, preprocessing=STEPS)
    with pytest.raises(UsageError, match="differ in size"):
        list(load_data(str(folder), batch_size=4, preprocessing=Preprocessing()))
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match="Pillow"):
        load_data(str(folder), batch_size=4, preprocessing=STEPS)


def test_reading_preprocessing():
    assert parse_preprocessing("imagenet") == PRESETS["imagenet"]
    assert parse_preprocessing("imagenet,resize=232").resize == 232
    assert parse_preprocessing("resize=40, crop=32,mean=0.5,std=0.2/0.3/0.4").std == (0.2, 0.3, 0.4)
    for text in ("imagnet", "size=3", "resize=x", "std=0", "crop=-1", ""):
        with pytest.raises(UsageError, match="preprocess"):
            parse_preprocessing(text)
