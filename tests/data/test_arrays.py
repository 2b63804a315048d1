"""Arrays in files."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bntool.data.loading import load_data
from bntool.data.preprocessing import parse_preprocessing
from bntool.errors import CorruptFileError, UnreadableFileError, UsageError

IMAGES = np.random.default_rng(0).normal(size=(11, 1, 4, 4)).astype("float32")
LABELS = np.arange(11)


def write(folder, suffix, *, images=IMAGES, names=("images", "labels"), compressed=False):
    path = folder / f"data{suffix}"
    if suffix == ".npy":
        np.save(path, images)
    elif suffix == ".npz":
        (np.savez_compressed if compressed else np.savez)(path, **dict(zip(names, (images, LABELS), strict=True)))
    else:
        tensors = dict(zip(names, map(torch.from_numpy, (images, LABELS)), strict=True))
        save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_sample_comes_once_with_its_label(tmp_path, suffix, seed):
    data = load_data(write(tmp_path, suffix), batch_size=4, seed=seed)
    batches = list(data)
    assert [batch.samples for batch in batches] == [3, 4, 4]  # of nearly equal size
    assert data.samples == 11
    images = torch.cat([batch.inputs for batch in batches]).numpy()
    if suffix == ".npy":
        assert all(batch.labels is None for batch in batches)
        assert sorted(images.sum(axis=(1, 2, 3))) == pytest.approx(sorted(IMAGES.sum(axis=(1, 2, 3))))
        return
    order = torch.cat([batch.labels for batch in batches]).numpy()
    assert sorted(order) == list(range(11))
    assert (order == np.arange(11)).all() == (seed is None)
    assert (images == IMAGES[order]).all()
    assert [torch.equal(a.inputs, b.inputs) for a, b in zip(batches, data, strict=True)] == [
        True
    ] * 3  # again, the same


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_archives_stored_and_compressed(tmp_path, compressed, order):
    path = write(tmp_path, ".npz", images=np.asarray(IMAGES, order=order), names=("x", "y"), compressed=compressed)
    (batch,) = load_data(path, batch_size=100)
    assert (batch.inputs.numpy() == IMAGES).all()
    assert (batch.labels.numpy() == LABELS).all()


def test_fewer_samples_are_drawn_from_all_by_the_seed(tmp_path):
    path = write(tmp_path, ".npz")
    (batch,) = load_data(path, batch_size=100, samples=5, seed=0)
    assert batch.samples == 5
    assert not torch.equal(batch.labels, torch.arange(5))
    (first,) = load_data(path, batch_size=100, samples=5)
    assert torch.equal(first.labels, torch.arange(5))
    assert "rows 0 to 4" in first.description


def test_big_endian_and_float64(tmp_path):
    (batch,) = load_data(write(tmp_path, ".npy", images=IMAGES.astype(">f8")), batch_size=100)
    assert batch.inputs.dtype is torch.float64
    assert torch.equal(batch.inputs, torch.from_numpy(IMAGES).double())


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_pixels_are_normalised_as_told(tmp_path, layout):
    pixels = np.random.default_rng(1).integers(0, 256, size=(5, 8, 8, 3), dtype="uint8")
    path = write(tmp_path, ".npy", images=np.ascontiguousarray(pixels.transpose(layout)))
    with pytest.raises(UsageError, match="--preprocess"):
        list(load_data(path, batch_size=8))
    steps = parse_preprocessing("mean=0.5/0.25/0,std=0.5")
    (batch,) = load_data(path, batch_size=8, preprocessing=steps)
    expected = (pixels / 255 - [0.5, 0.25, 0]) / 0.5
    np.testing.assert_allclose(batch.inputs.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_keys_that_say_nothing(tmp_path):
    np.savez(tmp_path / "odd.npz", a=IMAGES, b=IMAGES)
    with pytest.raises(UsageError, match=r"which array holds the inputs\? The file has a \[11, 1, 4, 4\], b"):
        load_data(str(tmp_path / "odd.npz"), batch_size=1)
    np.savez(tmp_path / "single.npz", signal=IMAGES)
    assert load_data(str(tmp_path / "single.npz"), batch_size=11).samples == 11


def test_pickles_in_arrays_are_not_run(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}], dtype=object))
    for name in ("objects.npy", "objects.npz"):
        with pytest.raises((CorruptFileError, UsageError)):
            load_data(str(tmp_path / name), batch_size=1)


def test_bad_files(tmp_path):
    with pytest.raises(UnreadableFileError):
        load_data(str(tmp_path / "absent.npz"), batch_size=1)
    (tmp_path / "short.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "noise.npz").write_bytes(b"not a zip")
    for name in ("short.npy", "noise.npz"):
        with pytest.raises(CorruptFileError):
            load_data(str(tmp_path / name), batch_size=1)
    np.savez(tmp_path / "uneven.npz", images=IMAGES, labels=LABELS[:3])
    with pytest.raises(UsageError, match="11 inputs but 3 labels"):
        load_data(str(tmp_path / "uneven.npz"), batch_size=1)
    with pytest.raises(UsageError, match="can be: "):
        load_data("nothing", batch_size=1)
