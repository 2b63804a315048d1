"""Arrays in files."""

from typing import ClassVar

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
    with pytest.raises(UsageError, match=r"which array holds the inputs\? The data has a \[11, 1, 4, 4\], b"):
        load_data(str(tmp_path / "odd.npz"), batch_size=1)
    np.savez(tmp_path / "single.npz", signal=IMAGES)
    assert load_data(str(tmp_path / "single.npz"), batch_size=11).samples == 11


def test_pickles_in_arrays_are_not_run(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}], dtype=object))
    for name in ("objects.npy", "objects.npz"):
        with pytest.raises(UsageError, match="Python objects, which are not read"):
            load_data(str(tmp_path / name), batch_size=1)


class TestTorchFiles:
    """What torch.save may have been given, read without its code."""

    IMAGES, LABELS = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)

    FORMS: ClassVar = {
        "tensor": IMAGES,
        "pair": (IMAGES, LABELS),
        "list": [IMAGES, LABELS],
        "dict in a dict": {"train": {"x": IMAGES, "y": LABELS}, "epoch": 3},
        "pixels": {"images": (IMAGES * 20).to(torch.uint8), "labels": LABELS.tolist()},
        "dataset": torch.utils.data.TensorDataset(IMAGES, LABELS, torch.ones(11)),
        "samples": list(zip(IMAGES, LABELS.tolist(), strict=True)),
        "samples with tensor labels": [(image, label) for image, label in zip(IMAGES, LABELS, strict=True)],
        "samples of dicts": [{"image": i, "label": n} for i, n in zip(IMAGES, LABELS.tolist(), strict=True)],
        "samples without labels": list(IMAGES),
        "batches": [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])],
        "batches without labels": [IMAGES[:4], IMAGES[4:]],
        "channels last": {"images": IMAGES.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)},
    }

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("legacy", [False, True])
    def test_forms(self, tmp_path, form, legacy):
        torch.save(self.FORMS[form], tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        steps = parse_preprocessing("scale") if form == "pixels" else None
        batches = list(load_data(str(tmp_path / "x.pt"), batch_size=4, seed=1, preprocessing=steps))
        assert [batch.samples for batch in batches] == [3, 4, 4]
        images = torch.cat([batch.inputs for batch in batches])
        if form == "tensor" or "without" in form or "last" in form:
            assert all(batch.labels is None for batch in batches)
            torch.testing.assert_close(images.sum(dim=0)[:1], self.IMAGES.sum(dim=0))
            return
        order = torch.cat([batch.labels for batch in batches])
        assert sorted(order.tolist()) == list(range(11))
        wanted = self.FORMS["pixels"]["images"] / 255 if form == "pixels" else self.IMAGES
        torch.testing.assert_close(images, wanted[order])

    @pytest.mark.parametrize("whole", [True, False])
    def test_numpy_arrays_in_them_are_data_too(self, tmp_path, whole):
        images, labels = np.arange(24, dtype="f4").reshape(6, 4), np.arange(6)
        torch.save(images if whole else {"images": images, "labels": labels}, tmp_path / "x.pt")
        batches = list(load_data(str(tmp_path / "x.pt"), batch_size=4))
        assert np.array_equal(torch.cat([batch.inputs for batch in batches]).numpy(), images)
        assert whole or torch.cat([batch.labels for batch in batches]).tolist() == labels.tolist()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.nn.Linear(2, 2), "Linear"),
            ({"epoch": 3}, "no tensors to be found"),
            (torch.tensor(3.0), "no tensors to be found"),
            (torch.ones(5), r"it holds images \[5\]"),
            (torch.ones(0, 3), "empty"),
            ([torch.ones(1, 2), torch.ones(1, 3)], "differ in shape"),
            ({"images": torch.ones(3, 2), "labels": torch.ones(2)}, "3 inputs but 2 labels"),
            ([], "no tensors to be found"),
        ],
    )
    def test_what_is_no_data(self, tmp_path, value, message):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(UsageError, match=message):
            load_data(str(tmp_path / "x.pt"), batch_size=4)


def test_arrays_that_are_no_samples(tmp_path):
    for array, message in [
        (np.float32(3), r"it holds images \[\]"),
        (np.ones(5), r"it holds images \[5\]"),
        (np.ones((0, 3)), "empty"),
        (np.ones((4, 0)), "empty"),
        (np.array(["a", "b"]), "<U1"),
        (np.zeros((4, 2), dtype=[("a", "f4")]), "'a'"),
        (np.ones((4, 2), dtype=complex), "complex128"),
    ]:
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(UsageError, match=message):
            load_data(str(tmp_path / "x.npy"), batch_size=4)


def test_other_arrays_beside_the_data_do_not_matter(tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=LABELS, names=np.array(["a"]), when=np.datetime64("2020-01-01"))
    assert load_data(str(tmp_path / "x.npz"), batch_size=4).samples == 11


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float16", "int8", "bool"])
def test_numbers_of_every_kind_keep_their_values(tmp_path, dtype):
    array = np.arange(12).reshape(4, 3).astype(dtype)
    np.savez(tmp_path / "x.npz", x=array)
    (batch,) = load_data(str(tmp_path / "x.npz"), batch_size=4)
    assert (batch.inputs.double().numpy() == array.astype("float64")).all()


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    """A file of 4 GB, sparse on the disk, of which a few rows are used."""
    import tracemalloc

    header = np.lib.format.header_data_from_array_1_0(np.empty((1, 1, 1000, 1000), "float32"))
    with open(tmp_path / "large.npy", "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (1000, 1, 1000, 1000)})
        stream.truncate(stream.tell() + 4 * 10**9)
    tracemalloc.start()
    (batch,) = load_data(str(tmp_path / "large.npy"), batch_size=4, samples=2, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.inputs.shape == (2, 1, 1000, 1000)
    assert peak < 50e6


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
