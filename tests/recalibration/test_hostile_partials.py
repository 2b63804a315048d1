"""Partials that are damaged, of another kind, or built to do harm: one sentence, exit code 3 or 4, nothing written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import struct

import numpy as np
import pytest
import torch
from torch import nn

import bntool
from bntool.cli.main import main
from bntool.errors import CorruptFileError, FileError, RefusedError
from bntool.recalibration.checkpoint import recalibrate_checkpoint
from tests.programs.user_code import small_net
from tests.recalibration.test_resuming import Classifier, Unreliable

BATCHES = 9  # of a list, whose length nobody asks for: the second of two shards holds 1, 3, 5 and 7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint and both of its partials, and the one partial of all batches."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    torch.save(small_net.build().state_dict(), folder / "net.pt")
    batches = torch.randn(2 * BATCHES, 3, 9, 9, generator=torch.Generator().manual_seed(3)).split(2)
    for shard, name in (("1/2", "part-1"), ("2/2", "part-2"), ("1/1", "whole")):
        recalibrate_checkpoint(
            folder / "net.pt", model=small_net.build(), data=list(batches), shard=shard, partial=folder / name
        )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(made, tmp_path):
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def take_apart(data):
    """Header and numbers of a partial."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])


def put_together(header, body, *, length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def with_facts(change):
    """The partial with other facts: ``change`` edits them, or returns the text of others."""

    def spoil(path):
        header, body = take_apart(path.read_bytes())
        facts = json.loads(header["__metadata__"]["bntool_partial"])
        text = change(facts)
        header["__metadata__"]["bntool_partial"] = text if isinstance(text, str) else json.dumps(facts)
        path.write_bytes(put_together(header, body))

    return spoil


def with_numbers(**tensors):
    """The partial with other numbers: of a tensor the place and the value."""

    def spoil(path):
        header, body = take_apart(path.read_bytes())
        for name, (place, value) in tensors.items():
            start = header[name]["data_offsets"][0] + 8 * place
            struct.pack_into("<d" if header[name]["dtype"] == "F64" else "<q", body, start, value)
        path.write_bytes(put_together(header, body))

    return spoil


def with_all(name, value):
    """The partial with one value in all of a tensor."""

    def spoil(path):
        count = np.prod(take_apart(path.read_bytes())[0][name]["shape"])
        for place in range(count):
            with_numbers(**{name: (place, value)})(path)

    return spoil


def with_header(change):
    def spoil(path):
        header, body = take_apart(path.read_bytes())
        change(header)
        path.write_bytes(put_together(header, body))

    return spoil


def without_last_node(path):
    """One node less, in all tensors and facts alike."""
    header, body = take_apart(path.read_bytes())
    facts = json.loads(header.pop("__metadata__")["bntool_partial"])
    facts["left_out"].pop()
    kept, place = b"", 0
    for entry in header.values():
        first, end = entry["data_offsets"]
        size = (end - first) // entry["shape"][0] * (entry["shape"][0] - 1)
        kept += body[first : first + size]
        entry["shape"][0] -= 1
        entry["data_offsets"] = [place, place + size]
        place += size
    path.write_bytes(put_together({"__metadata__": {"bntool_partial": json.dumps(facts)}, **header}, kept))


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * share)])


def replace_by(make):
    def spoil(path):
        path.unlink()
        make(path)

    return spoil


def options(**values):
    return with_facts(lambda facts: facts["options"].update(values))


def first_layer(**values):
    return with_facts(lambda facts: facts["layers"][0].update(values))


CORRUPT, UNKNOWN, UNSAFE, UNREADABLE, REFUSED = "corrupt", "unknown-format", "unsafe", "unreadable", "refused"

# what is done to the second partial of two; the code of the error; words of the sentence
HOSTILE = {
    "empty": (lambda path: path.write_bytes(b""), UNREADABLE, ""),
    "cut in the length": (lambda path: path.write_bytes(path.read_bytes()[:5]), UNKNOWN, ""),
    "cut in the header": (cut(0.2), CORRUPT, "header"),
    "cut in the numbers": (cut(0.9), CORRUPT, "truncated"),
    "one byte short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), CORRUPT, "truncated"),
    "one byte more": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), CORRUPT, "other data follow"),
    "twice in one file": (lambda path: path.write_bytes(2 * path.read_bytes()), CORRUPT, "other data follow"),
    "a header without end": (lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), UNKNOWN, ""),
    "a folder": (replace_by(lambda path: path.mkdir()), None, ""),
    "a link to itself": (replace_by(lambda path: path.symlink_to(path.name)), UNREADABLE, ""),
    "a link to nothing": (replace_by(lambda path: path.symlink_to("absent")), UNREADABLE, ""),
    "a pipe": (replace_by(os.mkfifo), UNREADABLE, "not a regular file"),
    "a device": (replace_by(lambda path: path.symlink_to("/dev/zero")), UNREADABLE, "not a regular file"),
    "a checkpoint": (lambda path: path.write_bytes(path.with_name("net.pt").read_bytes()), UNKNOWN, "no partial"),
    "other safetensors": (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"), UNKNOWN, "no partial"),
    "facts that are no JSON": (with_facts(lambda _: "{"), CORRUPT, "not valid JSON"),
    "facts that are a list": (with_facts(lambda _: "[]"), CORRUPT, "not a JSON object"),
    "facts that say a key twice": (with_facts(lambda _: '{"version": 1, "version": 1}'), CORRUPT, "twice"),
    "facts with NaN": (with_facts(lambda _: '{"version": NaN}'), CORRUPT, "not JSON"),
    "a JSON bomb": (with_facts(lambda _: "[" * 1_000_000), CORRUPT, "nested too deeply"),
    "a JSON bomb in the header": (
        lambda path: path.write_bytes(put_together(b'{"a":' * 200_000, b"")), CORRUPT, "nested too deeply",
    ),
    "a number of 5,000 digits": (with_facts(lambda _: '{"version": ' + "9" * 5000 + "}"), CORRUPT, "JSON"),
    "no facts": (with_facts(lambda facts: facts.clear()), UNKNOWN, "version"),
    "of a later version": (with_facts(lambda facts: facts.update(version=2)), UNKNOWN, "a partial of version '2'"),
    "a version that is none": (with_facts(lambda facts: facts.update(version=True)), UNKNOWN, "version 'True'"),
    "facts of other kinds": (with_facts(lambda facts: facts.update(layers={"a": 1}, left_out=7)), CORRUPT, ""),
    "no options": (with_facts(lambda facts: facts.update(options=None)), CORRUPT, ""),
    "a method that is none": (options(method="best"), CORRUPT, ""),
    "another method": (options(method="paper"), REFUSED, "has the method paper"),
    "the method exact": (options(method="exact"), REFUSED, "has the method exact"),
    "another selection": (options(layers=["body.*"]), REFUSED, "has other layers"),
    "another precision": (options(precision="bfloat16"), REFUSED, "has the precision bfloat16"),
    "another seed": (options(seed=1), REFUSED, "has the seed 1"),
    "a seed that is text": (options(seed="0"), CORRUPT, ""),
    "other batches": (options(batch_size=3), REFUSED, "has batches of 3"),
    "of another checkpoint": (
        with_facts(lambda facts: facts["checkpoint"].update(fingerprint="0" * 64)), REFUSED, "another checkpoint",
    ),
    "of another model": (with_facts(lambda f: f["model"].update(fingerprint="0" * 64)), REFUSED, "another model"),
    "of other data": (with_facts(lambda f: f["data"].update(fingerprint="0" * 64)), REFUSED, "other data"),
    "not complete": (with_facts(lambda facts: facts.update(complete=False, position=8)), REFUSED, "is not complete"),
    "many shards": (with_facts(lambda facts: facts.update(shard=[2, 1 << 52])), REFUSED, "shards"),
    "a shard beyond": (with_facts(lambda facts: facts.update(shard=[3, 2])), CORRUPT, ""),
    "a shard below": (with_facts(lambda facts: facts.update(shard=[0, 2])), CORRUPT, ""),
    "the same shard": (with_facts(lambda facts: facts.update(shard=[1, 2])), REFUSED, "is there twice"),
    "a list of fewer": (with_facts(lambda f: f["data"].update(batches=8)), CORRUPT, "of 8"),
    "a list of more": (with_facts(lambda f: f["data"].update(batches=10)), REFUSED, "a list of 10 batches"),
    "a position beyond": (with_facts(lambda facts: facts.update(position=10)), CORRUPT, "after 10 of 9 batches"),
    "a position below": (with_facts(lambda facts: facts.update(position=-1)), CORRUPT, ""),
    "a platform of lists": (with_facts(lambda f: f["platform"].update(torch=["x"] * 10_000)), CORRUPT, ""),
    "no layers": (with_facts(lambda facts: facts.update(layers=[])), CORRUPT, ""),
    "a layer twice": (with_facts(lambda f: f["layers"].__setitem__(1, f["layers"][0])), CORRUPT, ""),
    "many channels": (first_layer(channels=1 << 50), UNSAFE, "more numbers"),
    "other channels": (first_layer(channels=3), CORRUPT, "of shape"),
    "negative channels": (first_layer(channels=-1), CORRUPT, ""),
    "a dtype that is none": (first_layer(dtype="float12"), CORRUPT, ""),
    "an eps that is none": (
        with_facts(lambda facts: json.dumps(facts).replace('"eps": 1e-05', '"eps": 1e999', 1)), CORRUPT, "",
    ),
    "a negative eps": (first_layer(eps=-1.0), CORRUPT, ""),
    "a tensor less": (
        with_header(lambda header: header.__setitem__("other", header.pop("variances"))), CORRUPT, "variances",
    ),
    "another dtype": (with_header(lambda header: header["mean"].update(dtype="I64")), CORRUPT, "float64"),
    "another shape": (with_header(lambda header: header["mean"]["shape"].reverse()), CORRUPT, "of shape"),
    "tensors that overlap": (
        with_header(lambda header: header["mean"].update(data_offsets=header["squares"]["data_offsets"])),
        CORRUPT,
        "overlaps",
    ),
    "NaN": (with_numbers(mean=(3, float("nan"))), CORRUPT, "NaN"),
    "infinite": (with_numbers(variances=(3, float("inf"))), CORRUPT, "infinity"),
    "negative squares": (with_numbers(squares=(3, -1.0)), CORRUPT, ""),
    "huge numbers": (with_numbers(mean=(3, 1e300), squares=(3, 1e308)), REFUSED, ""),
    "negative count": (with_numbers(positions=(0, -1)), CORRUPT, ""),
    "huge count": (with_numbers(positions=(0, 1 << 62)), CORRUPT, ""),
    "counts that overflow": (with_all("positions", 1 << 53), REFUSED, "more values than can be counted"),
    "no values": (with_numbers(positions=(0, 0)), CORRUPT, "without values"),
    "no calls": (with_numbers(calls=(0, 0)), CORRUPT, "not called"),
    "more batches than a node has": (with_numbers(batches=(0, 5)), CORRUPT, "a node of level 0 claims to hold 5"),
    "huge level": (with_numbers(level=(0, 1 << 40)), CORRUPT, ""),
    "huge index": (with_numbers(index=(0, 1 << 53)), CORRUPT, ""),
    "a node twice": (with_numbers(index=(0, 3)), CORRUPT, ""),
    "ranges that overlap": (with_numbers(level=(1, 1), index=(1, 3)), CORRUPT, "a batch twice"),
    "batches of another shard": (with_numbers(index=(0, 0)), REFUSED, "both hold batch 0"),
    "batches that are missing": (without_last_node, REFUSED, "none of these partials holds batch 7 of 9"),
    "a layer that is not there": (with_numbers(order=(0, 7)), CORRUPT, ""),
}  # fmt: skip


def merge(folder, *names):
    globs = [argument for name in names for argument in ("--from-partials", str(folder / name))]
    return main(["recalibrate", str(folder / "net.pt"), *globs, "-o", str(folder / "out.pt")])


def test_both_as_they_were_made_are_merged(folder, capsys):
    assert merge(folder, "part-*") == 0
    assert (folder / "out.pt").exists()
    assert "18 samples in" in capsys.readouterr().out


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_partial_is_one_sentence(fault, folder, capsys):
    spoil, code, words = HOSTILE[fault]
    spoil(folder / "part-2")
    before = sorted(path.name for path in folder.iterdir())
    assert merge(folder, "part-1", "part-2") in (3, 4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"bntool: [^\n]*\n", captured.err), captured.err
    assert len(captured.err) < 700
    assert "part-2" in captured.err or code == REFUSED
    assert words in captured.err
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises((FileError, RefusedError)) as caught:
        bntool.merge_statistics(folder / "net.pt", [folder / "part-1", folder / "part-2"])
    assert code in (None, caught.value.code)


ALONE = {
    "huge means": with_numbers(mean=(3, 1e300)),
    "huge variances": with_all("squares", 1e300),
    "a layer that the file has not": first_layer(names=["absent"]),
    "a layer with other channels": first_layer(names=["3"]),
    "a layer that is none": first_layer(names=["0"]),
    "a dtype of integers": first_layer(dtype="int8"),
}


@pytest.mark.parametrize("fault", ALONE)
def test_one_that_nothing_contradicts_writes_nothing_wrong(fault, folder, capsys):
    """Refused, or what is written is finite and leaves the weights alone."""
    ALONE[fault](folder / "whole")
    code = merge(folder, "whole")
    captured = capsys.readouterr()
    assert code in (0, 3, 4), captured.err
    assert (folder / "out.pt").exists() == (code == 0)
    if code:
        assert re.fullmatch(r"bntool: [^\n]*\n", captured.err), captured.err
        return
    old, new = (torch.load(folder / name, weights_only=True) for name in ("net.pt", "out.pt"))
    for name, tensor in new.items():
        assert torch.isfinite(tensor).all(), name
        assert "running" in name or "num_batches" in name or torch.equal(tensor, old[name]), name
        assert name not in old or tensor.shape == old[name].shape, name


def test_any_damaged_partial_is_an_error_or_harmless(folder):
    data, draw = (folder / "part-2").read_bytes(), random.Random(5)
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 1, 4])):
            damaged[draw.randrange(min(len(data), draw.choice([2500, len(data)])))] = draw.randrange(256)
        (folder / "part-2").write_bytes(damaged)
        with contextlib.suppress(FileError, RefusedError):
            merged = bntool.merge_statistics(folder / "net.pt", [folder / "part-1", folder / "part-2"])
            for statistics in merged.recalibration.statistics.values():
                assert np.isfinite(statistics.mean).all()
                assert (statistics.variance >= 0).all()


KEPT = {
    "goes on too late": with_facts(lambda facts: facts.update(position=25)),
    "goes on behind the end": with_facts(lambda facts: facts.update(position=1 << 50)),
    "lacks batches": without_last_node,
    "lacks those before": with_numbers(index=(0, 1), level=(0, 3), batches=(0, 8)),
    "is said to be complete": with_facts(
        lambda f: (f.update(complete=True, position=30), f["data"].update(batches=30))
    ),
}


@pytest.mark.parametrize("fault", KEPT)
def test_what_was_kept_is_not_gone_on_with_where_batches_are_missing(fault, tmp_path):
    """Batches 0 to 16 were measured: those from 0 on as one node of 16, and the last one."""
    file, kept = tmp_path / "net.pt", tmp_path / "kept"
    torch.save(Classifier().state_dict(), file)
    given = {"resume": kept, "resume_every": 0, "output": tmp_path / "out.pt"}
    with pytest.raises(bntool.BntoolError, match="the node is gone"):
        recalibrate_checkpoint(file, model=Classifier(), data=Unreliable(17, 1), **given)
    KEPT[fault](kept)
    before = kept.read_bytes()
    with pytest.raises(CorruptFileError):
        recalibrate_checkpoint(file, model=Classifier(), data=Unreliable(), **given)
    assert kept.read_bytes() == before
    assert not (tmp_path / "out.pt").exists()


def test_the_layers_are_those_of_the_network(made):
    facts = json.loads(take_apart(made["part-2"])[0]["__metadata__"]["bntool_partial"])
    layers = [name for name, module in small_net.build().named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [layer["module"] for layer in facts["layers"]] == layers
