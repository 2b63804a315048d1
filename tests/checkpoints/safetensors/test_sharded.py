"""Checkpoints split over several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import RefusedError, UnwritableFileError
from bntool.plan import AddTensor, Operation, Plan, Record, RemoveTensor, Scaled, SetTensor, Values
from tests.checkpoints.foreign import write_sharded, write_sharded_bin
from tests.checkpoints.samples import assert_holds, tiny_net

WRITERS = [write_sharded, write_sharded_bin]
STEPS = (
    SetTensor("0.weight", Scaled("0.weight", (4, 27), (1.0, 2.0, 4.0, 8.0), (4, 1))),
    AddTensor("0.bias", Values((1, 2, 3, 4), (4,)), dtype="float32", after="0.weight"),
    SetTensor("1.running_var", Values((4, 3, 2, 1), (4,))),
    RemoveTensor("1.weight"),
    Record({"x": 1}),
)


def _write(source: Path, target: Path, *steps: Any, force: bool = False) -> None:
    save_checkpoint(apply_plan(open_checkpoint(source), Plan(Operation.FOLD, steps=steps)), target, force=force)


def _load(index: Path) -> dict[str, torch.Tensor]:
    weight_map = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for name in dict.fromkeys(weight_map.values()):
        path = index.parent / name
        part = (
            safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        )
        assert {key for key, file in weight_map.items() if file == name} == set(part)
        tensors.update(part)
    return {name: tensors[name] for name in weight_map}


@pytest.mark.parametrize("write", WRITERS)
def test_a_plan_reaches_all_shards(write: Any, tmp_path: Path) -> None:
    state = tiny_net().state_dict()
    source = write(state, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    _write(source, out / source.name, *STEPS)
    expected = {
        **state,
        "0.bias": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "1.running_var": torch.tensor([4.0, 3.0, 2.0, 1.0]),
    }
    del expected["1.weight"]
    expected["0.weight"] = state["0.weight"] * torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(4, 1, 1, 1)
    loaded = _load(out / source.name)
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    names = list(loaded)
    assert names.index("0.bias") == names.index("0.weight") + 1
    with open_checkpoint(out / source.name) as checkpoint:
        assert_holds(checkpoint, expected)
        assert checkpoint.records == {"": ({"x": 1},)}
        assert [norm.name for norm in find_batchnorms(checkpoint.state_dict(""))] == ["1"]
    index = json.loads((out / source.name).read_text())
    if "metadata" in index:
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())


@pytest.mark.parametrize("write", WRITERS)
def test_shards_without_changes_are_copied(write: Any, tmp_path: Path) -> None:
    source = write(tiny_net().state_dict(), tmp_path)
    (tmp_path / "out").mkdir()
    _write(source, tmp_path / "out" / source.name, SetTensor("3.bias", Values((1, 2, 3, 4, 5), (5,))))
    same = [p.name for p in (tmp_path / "out").iterdir() if p.read_bytes() == (tmp_path / p.name).read_bytes()]
    assert len([name for name in same if "-of-" in name]) == 1


def test_removing_all_of_a_shard(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2), "b.weight": torch.ones(3)}
    source = write_sharded(state, tmp_path)
    (tmp_path / "out").mkdir()
    _write(source, tmp_path / "out" / source.name, RemoveTensor("b.weight"))
    assert len(list((tmp_path / "out").iterdir())) == 2
    with open_checkpoint(tmp_path / "out" / source.name) as checkpoint:
        assert_holds(checkpoint, {"a.weight": torch.ones(2)})


def test_nothing_appears_if_one_shard_cannot(tmp_path: Path) -> None:
    source = write_sharded(tiny_net().state_dict(), tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00002-of-00002.safetensors").write_bytes(b"mine")
    with pytest.raises(UnwritableFileError, match="--force"):
        _write(source, out / source.name, *STEPS)
    assert [path.name for path in out.iterdir()] == ["model-00002-of-00002.safetensors"]
    _write(source, out / source.name, *STEPS, force=True)
    assert len(list(out.iterdir())) == 3


def test_the_output_must_be_an_index(tmp_path: Path) -> None:
    source = write_sharded(tiny_net().state_dict(), tmp_path)
    with pytest.raises(RefusedError, match="FOLDER/"):
        _write(source, tmp_path / "out.safetensors")


@pytest.mark.parametrize("write", WRITERS)
def test_checksums(write: Any, tmp_path: Path) -> None:
    with open_checkpoint(write(tiny_net().state_dict(), tmp_path)) as checkpoint:
        count = checkpoint.format.verify_checksums(checkpoint)
        assert count is None if write is write_sharded else count > 10
        assert checkpoint.format.can_record(checkpoint, checkpoint.state_dict(""))
        assert checkpoint.entries == {"shards": 2}
        assert bool(checkpoint.globals) == (write is write_sharded_bin)


def test_a_record_moves_only_when_its_shard_ends(tmp_path: Path) -> None:
    source = write_sharded(tiny_net().state_dict(), tmp_path)
    shards = list(open_checkpoint(source).content.shards.values())
    names = [list(shard.state_dicts[0].tensors) for shard in shards]
    bias = SetTensor("3.bias", Values((1, 2, 3, 4, 5), (5,)))
    plans: list[list[Any]] = [[RemoveTensor(name) for name in names[0]], [Record({"n": 1})], [Record({"n": 2}), bias]]
    for number, steps in enumerate(plans):
        (tmp_path / str(number)).mkdir()
        _write(source, tmp_path / str(number) / source.name, *steps)
        source = tmp_path / str(number) / source.name
    with open_checkpoint(source) as checkpoint:
        assert set(checkpoint.state_dict("").tensors) == set(names[1])
        assert checkpoint.records == {"": ({"n": 1}, {"n": 2})}
