"""Rewriting torch files without loss: what torch.load gives is the input plus the plan, and nothing else moved."""

from __future__ import annotations

import argparse
import collections
import copy
import io
import os
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import CorruptFileError, RefusedError, UsageError
from bntool.plan import (
    AddTensor,
    Operation,
    Plan,
    Record,
    RemoveEntry,
    RemoveTensor,
    Scaled,
    SetAttribute,
    SetTensor,
    SetVersion,
    Step,
    Values,
)
from tests.checkpoints.foreign import rezip
from tests.checkpoints.samples import assert_same, tiny_net
from tests.checkpoints.torch.test_reading import Inert, Net, Sequence

MEAN = SetTensor("1.running_mean", Values((0.5, -1.5, 2.5, 1e-3), (4,)))
NEW_MEAN = torch.tensor([0.5, -1.5, 2.5, 1e-3])
COUNT = SetTensor("1.num_batches_tracked", Values((1000,), ()))
FORMATS = [True, False]  # the values of _use_new_zipfile_serialization


def _plan(*steps: Step, state_dict: str = "") -> Plan:
    return Plan(Operation.RECALIBRATE, state_dict=state_dict, steps=steps)


def _save(value: Any, folder: Path, **options: Any) -> Path:
    torch.save(value, folder / "in.pt", **options)
    return folder / "in.pt"


def _rewrite(source: Path, *plans: Plan) -> Path:
    target = source.parent / "out.pt"
    checkpoint = open_checkpoint(source)
    for plan in plans:
        checkpoint = apply_plan(checkpoint, plan)
    save_checkpoint(checkpoint, target, force=True)
    return target


def _load(path: Path, *, trusted: bool = False) -> Any:
    mmap = zipfile.is_zipfile(path)
    return torch.load(path, weights_only=not trusted, mmap=mmap)


def _changed_bytes(before: Path, after: Path) -> list[int]:
    old, new = before.read_bytes(), after.read_bytes()
    assert len(old) == len(new)
    return [index for index, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]


def _checksum_places(path: Path) -> dict[str, set[int]]:
    """For each record of a zip file, the bytes of its CRC in the directory, the local header and the descriptor."""
    data = path.read_bytes()
    places = {}
    with zipfile.ZipFile(path) as archive:
        position = archive.start_dir
        for info in archive.infolist():
            assert data[position : position + 4] == b"PK\x01\x02"
            name, extra, comment = struct.unpack_from("<3H", data, position + 28)
            local_name, local_extra = struct.unpack_from("<2H", data, info.header_offset + 26)
            after = info.header_offset + 30 + local_name + local_extra + info.compress_size
            starts = [position + 16, info.header_offset + 14, after, after + 4]
            places[info.filename] = {start + index for start in starts for index in range(4)}
            position += 46 + name + extra + comment
    return places


# values in place


@pytest.mark.parametrize("crc", [True, False])
def test_new_values_change_only_their_bytes_and_checksums(crc: bool, tmp_path: Path) -> None:
    state = {"model": tiny_net().state_dict(), "epoch": 3}
    options = torch.serialization
    if not crc and not hasattr(options, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    if not crc:
        options.set_crc32_options(False)
    try:
        source = _save(state, tmp_path)
    finally:
        if not crc:
            options.set_crc32_options(True)
    target = _rewrite(source, _plan(MEAN, COUNT, state_dict="model"))
    with open_checkpoint(source) as checkpoint:
        allowed: set[int] = set()
        records = {}
        for name in ("1.running_mean", "1.num_batches_tracked"):
            storage = checkpoint.state_dict("model").tensors[name].storage  # type: ignore[attr-defined]
            allowed |= set(range(storage.offset, storage.offset + storage.nbytes))
            records[name] = f"in/data/{storage.key}"
    if crc:
        places = _checksum_places(source)
        allowed |= set().union(*(places[record] for record in records.values()))
    assert set(_changed_bytes(source, target)) <= allowed
    state["model"]["1.running_mean"] = NEW_MEAN
    state["model"]["1.num_batches_tracked"] = torch.tensor(1000)
    assert_same(_load(target), state)
    assert not crc or zipfile.ZipFile(target).testzip() is None


def test_new_values_in_a_legacy_file_change_only_their_bytes(tmp_path: Path) -> None:
    state = tiny_net().state_dict()
    source = _save(state, tmp_path, _use_new_zipfile_serialization=False)
    target = _rewrite(source, _plan(MEAN))
    assert len(_changed_bytes(source, target)) <= 16
    state["1.running_mean"] = NEW_MEAN
    assert_same(_load(target), state)


def test_new_values_in_a_whole_module(tmp_path: Path) -> None:
    net = Net()
    source = _save(net, tmp_path)
    target = _rewrite(source, _plan(SetTensor("norm.running_var", Values((1.0, 2.0, 3.0, 4.0), (4,)))))
    assert len(_changed_bytes(source, target)) <= 16 + 12
    net.norm.running_var = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert_same(_load(target, trusted=True), net)


# everything else survives


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_keys_added_and_removed(protocol: int, zipped: bool, tmp_path: Path) -> None:
    net = tiny_net()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = {
        "before": [1, 2.5, "text", None, True, b"bytes", (1, (2, 3)), {4, 5}, frozenset([6]), 10**30, -1],
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "plain": dict(a=1),
        "ordered": OrderedDict(b=2),
        "counter": collections.Counter("abca"),
        "default": collections.defaultdict(list, {"x": [1]}),
        "ema": copy.deepcopy(net.state_dict()),
        "inert": Inert({"nested": torch.arange(3)}),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "long text": "x" * 100_000 + "é",
        "long bytes": bytes(range(256)) * 1000,
    }
    source = _save(state, tmp_path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    target = _rewrite(
        source,
        _plan(
            AddTensor("0.bias", Values((1, 2, 3, 4), (4,)), dtype="float32", after="0.weight"),
            RemoveTensor("1.weight"),
            RemoveTensor("1.bias"),
            MEAN,
            Record({"x": 1}),
            state_dict="model",
        ),
    )
    model = state["model"]
    assert isinstance(model, OrderedDict)
    del model["1.weight"], model["1.bias"]
    model["0.bias"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for key in [key for key in model if key not in ("0.weight", "0.bias")]:
        model.move_to_end(key)
    model["1.running_mean"] = NEW_MEAN
    loaded = _load(target, trusted=True)
    assert loaded["model"]._metadata[""].pop("bntool") == '[{"x":1}]'
    assert_same(loaded, state)
    assert loaded["model"]["0.weight"].is_contiguous()
    if zipped:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target) as new:
            assert {n.split("/")[0] for n in new.namelist()} == {"in"}
            kept = [n for n in old.namelist() if "/data/" not in n and not n.endswith("data.pkl")]
            assert [n for n in new.namelist() if n in kept] == kept
            assert all(old.read(n) == new.read(n) for n in kept)
            assert len(new.namelist()) == len(old.namelist()) - 1  # two storages less, one more
            assert new.testzip() is None
            assert all(info.header_offset % 1 == 0 for info in new.infolist())


def test_storages_stay_aligned_for_mapping(tmp_path: Path) -> None:
    target = _rewrite(_save(tiny_net().state_dict(), tmp_path), _plan(RemoveTensor("1.bias")))
    with open_checkpoint(target) as checkpoint:
        for tensor in checkpoint.state_dict("").tensors.values():
            assert tensor.storage.offset % 64 == 0  # type: ignore[attr-defined]


def test_a_plain_dict_stays_one_and_its_record_goes_beside_the_pickle(tmp_path: Path) -> None:
    source = _save({"a": dict(tiny_net().state_dict()), "b": dict(tiny_net().state_dict())}, tmp_path)
    target = _rewrite(source, _plan(MEAN, Record({"n": 1}), state_dict="a"), _plan(Record({"n": 2}), state_dict="b"))
    loaded = _load(target)
    assert type(loaded["a"]) is dict
    assert list(loaded["a"]) == list(tiny_net().state_dict())
    tiny_net().load_state_dict(loaded["a"], strict=True)
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.records == {"a": ({"n": 1},), "b": ({"n": 2},)}
    again = target.rename(tmp_path / "again.pt")
    target = _rewrite(again, _plan(Record({"n": 3}), state_dict="b"))
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.records == {"a": ({"n": 1},), "b": ({"n": 2}, {"n": 3})}
    target = _rewrite(target.rename(again), _plan(MEAN, state_dict="b"))
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.records == {"a": ({"n": 1},), "b": ({"n": 2}, {"n": 3})}


def test_a_legacy_file_without_metadata_has_no_place_for_a_record(tmp_path: Path) -> None:
    source = _save(dict(tiny_net().state_dict()), tmp_path, _use_new_zipfile_serialization=False)
    with open_checkpoint(source) as checkpoint:
        assert not checkpoint.format.can_record(checkpoint, checkpoint.state_dict(""))
    with pytest.raises(RefusedError, match="no place for a record"):
        _rewrite(source, _plan(MEAN, Record({})))
    assert os.listdir(tmp_path) == ["in.pt"]
    _rewrite(source, _plan(MEAN))


def test_the_record_survives_in_metadata(tmp_path: Path) -> None:
    for zipped in FORMATS:
        source = _save(tiny_net().state_dict(), tmp_path, _use_new_zipfile_serialization=zipped)
        target = _rewrite(source, _plan(MEAN, Record({"command": "recalibrate"})))
        loaded = _load(target)
        tiny_net().load_state_dict(loaded, strict=True)
        torch.save(loaded, tmp_path / "resaved.pt")
        with open_checkpoint(tmp_path / "resaved.pt") as checkpoint:
            assert checkpoint.records == {"": ({"command": "recalibrate"},)}


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("duplicate", [copy.copy, OrderedDict.copy])
def test_a_copy_beside_the_state_dict_keeps_its_own_metadata(zipped: bool, duplicate: Any, tmp_path: Path) -> None:
    """``copy.copy`` of a state dict has the very ``_metadata`` of the original, and so has it in a file."""
    model = tiny_net().state_dict()
    average = duplicate(model)
    average._metadata = model._metadata
    source = _save({"model": model, "ema": average}, tmp_path, _use_new_zipfile_serialization=zipped)
    steps = (MEAN, SetVersion("1", 3), Record({"command": "recalibrate"}))
    target = _rewrite(source, _plan(*steps, state_dict="model"))
    loaded = _load(target)
    assert_same(loaded["ema"], average)
    assert loaded["ema"]._metadata == average._metadata
    changed, before = dict(loaded["model"]._metadata), dict(model._metadata)
    assert changed.pop("1") == {"version": 3}
    assert changed.pop("").keys() - before.pop("") == {"bntool"}
    del before["1"]
    assert changed == before
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.records == {"model": ({"command": "recalibrate"},)}


def test_the_archive_root_name_and_the_mode_survive(tmp_path: Path) -> None:
    source = _save(tiny_net().state_dict(), tmp_path)
    source.write_bytes(rezip(source, lambda name, data: (name.replace("in/", "größe/", 1), data)))
    source.chmod(0o640)
    for plan in (_plan(MEAN), _plan(MEAN, Record({}))):
        target = _rewrite(source, plan)
        assert target.stat().st_mode & 0o777 == 0o640
        assert {n.split("/")[0] for n in zipfile.ZipFile(target).namelist()} == {"größe"}


# shared memory


def _tied(**extra: Any) -> dict[str, Any]:
    weight = torch.arange(4.0)
    return {"a.weight": weight, "b.weight": weight.detach(), "c.weight": torch.ones(4), **extra}


NINES = Values((9, 9, 9, 9), (4,))


@pytest.mark.parametrize("zipped", FORMATS)
def test_tied_tensors_stay_tied_when_all_get_the_same(zipped: bool, tmp_path: Path) -> None:
    source = _save(_tied(), tmp_path, _use_new_zipfile_serialization=zipped)
    loaded = _load(_rewrite(source, _plan(SetTensor("a.weight", NINES), SetTensor("b.weight", NINES))))
    assert loaded["a.weight"].tolist() == loaded["b.weight"].tolist() == [9] * 4
    assert loaded["a.weight"].data_ptr() == loaded["b.weight"].data_ptr()


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("other", [None, (1, 2, 3, 5)])
def test_tied_tensors_part_when_one_changes(zipped: bool, other: Any, tmp_path: Path) -> None:
    source = _save(_tied(), tmp_path, _use_new_zipfile_serialization=zipped)
    steps = [SetTensor("a.weight", NINES), *([SetTensor("b.weight", Values(other, (4,)))] if other else [])]
    loaded = _load(_rewrite(source, _plan(*steps)))
    assert loaded["a.weight"].tolist() == [9] * 4
    assert loaded["b.weight"].tolist() == list(other or (0, 1, 2, 3))
    assert list(loaded) == ["a.weight", "b.weight", "c.weight"]


def test_one_tensor_object_under_two_names_parts_too(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    source = _save({"a.weight": weight, "b.weight": weight}, tmp_path)
    loaded = _load(_rewrite(source, _plan(SetTensor("a.weight", NINES))))
    assert (loaded["a.weight"].tolist(), loaded["b.weight"].tolist()) == ([9] * 4, [0, 1, 2, 3])


def test_a_tensor_that_lies_elsewhere_too_parts(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    for elsewhere in (weight, [weight], weight.view(2, 2), Inert(weight), {"x": (weight[1:],)}):
        source = _save({"model": {"a.weight": weight}, "elsewhere": elsewhere}, tmp_path)
        loaded = _load(_rewrite(source, _plan(SetTensor("a.weight", NINES), state_dict="model")), trusted=True)
        assert loaded["model"]["a.weight"].tolist() == [9] * 4
        loaded["model"]["a.weight"] = weight
        assert_same(loaded["elsewhere"], elsewhere)


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_storage_that_is_saved_as_such_keeps_its_bytes(tmp_path: Path) -> None:
    data = torch.arange(4, dtype=torch.uint8)
    source = _save({"a.weight": data, "raw": data.untyped_storage()}, tmp_path)
    loaded = _load(_rewrite(source, _plan(SetTensor("a.weight", NINES))))
    assert (loaded["a.weight"].tolist(), list(loaded["raw"])) == ([9] * 4, [0, 1, 2, 3])


def test_overlapping_views_with_equal_new_values(tmp_path: Path) -> None:
    flat = torch.arange(5.0)
    source = _save({"a.weight": flat[:4], "b.weight": flat[1:]}, tmp_path)
    values = Values((1, 2, 3, 4), (4,))
    loaded = _load(_rewrite(source, _plan(SetTensor("a.weight", values), SetTensor("b.weight", values))))
    assert loaded["a.weight"].tolist() == loaded["b.weight"].tolist() == [1, 2, 3, 4]


def test_interleaved_views_of_one_storage(tmp_path: Path) -> None:
    flat = torch.arange(8.0)
    source = _save({"a.weight": flat[::2], "b.weight": flat[1::2]}, tmp_path)
    loaded = _load(_rewrite(source, _plan(SetTensor("a.weight", NINES))))
    assert (loaded["a.weight"].tolist(), loaded["b.weight"].tolist()) == ([9] * 4, [1, 3, 5, 7])


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize(
    "view",
    [
        lambda flat: flat[:24].view(4, 6),
        lambda flat: flat[:24].view(6, 4).t(),
        lambda flat: flat.view(4, 10)[:, 2:8],
        lambda flat: flat[3:27].view(2, 2, 2, 3).permute(0, 2, 3, 1).reshape(4, 6).contiguous(),
        lambda flat: flat[0].expand(4, 6),
        lambda flat: flat[:6].expand(4, 6),
        lambda flat: flat.unfold(0, 6, 1)[:4],
        lambda flat: flat[:24].view(4, 6).to(memory_format=torch.contiguous_format),
    ],
)
def test_strided_views_keep_what_lies_around_them(view: Any, zipped: bool, tmp_path: Path) -> None:
    flat = torch.arange(40.0)
    tensor = view(flat)
    source = _save({"a.weight": tensor}, tmp_path, _use_new_zipfile_serialization=zipped)
    numbers = tuple(float(100 + n) for n in range(24))
    loaded = _load(_rewrite(source, _plan(SetTensor("a.weight", Values(numbers, (4, 6))))))["a.weight"]
    assert loaded.flatten().tolist() == list(numbers)
    if loaded.stride() == tensor.stride() and loaded.untyped_storage().nbytes() == 160:
        whole = torch.empty(0).set_(loaded.untyped_storage())
        untouched = torch.ones(40, dtype=torch.bool)
        torch.as_strided(untouched, tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
        assert torch.equal(whole[untouched], flat[untouched])


def test_a_small_view_of_a_large_storage_stays_one(tmp_path: Path) -> None:
    flat = torch.arange(1000.0)
    source = _save({"a.weight": flat[10:14], "b.bias": torch.ones(1)}, tmp_path)
    target = _rewrite(source, _plan(SetTensor("a.weight", NINES), RemoveTensor("b.bias")))
    loaded = _load(target)["a.weight"]
    assert loaded.tolist() == [9] * 4
    assert loaded.untyped_storage().nbytes() == 4000


def test_parameters_and_requires_grad_survive(tmp_path: Path) -> None:
    shared = nn.Parameter(torch.arange(4.0))
    state = {
        "a.weight": nn.Parameter(torch.arange(4.0)),
        "b.weight": nn.Parameter(torch.arange(4.0), requires_grad=False),
        "c.weight": shared,
        "d.weight": nn.Parameter(shared.data),
        "e.weight": torch.ones(4, requires_grad=True),
    }
    source = _save(state, tmp_path)
    target = _rewrite(source, _plan(SetTensor("a.weight", NINES), SetTensor("c.weight", NINES)))
    with torch.no_grad():
        state["a.weight"].fill_(9)
        state["c.weight"] = nn.Parameter(torch.full((4,), 9.0))
    loaded = _load(target)
    assert_same(loaded, state)
    assert loaded["c.weight"].data_ptr() != loaded["d.weight"].data_ptr()


# whole modules


def _module(tmp_path: Path, net: nn.Module, **options: Any) -> Path:
    return _save({"epoch": 1, "model": net}, tmp_path, **options)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_flags_of_modules_and_parameters(protocol: int, zipped: bool, tmp_path: Path) -> None:
    net = Net()
    source = _module(tmp_path, net, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    target = _rewrite(
        source,
        _plan(
            SetAttribute("norm", "training", False),
            SetAttribute("norm", "weight.requires_grad", False),
            SetAttribute("blocks.0", "note", "new"),
            SetTensor("norm.running_mean", NINES),
            state_dict="model",
        ),
    )
    loaded = _load(target, trusted=True)
    net.norm.training = False
    net.norm.weight.requires_grad = False
    net.blocks[0].note = "new"
    net.norm.running_mean.fill_(9)
    assert_same(loaded["model"], net)
    assert isinstance(loaded["model"].norm.weight, nn.Parameter)


def test_flags_below_a_wrapper(tmp_path: Path) -> None:
    source = _module(tmp_path, nn.DataParallel(Net()))
    plan = _plan(SetAttribute("norm", "training", False), SetAttribute("", "training", False), state_dict="model")
    loaded = _load(_rewrite(source, plan), trusted=True)["model"]
    assert (loaded.training, loaded.module.training, loaded.module.norm.training) == (True, False, False)
    assert loaded.module.conv.training is True


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (SetAttribute("nowhere", "training", False), "no such module"),
        (SetAttribute("norm", "running_mean.requires_grad", False), "no such parameter"),
        (SetAttribute("norm", "nothing.requires_grad", False), "no such parameter"),
        (RemoveTensor("norm.weight"), "whole modules"),
        (AddTensor("conv.bias", NINES, dtype="float32", after="conv.weight"), "whole modules"),
        (RemoveEntry(("nothing",)), "no entry"),
        (RemoveEntry(("epoch", "nothing")), "no entry"),
    ],
)
def test_what_a_whole_module_does_not_allow(step: Step, words: str, tmp_path: Path) -> None:
    source = _module(tmp_path, Net())
    with pytest.raises(RefusedError, match=words):
        _rewrite(source, _plan(step, state_dict="model"))
    assert os.listdir(tmp_path) == ["in.pt"]


def test_a_tied_layer_of_a_whole_module_is_not_parted(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(4)
    source = _module(tmp_path, nn.Sequential(norm, nn.ReLU(), norm))
    with pytest.raises(RefusedError, match="share their memory"):
        _rewrite(source, _plan(SetTensor("0.weight", NINES), state_dict="model"))
    both = _plan(SetTensor("0.weight", NINES), SetTensor("2.weight", NINES), state_dict="model")
    loaded = _load(_rewrite(source, both), trusted=True)["model"]
    assert loaded[0] is loaded[2]
    assert loaded[0].weight.tolist() == [9] * 4


def test_flags_of_a_state_dict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such module"):
        _rewrite(_save(tiny_net().state_dict(), tmp_path), _plan(SetAttribute("1", "training", False)))


# the rest


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (lambda one, two: {0: one, 1: two}, "1"),
        (lambda one, two: {"epoch": 3, "nets": {7: one, "7": two}}, "nets.7#2"),
        (lambda one, two: {0.9: one, 0.99: {"model": two}}, "0.99.model"),
        (lambda one, two: [one, two, 5], "1"),
        (lambda one, two: (one, (3, two)), "1.1"),
        (lambda one, two: {"kept": collections.deque([one, two], 2)}, "kept.1"),
        (lambda one, two: Sequence([one, two]), "1"),
    ],
)
def test_one_of_several_models_by_number(layout: Any, key: str, protocol: int, zipped: bool, tmp_path: Path) -> None:
    one, two = tiny_net().state_dict(), copy.deepcopy(tiny_net().state_dict())
    path = _save(layout(one, two), tmp_path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    steps = (
        MEAN,
        AddTensor("0.bias", Values((1.0, 2.0, 3.0, 4.0), (4,)), dtype="float32", after="0.weight"),
        RemoveTensor("1.weight"),
        Record({"n": 1}),
    )
    target = _rewrite(path, _plan(*steps, state_dict=key))
    with open_checkpoint(target) as written:
        assert written.records == {key: ({"n": 1},)}
    two["1.running_mean"] = NEW_MEAN
    two["0.bias"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    two.move_to_end("0.bias", last=False)
    two.move_to_end("0.weight", last=False)
    del two["1.weight"]
    two._metadata[""]["bntool"] = '[{"n":1}]'
    assert_same(_load(target, trusted=True), layout(one, two))


@pytest.mark.parametrize("zipped", FORMATS)
def test_optimizer_state_can_be_removed(zipped: bool, tmp_path: Path) -> None:
    net = tiny_net()
    state = {
        "model": net.state_dict(), "optimizer": {"state": {0: {"m": torch.ones(50)}}, "param_groups": []},
        "nested": {"scheduler": {"x": 1}, "kept": 2},
    }  # fmt: skip
    source = _save(state, tmp_path, _use_new_zipfile_serialization=zipped)
    steps = RemoveEntry(("optimizer",)), RemoveEntry(("nested", "scheduler"))
    edited = apply_plan(open_checkpoint(source), _plan(MEAN, *steps, state_dict="model"))
    assert set(edited.entries) == {"model", "nested"}
    target = _rewrite(source, _plan(MEAN, *steps, state_dict="model"))
    del state["optimizer"], state["nested"]["scheduler"]
    state["model"]["1.running_mean"] = NEW_MEAN
    assert_same(_load(target), state)
    assert target.stat().st_size < source.stat().st_size  # its storages are gone too
    for storage in zipfile.ZipFile(target).infolist() if zipped else []:
        assert storage.file_size != 200


@pytest.mark.parametrize("deflate", [True, False])
def test_archives_that_were_packed_again(deflate: bool, tmp_path: Path) -> None:
    state = tiny_net().state_dict()
    source = _save(state, tmp_path)
    source.write_bytes(rezip(source, deflate=deflate))
    assert_same(_load(source, trusted=True) if not deflate else state, state)
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.format.verify_checksums(checkpoint) == len(zipfile.ZipFile(source).namelist())
    target = _rewrite(source, _plan(MEAN))
    state["1.running_mean"] = NEW_MEAN
    assert_same(_load(target), state)
    target = _rewrite(target.rename(tmp_path / "x.pt"), _plan(MEAN, Record({})))
    loaded = _load(target)
    del loaded._metadata[""]["bntool"]
    assert_same(loaded, state)


def test_a_damaged_source_is_noticed_on_rewriting(tmp_path: Path) -> None:
    source = _save(tiny_net().state_dict(), tmp_path)
    with open_checkpoint(source) as checkpoint:
        weight = checkpoint.state_dict("").tensors["3.weight"]
        storage, shape = weight.storage, weight.shape  # type: ignore[attr-defined]
    offset, record = storage.offset, f"in/data/{storage.key}"
    data = bytearray(source.read_bytes())
    data[offset] ^= 1
    source.write_bytes(data)
    checkpoint = open_checkpoint(source)  # opening does not read it
    with pytest.raises(CorruptFileError, match="checksum"):
        checkpoint.format.verify_checksums(checkpoint)
    scaled = SetTensor("3.weight", Scaled("3.weight", shape, (2.0,), (1,) * len(shape)))
    for plan in (_plan(scaled), _plan(scaled, Record({})), _plan(RemoveTensor("3.weight"))):
        with pytest.raises(CorruptFileError, match="checksum"):
            _rewrite(source, plan)
    assert os.listdir(tmp_path) == ["in.pt"]
    for plan in (_plan(MEAN), _plan(MEAN, Record({}))):  # what is only copied keeps its checksum, and so its damage
        target = _rewrite(source, plan)
        assert zipfile.ZipFile(target).testzip() == record


def test_big_endian_files_stay_so(tmp_path: Path) -> None:
    source = _save({"a.weight": torch.tensor([1.5, 2.5]).view(torch.int32)}, tmp_path)
    source.write_bytes(rezip(source, lambda n, d: (n, b"big" if n.endswith("byteorder") else d)))
    added = AddTensor("a.bias", Values((3.0, -1.0), (2,)), dtype="float64", after="a.weight")
    target = _rewrite(source, _plan(SetTensor("a.weight", Values((7, 258), (2,))), added))
    with zipfile.ZipFile(target) as archive:
        assert archive.read("in/byteorder") == b"big"
        assert archive.read("in/data/0") == struct.pack(">2i", 7, 258)
        assert archive.read("in/data/1") == struct.pack(">2d", 3.0, -1.0)


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:torch.quantize_per")
def test_special_tensors_are_passed_through(tmp_path: Path) -> None:
    from tests.checkpoints.torch.test_reading import SPECIAL

    special = {name: make() for name, (make, _) in SPECIAL.items()}
    state = {**special, "f8.weight": torch.arange(4.0).to(torch.float8_e5m2), "a.weight": torch.ones(4)}
    source = _save(state, tmp_path)
    target = _rewrite(source, _plan(SetTensor("a.weight", NINES), RemoveTensor("f8.weight")))
    loaded = torch.load(target, weights_only=False)
    expected = torch.load(source, weights_only=False)
    del expected["f8.weight"]
    assert list(loaded) == list(expected)
    for name in special:
        assert type(loaded[name]) is type(expected[name])
        assert repr(loaded[name]) == repr(expected[name])
        with pytest.raises(RefusedError, match="cannot be given new elements"):
            apply_plan(open_checkpoint(source), _plan(SetTensor(name, NINES)))
    assert loaded["a.weight"].tolist() == [9] * 4


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (SetTensor("nothing", NINES), UsageError),
        (RemoveTensor("nothing"), UsageError),
        (AddTensor("1.weight", NINES, dtype="float32", after="1.bias"), UsageError),
        (AddTensor("1.new", NINES, dtype="float32", after="nothing"), UsageError),
        (SetTensor("1.weight", Values((1.0,), (1,))), UsageError),
        (SetTensor("1.weight", Values((1e39, 0, 0, 0), (4,))), RefusedError),
        (SetTensor("1.num_batches_tracked", Values((0.5,), ())), RefusedError),
        (SetTensor("1.num_batches_tracked", Values((float("nan"),), ())), RefusedError),
        (SetTensor("1.num_batches_tracked", Values((2.0**63,), ())), RefusedError),
    ],
)
def test_impossible_steps(step: Step, error: type[Exception], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_save(tiny_net().state_dict(), tmp_path))
    with pytest.raises(error):
        apply_plan(checkpoint, _plan(step))


def test_nothing_of_the_argument_changes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_save(tiny_net().state_dict(), tmp_path))
    before = dict(checkpoint.state_dict("").tensors)
    edited = apply_plan(checkpoint, _plan(MEAN, Record({}), RemoveTensor("0.weight")))
    assert checkpoint.state_dict("").tensors == before
    assert not checkpoint.edits
    assert not checkpoint.records
    for _ in range(2):  # writing twice gives the same
        save_checkpoint(edited, tmp_path / "out.pt", force=True)
        data = (tmp_path / "out.pt").read_bytes()
    save_checkpoint(edited, tmp_path / "out2.pt")
    assert (tmp_path / "out2.pt").read_bytes() == data
    assert io.BytesIO(data).read(2) == b"PK"
