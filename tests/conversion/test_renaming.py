"""New names: the oracle is what torch itself writes for the model that has them."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bntool
from bntool.checkpoints import saving
from bntool.cli.main import main
from bntool.errors import RefusedError, UsageError, VerificationError
from bntool.modules.application import apply_plan as apply_live
from bntool.plan import Operation, Plan, RenameTensor


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(stem=Block(), body=nn.Sequential(Block(), Block()), head=nn.Linear(3, 2)))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def plain(metadata):
    return {path: {k: v for k, v in facts.items() if k != "bntool"} for path, facts in metadata.items()}


def assert_same(path, state):
    """The file holds what torch would have written for these names, versions of modules too."""
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert plain(loaded._metadata) == plain(state._metadata)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("way", ["strip", "strip without dot", "add", "rename"])
def test_torch_writes_the_same_for_the_model_of_that_name(way, legacy, tmp_path):
    model = network()
    wrapped = nn.DataParallel(model)
    renamed = nn.Sequential(OrderedDict(trunk=model.stem, body=model.body, head=model.head))
    before, after, options = {
        "strip": (wrapped, model, {"strip_prefix": "module."}),
        "strip without dot": (wrapped, model, {"strip_prefix": "module"}),
        "add": (model, wrapped, {"add_prefix": "module."}),
        "rename": (model, renamed, {"renames": {"stem": "trunk"}}),
    }[way]
    torch.save(before.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    bntool.convert(tmp_path / "a.pt", tmp_path / "b.pt", **options)
    state = after.state_dict()
    if way == "add":
        state._metadata[""] = {}  # of DataParallel itself; the file knows nothing of that
    assert_same(tmp_path / "b.pt", state)


def test_names_can_be_exchanged_and_nested_prefixes_lose_one_level(tmp_path):
    state = {f"{name}.weight": torch.full((2,), float(i)) for i, name in enumerate(["a.x", "b.x", "m.m.x", "m.x"])}
    torch.save(state, tmp_path / "a.pt")
    with bntool.open_checkpoint(tmp_path / "a.pt") as checkpoint:
        steps = (RenameTensor("a.x.weight", "b.x.weight"), RenameTensor("b.x.weight", "a.x.weight"))
        edited = bntool.apply_plan(checkpoint, Plan(Operation.CONVERT, steps=steps))
        bntool.save_checkpoint(edited, tmp_path / "b.pt")
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    assert [float(tensor[0]) for tensor in loaded.values()] == [0, 1, 2, 3]
    assert list(loaded)[:2] == ["b.x.weight", "a.x.weight"]
    bntool.convert(tmp_path / "a.pt", tmp_path / "c.pt", strip_prefix="m")
    assert list(torch.load(tmp_path / "c.pt", weights_only=True))[2:] == ["m.x.weight", "x.weight"]


def test_ties_stay(tmp_path):
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    model.b.weight = model.a.weight
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    bntool.convert(tmp_path / "a.pt", tmp_path / "b.pt", renames={"b": "decoder.out"})
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    assert loaded["epoch"] == 3
    assert loaded["model"]["decoder.out.weight"].data_ptr() == loaded["model"]["a.weight"].data_ptr()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_records_follow(suffix, tmp_path):
    model = network()
    path = tmp_path / f"a{suffix}"
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    bntool.freeze_checkpoint(path, tmp_path / f"f{suffix}", layers=["body.*"])
    bntool.convert(tmp_path / f"f{suffix}", tmp_path / f"r{suffix}", strip_prefix="module", renames={"body": "blocks"})
    other = nn.Sequential(OrderedDict(stem=Block(), blocks=nn.Sequential(Block(), Block()), head=nn.Linear(3, 2)))
    assert bntool.apply_freeze(other, tmp_path / f"r{suffix}").layers == ("blocks.0.bn", "blocks.1.bn")
    with bntool.open_checkpoint(tmp_path / f"r{suffix}") as checkpoint:
        frozen, converted = checkpoint.records[""]
    assert frozen["layers"] == ["blocks.0.bn", "blocks.1.bn"]
    assert converted["renames"] == {"body": "blocks"}


def test_safetensors_keeps_texts_and_order(tmp_path):
    state = dict(network().state_dict())
    save_file({f"net.{name}": tensor for name, tensor in state.items()}, tmp_path / "a.safetensors", {"note": "mine"})
    bntool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", strip_prefix="net.")
    loaded = load_file(tmp_path / "b.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["note"] == "mine"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_every_tensor_stays_in_its_shard(suffix, tmp_path):
    names = list(network().state_dict())
    state = network().state_dict()
    shards = {f"one{suffix}": names[: len(names) // 2], f"two{suffix}": names[len(names) // 2 :]}
    (tmp_path / "in").mkdir()
    for shard, held in shards.items():
        part = {f"model.{name}": state[name] for name in held}
        torch.save(part, tmp_path / "in" / shard) if suffix == ".bin" else save_file(part, tmp_path / "in" / shard)
    weight_map = {f"model.{name}": shard for shard, held in shards.items() for name in held}
    (tmp_path / "in" / "m.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "out").mkdir()
    bntool.convert(tmp_path / "in" / "m.index.json", tmp_path / "out" / "m.index.json", strip_prefix="model.")
    index = json.loads((tmp_path / "out" / "m.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, held in shards.items() for name in held}
    for shard, held in shards.items():
        path = tmp_path / "out" / shard
        loaded = torch.load(path, weights_only=True) if suffix == ".bin" else load_file(path)
        assert set(loaded) == set(held)
        assert all(torch.equal(loaded[name], state[name]) for name in held)


def test_renaming_on_the_way_to_another_format(tmp_path):
    torch.save(nn.DataParallel(network()).state_dict(), tmp_path / "a.pt")
    argv = ["convert", str(tmp_path / "a.pt"), "--to", "safetensors", "--strip-prefix", "module."]
    argv += ["--rename", "head=fc", "-o", str(tmp_path / "b.safetensors"), "-q"]
    assert main(argv) == 0
    loaded = load_file(tmp_path / "b.safetensors")
    assert {name.split(".")[0] for name in loaded} == {"stem", "body", "fc"}
    bntool.convert(tmp_path / "b.safetensors", tmp_path / "c.pt", to="torch")
    assert torch.load(tmp_path / "c.pt", weights_only=True)._metadata["body.0.bn"] == {"version": 2}


def test_frozen_batchnorm_under_new_names(tmp_path):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    bntool.convert(tmp_path / "a.pt", tmp_path / "b.pt", to="frozen-batchnorm", eps=1e-5, add_prefix="net")
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    assert all(name.startswith("net.") for name in loaded)
    assert not [name for name in loaded if name.endswith("num_batches_tracked")]
    assert loaded._metadata["net.stem.bn"]["version"] == 1


def test_arrays_in_pickles_are_renamed(tmp_path):
    import pickle

    state = {"net.bn.weight": np.ones(3, "f4"), "net.bn.running_mean": np.arange(3, dtype="f4")}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
    with bntool.open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        steps = tuple(RenameTensor(name, name.removeprefix("net.")) for name in state)
        bntool.save_checkpoint(bntool.apply_plan(checkpoint, Plan(Operation.CONVERT, steps=steps)), tmp_path / "b.pkl")
    loaded = pickle.loads((tmp_path / "b.pkl").read_bytes())
    assert list(loaded) == ["bn.weight", "bn.running_mean"]
    np.testing.assert_array_equal(loaded["bn.running_mean"], [0, 1, 2])


def test_what_keeps_old_names_is_said(tmp_path):
    model = network()
    state, ema = model.state_dict(), network().state_dict()
    named = {"state": {"module.head.weight": {"step": 1}}, "param_groups": [{"params": ["module.head.weight"]}]}
    numbered = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    mixed = {("x." if name.startswith("head") else "module.") + name: tensor for name, tensor in state.items()}
    torch.save({"model": mixed, "ema": ema, "named": named, "optimizer": numbered}, tmp_path / "a.pt")
    losses = bntool.convert(tmp_path / "a.pt", strip_prefix="module.").losses
    assert losses == (
        "one naming for all tensors: x.head.weight, x.head.bias do not begin with module. and keep their names",
        "one naming for the whole file: ema keeps the old names",
        "the fit of named: it names parameters as they were called before",
    )
    alone = bntool.convert(tmp_path / "a.pt", strip_prefix="module.", to="safetensors").losses  # the rest is left out
    assert alone == (losses[0], "other state dicts: ema", "other entries: named, optimizer")
    with pytest.raises(RefusedError, match="--strict: this would be lost"):
        bntool.convert(tmp_path / "a.pt", strip_prefix="module.", strict=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strip_prefix": "modul"}, UsageError, "no tensor has it; did you mean 'module'"),
        ({"renames": {"module.hed": "x"}}, UsageError, "did you mean 'module.head'"),
        ({"renames": {"module.head.weight": "module.head.bias"}}, RefusedError, "would have the same name"),
        ({"renames": {"module.body.0": "module.stem"}}, RefusedError, "the same name"),
        ({}, UsageError, "nothing is to be done"),
    ],
)
def test_names_that_cannot_be(options, error, message, tmp_path):
    torch.save(nn.DataParallel(network()).state_dict(), tmp_path / "a.pt")
    with pytest.raises(error, match=message):
        bntool.convert(tmp_path / "a.pt", tmp_path / "b.pt", **options)
    assert not (tmp_path / "b.pt").exists()


def test_names_of_code_are_refused(tmp_path):
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(RefusedError, match="names of pickled modules are those of its code"):
        bntool.convert(tmp_path / "module.pt", tmp_path / "b.pt", add_prefix="net")


def test_a_live_model_is_renamed(tmp_path):
    model = network()
    state = model.state_dict()
    steps = tuple(RenameTensor(name, f"net.{name}") for name in state)
    apply_live(model, Plan(Operation.CONVERT, steps=steps))
    assert {f"net.{name}": None for name in state}.keys() == model.state_dict().keys()
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[f"net.{name}"], tensor)
    with pytest.raises(UsageError, match="no such tensor"):
        apply_live(model, Plan(Operation.CONVERT, steps=(RenameTensor("nope", "x"),)))


@pytest.mark.parametrize("fault", ["ties", "versions"])
def test_what_is_read_back_includes_ties_and_versions(fault, tmp_path, monkeypatch):
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)))
    model.b.weight = model.a.weight
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with bntool.open_checkpoint(tmp_path / "a.pt") as checkpoint:

        def write(_checkpoint, path, output):
            state = torch.load(tmp_path / "a.pt", weights_only=True)
            if fault == "ties":
                state["b.weight"] = state["b.weight"].clone()
            else:
                state._metadata["bn"]["version"] = 1
            torch.save(state, output.open(path))

        monkeypatch.setattr(type(checkpoint.format), "write", lambda self, *arguments: write(*arguments))
        message = {"ties": "share memory otherwise", "versions": "other versions of modules"}[fault]
        with pytest.raises(VerificationError, match=message):
            saving.save_checkpoint(checkpoint, tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("options", [{"to": "torch"}, {"to": "safetensors"}, {"add_prefix": "net"}])
def test_layers_are_not_ignored_where_they_select_nothing(options, tmp_path):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match="a whole state dict is converted"):
        bntool.convert(tmp_path / "a.pt", layers=["body.*"], **options)
