"""Recalibration from streams of samples: shards, going on, processes that read, all to the same bytes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bntool.errors import CorruptFileError, RefusedError
from bntool.recalibration.checkpoint import recalibrate_checkpoint
from bntool.recalibration.merging import merge_statistics
from bntool.recalibration.partials import read_partial
from tests.places import SAMPLES

pytest.importorskip("webdataset")

MODEL = f"{SAMPLES / 'digits_net.py'}:build"
COUNT = 210


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """The digits in three archives, as arrays and as images; their names with braces."""
    folder = tmp_path_factory.mktemp("streams")
    arrays = np.load(SAMPLES / "digits_train.npz")
    for part in range(3):
        for kind in ("npy", "png"):
            with tarfile.open(folder / f"{kind}-{part}.tar", "w") as archive:
                for index in range(part * COUNT // 3, (part + 1) * COUNT // 3):
                    for ending, content in (
                        (kind, encode(arrays["images"][index], kind)),
                        ("cls", b"%d" % arrays["labels"][index]),
                    ):
                        info = tarfile.TarInfo(f"{index:04d}.{ending}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
    return {kind: str(folder / f"{kind}-{{0..2}}.tar") for kind in ("npy", "png")}


def encode(image, kind):
    content = io.BytesIO()
    if kind == "npy":
        np.save(content, image)
    else:
        Image.fromarray((image[0] * 15).clip(0, 255).astype("uint8")).save(content, "PNG")
    return content.getvalue()


def recalibrate(data, output, **options):
    preprocess = "scale,channels=1" if "png" in data else None
    given = {"batch_size": 16, "preprocess": preprocess, "workers": 0, **options}
    return recalibrate_checkpoint(SAMPLES / "drifted.pt", output, model=MODEL, data=data, **given)


@pytest.mark.parametrize("method", ["pooled", "paper", "exact"])
def test_a_stream_gives_the_statistics_of_its_samples(streams, tmp_path, method):
    arrays = np.load(SAMPLES / "digits_train.npz")
    np.savez(tmp_path / "same.npz", images=arrays["images"][:COUNT], labels=arrays["labels"][:COUNT])
    one = recalibrate(streams["npy"], None, method=method, batch_size=COUNT)
    other = recalibrate(str(tmp_path / "same.npz"), None, method=method, batch_size=COUNT)
    assert one.recalibration.samples == COUNT
    assert one.after.value == other.after.value > 0.9
    for name, statistics in one.recalibration.statistics.items():
        wanted = other.recalibration.statistics[name]
        assert np.allclose(statistics.mean, wanted.mean, rtol=0, atol=1e-5 * np.sqrt(wanted.variance).max())
        assert np.allclose(statistics.variance, wanted.variance, rtol=1e-5)


def test_bytes_depend_on_neither_shards_nor_processes(streams, tmp_path):
    recalibrate(streams["png"], tmp_path / "one.pt")
    wanted = (tmp_path / "one.pt").read_bytes()
    recalibrate(streams["png"], tmp_path / "workers.pt", workers=2)
    assert (tmp_path / "workers.pt").read_bytes() == wanted
    for shards in (2, 5):
        parts = [tmp_path / f"{number}-of-{shards}" for number in range(1, shards + 1)]
        for number, part in enumerate(parts, start=1):
            recalibrate(streams["png"], None, shard=f"{number}/{shards}", partial=part)
        merge_statistics(SAMPLES / "drifted.pt", parts[::-1], tmp_path / f"{shards}.pt")
        assert (tmp_path / f"{shards}.pt").read_bytes() == wanted


def test_a_stream_is_gone_on_with(streams, tmp_path):
    judged = {"eval_data": str(SAMPLES / "digits_test.npz")}
    shards = {number: Path(streams["npy"].replace("{0..2}", str(number))) for number in range(3)}
    for number, path in shards.items():
        (tmp_path / f"{number}.tar").write_bytes(path.read_bytes())
    there, whole = str(tmp_path / "{0..2}.tar"), shards[1].read_bytes()
    recalibrate(there, tmp_path / "one.pt", **judged)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 // 1024 * 1024 + 1] ^= 1  # of the same size, as a file that is being copied may be
    (tmp_path / "1.tar").write_bytes(bytes(damaged))
    kept = {"resume": tmp_path / "kept", "resume_every": 0, **judged}
    with pytest.raises(CorruptFileError):
        recalibrate(there, tmp_path / "out.pt", **kept)
    assert not (tmp_path / "out.pt").exists()
    assert 0 < read_partial(tmp_path / "kept").position < 10
    (tmp_path / "1.tar").write_bytes(whole)
    recalibrate(there, tmp_path / "out.pt", **kept)
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()
    assert not (tmp_path / "kept").exists()


def test_partials_of_other_streams_are_refused(streams, tmp_path):
    recalibrate(streams["npy"], None, shard="1/2", partial=tmp_path / "one")
    recalibrate(streams["npy"].replace("{0..2}", "{0..1}"), None, shard="2/2", partial=tmp_path / "two")
    with pytest.raises(RefusedError, match="data"):
        merge_statistics(SAMPLES / "drifted.pt", [tmp_path / "one", tmp_path / "two"], tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
