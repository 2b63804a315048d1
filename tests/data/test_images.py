"""Folders of images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bntool.data.images import find_images
from bntool.data.loading import load_data
from bntool.data.pixels import read_image
from bntool.data.policies import OnBadData
from bntool.data.preprocessing import PRESETS, Orientation, Preprocessing, parse_preprocessing
from bntool.errors import CorruptFileError, MissingExtraError, UsageError
from tests.data.sample_images import SIZES, make_image

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


def write(folder, name, pixels, mode=None, **options):
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels, mode)
    image.save(folder / name, **options)
    return folder / name


RGB = np.random.default_rng(0).integers(0, 256, size=(6, 9, 3)).astype("uint8")


class TestModes:
    """Images of every mode as RGB, against arrays made with numpy."""

    def read(self, path, **steps):
        return read_image(path, Preprocessing(**steps)).permute(1, 2, 0).numpy()

    def test_rgb_and_alpha(self, tmp_path):
        assert (self.read(write(tmp_path, "a.png", RGB)) == RGB).all()
        alpha = np.concatenate([RGB, np.full((6, 9, 1), 3, "uint8")], axis=2)
        assert (self.read(write(tmp_path, "b.png", alpha)) == RGB).all()
        assert (self.read(write(tmp_path, "c.webp", alpha, lossless=True, exact=True)) == RGB).all()

    def test_grey_of_8_and_16_bits(self, tmp_path):
        grey = RGB[:, :, 0]
        assert (self.read(write(tmp_path, "a.png", grey)) == grey[:, :, None]).all()
        deep = grey.astype("uint16") * 256 + 77
        for name in ("b.png", "b.tif"):
            path = write(tmp_path, name, deep)
            assert (self.read(path) == grey[:, :, None]).all()
            assert (self.read(path, channels=1) == grey[:, :, None]).all()

    def test_pixels_without_a_range_are_bad(self, tmp_path):
        for name, pixels in (("a.tif", RGB[:, :, 0].astype("float32")), ("b.tif", RGB[:, :, 0].astype("int32") << 20)):
            with pytest.raises(ValueError, match="no fixed range"):
                self.read(write(tmp_path, name, pixels))

    def test_palettes(self, tmp_path):
        image = Image.new("P", (9, 6))
        image.putpalette([*range(30)])
        image.putdata([index % 10 for index in range(54)])
        for name, options in (("a.gif", {}), ("b.png", {"transparency": 2}), ("c.png", {"transparency": bytes(10)})):
            image.save(tmp_path / name, **options)
            wanted = np.array([[index % 10 * 3 + c for c in range(3)] for index in range(54)]).reshape(6, 9, 3)
            assert (self.read(tmp_path / name) == wanted).all()

    def test_cmyk(self, tmp_path):
        Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg")
        assert np.abs(self.read(tmp_path / "cyan.jpg").astype(int) - [0, 255, 255]).max() < 8

    @pytest.mark.parametrize("held", range(1, 9))
    def test_photos_are_upright_unless_told(self, tmp_path, held):
        exif = Image.Exif()
        exif[0x0112] = held
        path = write(tmp_path, "photo.png", RGB, exif=exif)
        mirrored, turned = held in (2, 4, 5, 7), {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[held]
        wanted = np.rot90(RGB, turned)[:, ::-1] if mirrored else np.rot90(RGB, turned)
        assert (self.read(path) == wanted).all()
        assert (self.read(path, orientation=Orientation.STORED) == RGB).all()


def test_what_torchvision_and_timm_made_of_images(tmp_path, fixtures):
    """tests/oracles/preprocessing.py compares all their architectures; this is what it recorded of some."""
    recorded = json.loads((fixtures / "preprocessing.json").read_text())
    assert len(recorded) == 8
    for spec, facts in recorded.items():
        steps = parse_preprocessing(facts["steps"])
        assert steps.describe() == facts["steps"]
        for size, answer in zip(SIZES, facts["answers"], strict=True):
            make_image(size).save(tmp_path / "image.png")
            found = steps.normalize(read_image(tmp_path / "image.png", steps).unsqueeze(0))[0].double()
            assert list(found.shape) == answer["shape"], spec
            torch.testing.assert_close(found.mean((1, 2)).tolist(), answer["mean"], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(found[:, :3, :3].tolist(), answer["corner"], atol=0.02, rtol=0)


def test_what_lies_in_folders(tmp_path):
    for name in ("b/1.JPG", "b/deep/er/2.png", "a/3.png", "c/notes.txt", ".git/4.png", "a/._3.png", "a/.cache/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found.paths] == ["a/3.png", "b/1.JPG", "b/deep/er/2.png"]
    assert (found.labels, found.classes) == ((0, 1, 1), ("a", "b", "c"))
    (tmp_path / "6.png").write_bytes(b"")
    found = find_images(tmp_path)
    assert (len(found.paths), found.labels, found.classes) == (4, None, None)


def test_broken_files_of_every_kind_are_sentences(tmp_path, monkeypatch):
    good = write(tmp_path, "good.png", RGB).read_bytes()
    (tmp_path / "bad").mkdir()
    files = {"empty.png": b"", "text.jpg": b"hello", "cut.png": good[:60], "flipped.png": good[:50] + b"\0" + good[51:]}
    for name, data in files.items():
        (tmp_path / "bad" / name).write_bytes(data)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 20)  # a bomb, as Pillow sees it
    (tmp_path / "bad" / "bomb.png").write_bytes(good)
    data = load_data(str(tmp_path / "bad"), batch_size=4, preprocessing=STEPS, on_bad_data=OnBadData.SKIP)
    assert list(data) == []
    assert len(data.bad_inputs) == 5
    assert all(" cannot be read: " in left_out.reason for left_out in data.bad_inputs)
    assert all(left_out.reason.count(str(tmp_path)) == 1 for left_out in data.bad_inputs)
    explained = [left_out.reason for left_out in data.bad_inputs if "empty.png" in left_out.reason]
    assert explained[0].endswith("empty.png cannot be read: it is empty or no image that Pillow knows")


def test_reading_preprocessing():
    assert parse_preprocessing("imagenet") == PRESETS["imagenet"]
    assert parse_preprocessing("imagenet,resize=232").resize == 232
    assert parse_preprocessing("resize=40, crop=32,mean=0.5,std=0.2/0.3/0.4").std == (0.2, 0.3, 0.4)
    squashed = parse_preprocessing("resize=20x30,crop=10x12,interpolation=bicubic,channels=1,orientation=stored")
    assert (squashed.resize, squashed.crop, squashed.interpolation.value) == ((20, 30), (10, 12), "bicubic")
    assert parse_preprocessing(squashed.describe()) == squashed
    assert parse_preprocessing("model,crop=8", presets={"model": PRESETS["clip"]}).resize == 224
    for text in (
        *("imagnet", "size=3", "resize=x", "std=0", "crop=-1", "", "model", "channels=2", "mean=nan", "mean=1/"),
        *("resize=3x", "interpolation=cubic", "orientation=left", "resize=0x4"),
    ):
        with pytest.raises(UsageError, match="preprocess"):
            parse_preprocessing(text)
