"""Streams: tar archives by the convention of webdataset, and lists of images."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bntool.data.columns import Columns
from bntool.data.loading import load_data
from bntool.data.policies import OnBadData
from bntool.data.preprocessing import Preprocessing
from bntool.data.samples import read_label
from bntool.data.shares import Share
from bntool.data.specs import check_data
from bntool.data.streams import deal
from bntool.errors import CorruptFileError, UnreadableFileError, UnsafeFileError, UsageError

webdataset = pytest.importorskip("webdataset")

STEPS = Preprocessing(mean=(0.5,), std=(0.25,))
PIXELS = np.random.default_rng(0).integers(0, 256, size=(11, 8, 8, 3)).astype("uint8")
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def encode_npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def encode_png(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, files: dict[str, bytes], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, encode=encode_png, ending="png", size=4) -> str:
    """The pixels as samples in three archives, written by webdataset; their name with braces."""
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"s-{shard:02d}.tar")) as writer:
            for index in range(shard * size, min((shard + 1) * size, len(PIXELS))):
                content = encode(PIXELS[index])
                writer.write({"__key__": f"{index:05d}", ending: content, "cls": str(LABELS[index]).encode()})
    return str(folder / "s-{00..02}.tar")


def read(spec: object, **options: object) -> list:
    return list(load_data(str(spec), **{"batch_size": 4, "preprocessing": STEPS, "workers": 0, **options}))


def same(one: list, other: list) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels) for a, b in pairs)


@pytest.mark.parametrize(("encode", "ending"), [(encode_png, "png"), (encode_npy, "npy")])
def test_shards_are_the_arrays_that_were_written(tmp_path, encode, ending):
    spec = write_shards(tmp_path, encode, ending)
    np.savez(tmp_path / "same.npz", images=PIXELS, labels=LABELS)
    wanted = read(tmp_path / "same.npz", batch_size=len(PIXELS))[0]
    data = load_data(spec, batch_size=4, preprocessing=STEPS, workers=0)
    assert (data.samples, data.has_labels, data.preprocessing) == (None, True, STEPS)
    batches = list(data)
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), wanted.inputs)
    assert torch.cat([batch.labels for batch in batches]).tolist() == LABELS
    assert [batch.samples for batch in batches] == [4, 4, 3]
    assert data.count == 3
    assert batches[1].names[0] == f"00004 of {tmp_path / 's-01.tar'}"
    assert same(batches, list(data))
    assert same(batches, read(spec, workers=2))
    assert same(batches, read(spec.replace("{00..02}", "*")))


def test_samples_are_what_webdataset_reads(tmp_path):
    """Long and foreign names, folders, several dots, capitals, files of its own: in every format of tarfile."""
    png = encode_png(PIXELS[0])
    files = {
        "a.PNG": png, "a.cls": b"1", "__meta__/x.png": png, "__note__": b"", "deep/b.c/d.png": png,
        "deep/b.c/d.cls": b"2",
        f"{'long' * 40}.png": png, f"{'long' * 40}.cls": b"3", f"{'fold/' * 30}{'n' * 90}.png": png,
        f"{'fold/' * 30}{'n' * 90}.cls": b"4", "größe.png": png, "größe.cls": b"5", "README": b"", "left": b"",
    }  # fmt: skip
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        some = {k: v for k, v in files.items() if form != tarfile.USTAR_FORMAT or not k.startswith("long")}
        write_tar(path, some, format=form)
        with tarfile.open(path, "a", format=form) as archive:
            folder, link = tarfile.TarInfo("sub"), tarfile.TarInfo("sub/link.png")
            folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "a.png"
            late = tarfile.TarInfo("late.png")
            late.size, late.mtime = len(png), 1700000000.25  # which takes an extended header
            archive.addfile(folder)
            archive.addfile(link)
            archive.addfile(late, io.BytesIO(png))
            archive.addfile(tarfile.TarInfo("late.cls"))
        with path.open("rb") as stream:
            read_by_it = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            theirs = [
                (sample["__key__"], sample["cls"])
                for sample in webdataset.tariterators.group_by_keys(read_by_it)
                if "png" in sample
            ]
        batches = read(path, batch_size=100, on_bad_data=OnBadData.SKIP)
        assert [name.removesuffix(f" of {path}") for name in batches[0].names] == [key for key, _ in theirs[:-1]]
        assert batches[0].labels.tolist() == [int(label) for _, label in theirs[:-1]]


def test_compressed_archives_are_read(tmp_path):
    write_shards(tmp_path)
    plain = (tmp_path / "s-00.tar").read_bytes()
    for ending, content in (("tar.gz", gzip.compress(plain)), ("tgz", gzip.compress(plain))):
        (tmp_path / f"s.{ending}").write_bytes(content)
        assert same(read(tmp_path / f"s.{ending}"), read(tmp_path / "s-00.tar"))
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(plain)[:-300])
    with pytest.raises(CorruptFileError, match=r"cut\.tar\.gz: the archive is cut off"):
        read(tmp_path / "cut.tar.gz")


def test_shares_are_those_of_one_list(tmp_path):
    spec = write_shards(tmp_path)
    whole = {batch.position: batch for batch in read(spec, batch_size=1)}
    for shards in (2, 3):
        found = {}
        for shard in range(shards):
            found |= {b.position: b for b in read(spec, batch_size=1, share=Share(shard, shards), workers=shard)}
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[position].inputs, whole[position].inputs) for position in whole)
    assert [batch.position for batch in read(spec, batch_size=1, share=Share(start=9))] == [9, 10]


def test_no_more_samples_than_asked_for(tmp_path):
    assert [batch.samples for batch in read(write_shards(tmp_path), samples=6)] == [3, 3]


@pytest.mark.parametrize("count", range(14))
def test_the_last_two_batches_are_of_nearly_equal_size(count):
    lots = list(deal(iter(range(count)), 4))
    assert [sample for lot in lots for sample in lot] == list(range(count))
    assert len(lots) == -(-count // 4)
    assert all(len(lot) == 4 for lot in lots[:-2])
    assert not lots[1:] or len(lots[-2]) - len(lots[-1]) in (0, 1)


def test_bad_samples_are_counted_and_named(tmp_path):
    good = {"a.png": encode_png(PIXELS[0]), "a.cls": b"1", "z.png": encode_png(PIXELS[1]), "z.cls": b"2"}
    bad = {
        "b.png": encode_png(PIXELS[2])[:40], "b.cls": b"1",
        "c.png": encode_png(PIXELS[2]), "c.cls": b"cat",
        "d.png": encode_png(PIXELS[2]),
        "e.txt": b"no image", "e.cls": b"1",
        "f.npy": encode_npy(PIXELS[2]), "f.cls": b"1",
        "g.png": b"", "g.jpg": b"", "g.cls": b"1",
    }  # fmt: skip
    path = write_tar(tmp_path / "some.tar", dict(sorted({**good, **bad}.items(), key=lambda item: item[0][0])))
    for workers in (0, 2):
        data = load_data(str(path), batch_size=3, preprocessing=STEPS, workers=workers, on_bad_data=OnBadData.SKIP)
        for _ in range(2):
            assert [name[0] for batch in data for name in batch.names] == ["a", "z"]
            reasons = [left_out.reason for left_out in data.bad_inputs]
            words = [
                "b of",
                "no index of a class but 'cat'",
                "d of .* has no label",
                "e of .* has txt, cls and no",
                "array",
                "g of",
            ]
            assert len(reasons) == len(words)
            for reason, word in zip(reasons, words, strict=True):
                assert re.search(word, reason), reason
    with pytest.raises(CorruptFileError, match=r"the png of b of .*some\.tar cannot be read"):
        read(path)


def test_damaged_archives_are_refused_whatever_is_to_be_skipped(tmp_path):
    write_shards(tmp_path)
    content = (tmp_path / "s-00.tar").read_bytes()
    with tarfile.open(tmp_path / "s-00.tar") as archive:
        third, end = archive.getmembers()[2].offset, archive.offset
    flipped = bytearray(content)
    flipped[third + 3] ^= 1
    for broken, what in (
        (content[: third + 700], "cut off"), (content[:third], "cut off"), (content[:end], "cut off"), (b"", "cut off"),
        (bytes(flipped), "a header in the archive is damaged"),
    ):  # fmt: skip
        (tmp_path / "broken.tar").write_bytes(broken)
        with pytest.raises(CorruptFileError, match=rf"broken\.tar: .*{what}"):
            read(tmp_path / "broken.tar", on_bad_data=OnBadData.SKIP)


def test_archives_built_to_do_harm_are_refused(tmp_path):
    long = tarfile.TarInfo("x" * 200)
    header = bytearray(long.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"00777777777\0"  # a name of a gigabyte
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    (tmp_path / "name.tar").write_bytes(bytes(header) + bytes(2048))
    with pytest.raises(UnsafeFileError, match="extended header of"):
        read(tmp_path / "name.tar")
    sparse = tarfile.TarInfo("a.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "sparse.tar").write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UnsafeFileError, match="sparse"):
        read(tmp_path / "sparse.tar")
    objects = np.array([{"a": 1}], dtype=object)
    write_tar(tmp_path / "objects.tar", {"a.npy": encode_npy(objects)})
    with pytest.raises(CorruptFileError, match="plain numbers are needed"):
        read(tmp_path / "objects.tar")


def test_two_files_of_one_name_are_refused(tmp_path):
    png = encode_png(PIXELS[0])
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            info = tarfile.TarInfo("a.png")
            info.size = len(png)
            archive.addfile(info, io.BytesIO(png))
    with pytest.raises(CorruptFileError, match="duplicate file name"):
        read(tmp_path / "twice.tar")


def test_columns_are_found_or_named(tmp_path):
    png = encode_png(PIXELS[0])
    write_tar(tmp_path / "two.tar", {"a.left.png": png, "a.right.png": encode_png(PIXELS[1]), "a.kind": b"7"})
    with pytest.raises(UsageError, match=r"which file of a sample holds the input\? a has left.png, right.png, kind"):
        read(tmp_path / "two.tar")
    (batch,) = read(tmp_path / "two.tar", columns=Columns("right.png", "kind"))
    assert batch.labels.tolist() == [7]
    (right,) = read(write_tar(tmp_path / "right.tar", {"a.png": encode_png(PIXELS[1])}))
    assert torch.equal(batch.inputs, right.inputs)
    assert right.labels is None
    (batch,) = read(tmp_path / "two.tar", columns=Columns("left.png", "none"))
    assert batch.labels is None
    with pytest.raises(UsageError, match=r"a has no 'jpg', but left\.png"):
        read(tmp_path / "two.tar", columns=Columns("jpg"))


def test_what_is_no_data_is_said(tmp_path):
    with pytest.raises(UnreadableFileError, match=r"n-1\.tar: there is no such file"):
        read(tmp_path / "n-{1..3}.tar")
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "n-*.tar")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(UnreadableFileError, match="not a regular file"):
        read(tmp_path / "folder.tar")
    with pytest.raises(UsageError, match="no sample in it"):
        read(write_tar(tmp_path / "none.tar", {"README": b"", "folder/LICENSE": b""}))
    with pytest.raises(UsageError, match="say what the model expects"):
        read(write_shards(tmp_path), preprocessing=None)
    with pytest.raises(UsageError, match="cannot be understood"):  # no command is run
        read("pipe:touch ran; cat x.tar")


@pytest.mark.parametrize("name", ["n-{0..99999999999}", "n-{0..9999}-{0..9999}", "n-{5..-" + "9" * 200 + "..2}"])
def test_ranges_that_no_memory_holds_are_not_spelled_out(tmp_path, name):
    with pytest.raises(UsageError, match="more than 1,000,000 archives"):
        read(tmp_path / f"{name}.tar")


@pytest.mark.parametrize("name", ["n-{0..1}{0..1}", "{a-{0..9},b-{000000..000000}}", "n-{0..99999999..99999998}"])
def test_ranges_of_few_are_spelled_out(tmp_path, name):
    with pytest.raises(UnreadableFileError, match="there is no such file"):
        read(tmp_path / f"{name}.tar")


@pytest.mark.parametrize("ending", [".tar", ".npz", ".txt", ".pt", ":factory", ""])
def test_a_path_that_the_system_refuses_is_a_sentence(ending):
    with pytest.raises(UnreadableFileError, match="the file name is too long"):
        load_data("y" * 5000 + ending, batch_size=4, preprocessing=STEPS)
    with pytest.raises(UnreadableFileError, match="the file name is too long"):
        check_data("y" * 5000)


@pytest.mark.parametrize("label", [b"9" * 30, b"9" * 9000, b"2.7", b"-9223372036854775809", b"", b"\xff"])
def test_labels_that_are_no_index_are_bad_data(tmp_path, label):
    png = encode_png(PIXELS[0])
    path = write_tar(tmp_path / "a.tar", {"a.png": png, "a.cls": b"-9223372036854775808", "b.png": png, "b.cls": label})
    with pytest.raises(CorruptFileError, match=r"the label of b of .* is no index of a class but"):
        read(path)
    data = load_data(str(path), batch_size=4, preprocessing=STEPS, workers=0, on_bad_data=OnBadData.SKIP)
    assert [batch.labels.tolist() for batch in data] == [[-(1 << 63)]]


def test_the_first_array_may_be_bad(tmp_path):
    """What the others are is told by the first that can be used."""
    good = {f"{name}.npy": encode_npy(np.ones((2, 4), "float32")) for name in "bc"}
    path = write_tar(tmp_path / "a.tar", {"a.npy": b"no array", **good})
    with pytest.raises(
        CorruptFileError, match=r"the npy of a of .* cannot be read: .*; --on-bad-data skip leaves such"
    ):
        read(path, preprocessing=None)
    data = load_data(str(path), batch_size=4, workers=0, on_bad_data=OnBadData.SKIP)
    assert [batch.samples for batch in data] == [2]
    with pytest.raises(CorruptFileError, match="no sample can be used; the first: the npy of a of"):
        load_data(str(write_tar(path, {"a.npy": b"", "b.npy": b""})), batch_size=4, on_bad_data=OnBadData.SKIP)


@pytest.mark.parametrize("value", [2.7, float("inf"), float("nan"), None, np.float32(0.5), 1 << 63, [1]])
def test_numbers_that_are_no_index_are_no_labels(value):
    assert read_label(value, "x").startswith("the label of x is no index of a class but")
    assert read_label(np.float32(3), "x") == 3


def test_floating_arrays_are_given_as_they_are(tmp_path):
    values = np.random.default_rng(1).normal(size=(3, 2, 5)).astype("float32")
    files = {f"{index}.npy": encode_npy(value) for index, value in enumerate(values)}
    (batch,) = read(write_tar(tmp_path / "a.tar", files), preprocessing=None)
    assert np.array_equal(batch.inputs.numpy(), values)
    with pytest.raises(UsageError, match="for uint8 pixels; the arrays hold float32"):
        read(tmp_path / "a.tar")
    with pytest.raises(UsageError, match=r"the samples differ in shape: .*\[2, 5\], 3 of .*\[2, 4\]"):
        read(write_tar(tmp_path / "b.tar", {**files, "3.npy": encode_npy(values[0, :, :4])}), preprocessing=None)


class TestLists:
    """Text files of the paths of images."""

    @pytest.fixture
    def folder(self, tmp_path):
        for index in range(4):
            (tmp_path / "a b").mkdir(exist_ok=True)
            (tmp_path / "a b" / f"{index}.png").write_bytes(encode_png(PIXELS[index]))
        return tmp_path

    def test_paths_are_those_from_the_list_on(self, folder):
        (folder / "list.txt").write_text("# mine\na b/1.png 5\n\na b/0.png\t7\n" + f"{folder / 'a b' / '3.png'},2\n")
        (batch,) = read(folder / "list.txt")
        (wanted,) = read(folder / "a b")
        assert torch.equal(batch.inputs, wanted.inputs[[1, 0, 3]])
        assert batch.labels.tolist() == [5, 7, 2]
        assert read(folder / "list.txt", columns=Columns(labels="none"))[0].labels is None

    def test_labels_are_of_all_or_none(self, folder):
        (folder / "list.txt").write_text("a b/1.png\na b/0.png\n")
        assert read(folder / "list.txt")[0].labels is None
        (folder / "list.txt").write_text("a b/1.png 3\na b/0.png\n")
        with pytest.raises(UsageError, match="1 of 2 images have a class"):
            read(folder / "list.txt")

    def test_a_missing_image_is_bad_data(self, folder):
        (folder / "list.txt").write_text("a b/1.png\na b/none.png\n")
        with pytest.raises(CorruptFileError, match=r"none\.png cannot be read: No such file"):
            read(folder / "list.txt")
        data = load_data(
            str(folder / "list.txt"), batch_size=4, preprocessing=STEPS, workers=0, on_bad_data=OnBadData.SKIP
        )
        assert [batch.samples for batch in data] == [1]
        assert len(data.bad_inputs) == 1

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_what_is_no_file_is_bad_data(self, folder):
        os.mkfifo(folder / "pipe.png")
        (folder / "folder.png").mkdir()
        (folder / "list.txt").write_text("a b/1.png\npipe.png\nfolder.png\nnul\0.png\n")
        data = load_data(
            str(folder / "list.txt"), batch_size=4, preprocessing=STEPS, workers=0, on_bad_data=OnBadData.SKIP
        )
        assert [batch.samples for batch in data] == [1]
        reasons = [one.reason for one in data.bad_inputs]
        assert len(reasons) == 3
        assert reasons[0].endswith("pipe.png cannot be read: not a regular file")
        assert data.identify()

    @pytest.mark.parametrize("text", ["notes\n", "", "a b/1.png x\n", "a b/1.pdf\n", f"a b/1.png {'9' * 19}\n"])
    def test_other_text_is_no_list(self, folder, text):
        (folder / "list.txt").write_text(text)
        with pytest.raises(UsageError, match="no path of an image"):
            read(folder / "list.txt")


def test_subfolders_need_not_be_classes(tmp_path):
    for year in ("2023", "2024"):
        (tmp_path / year).mkdir()
        (tmp_path / year / "a.png").write_bytes(encode_png(PIXELS[0]))
    assert load_data(str(tmp_path), batch_size=4, preprocessing=STEPS).has_labels
    data = load_data(str(tmp_path), batch_size=4, preprocessing=STEPS, columns=Columns(labels="none"))
    assert data.has_labels is False
    assert data.classes is None
    assert next(iter(data)).labels is None
    with pytest.raises(UsageError, match="--inputs and --labels name columns"):
        load_data(str(tmp_path), batch_size=4, preprocessing=STEPS, columns=Columns(labels="year"))


def test_columns_of_arrays_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", one=PIXELS, two=PIXELS[::-1], kind=LABELS)
    with pytest.raises(UsageError, match="which array holds the inputs"):
        read(tmp_path / "a.npz")
    (batch,) = read(tmp_path / "a.npz", columns=Columns("two", "kind"), batch_size=11)
    assert batch.labels.tolist() == LABELS
    with pytest.raises(UsageError, match="no array 'three', but one, two, kind"):
        read(tmp_path / "a.npz", columns=Columns("three"))


def test_arrays_that_hold_no_numbers_are_not_passed_over(tmp_path):
    images, text = np.ones((5, 2, 3), "float32"), np.array(["cat"] * 5)
    np.savez(tmp_path / "a.npz", images=images, labels=text)
    for columns in (Columns(), Columns(labels="labels")):
        with pytest.raises(UsageError, match="the array 'labels' holds <U3; plain numbers are needed; --labels none"):
            load_data(str(tmp_path / "a.npz"), batch_size=5, columns=columns)
    assert load_data(str(tmp_path / "a.npz"), batch_size=5, columns=Columns(labels="none")).has_labels is False
    np.savez(tmp_path / "b.npz", images=np.array([object()] * 5), masks=images)
    with pytest.raises(UsageError, match="the array 'images' holds Python objects"):
        load_data(str(tmp_path / "b.npz"), batch_size=5)
    assert load_data(str(tmp_path / "b.npz"), batch_size=5, columns=Columns("masks")).samples == 5
    np.savez(tmp_path / "c.npz", images=images, labels=np.full(5, 1 << 63, "uint64"))
    with pytest.raises(UsageError, match="at most 9223372036854775807"):
        list(load_data(str(tmp_path / "c.npz"), batch_size=5))


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_links_to_a_folder_that_they_lie_in_are_passed_over(tmp_path):
    """An image below is found once; links to other folders are followed."""
    (tmp_path / "a" / "deeper").mkdir(parents=True)
    (tmp_path / "a" / "deeper" / "0.png").write_bytes(encode_png(PIXELS[0]))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "deeper" / "up").symlink_to("..")
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "b").symlink_to("a")
    data = load_data(str(tmp_path), batch_size=4, preprocessing=STEPS)
    assert (data.samples, data.classes) == (2, ("a", "b"))


def test_data_without_a_name_are_not_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(encode_png(PIXELS[0]))
    with pytest.raises(UsageError, match="--data is empty"):
        load_data("", batch_size=4, preprocessing=STEPS)
