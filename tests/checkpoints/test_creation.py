"""New files: the oracles are torch.load and the safetensors library."""

import copy

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import nn

from bntool.checkpoints.creation import NewFile, NewFormat, create_file, find_unwritable
from bntool.checkpoints.formats import open_checkpoint
from bntool.errors import RefusedError, UnwritableFileError, UsageError
from tests.checkpoints.samples import can_save

NAMES = "float64 float32 float16 bfloat16 float8_e4m3fn int64 int8 uint8 uint16 bool complex64"
DTYPES = [dtype for dtype in (getattr(torch, name) for name in NAMES.split()) if can_save(dtype)]


@pytest.fixture
def state():
    torch.manual_seed(0)
    tensors = {f"layer.{i}": (torch.randn(3, 5) * 4).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors["scalar"] = torch.tensor(7)
    tensors["empty"] = torch.zeros(0, 3)
    return tensors


def create(source, kind, target, **facts):
    with open_checkpoint(source) as checkpoint:
        (state_dict,) = checkpoint.state_dicts
        new = NewFile(tensors=state_dict.tensors, **facts)
        create_file(new, kind, target, source=checkpoint)


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def test_torch_reads_what_was_created(state, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    create(tmp_path / "a.pt", NewFormat.TORCH, tmp_path / "b.pt")
    for options in ({}, {"mmap": True}, {"weights_only": False}):
        loaded = torch.load(tmp_path / "b.pt", **options)
        assert list(loaded) == list(state)
        assert all(same(loaded[name].clone(), state[name]) for name in state if state[name].numel())


def test_safetensors_reads_what_was_created(state, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    create(tmp_path / "a.pt", NewFormat.SAFETENSORS, tmp_path / "b.safetensors", metadata={"note": "größe"})
    loaded = load_file(tmp_path / "b.safetensors")
    assert loaded.keys() == state.keys()
    assert all(same(loaded[name], state[name]) for name in state if state[name].numel())
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "größe"}
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert list(checkpoint.state_dicts[0].tensors) == list(state)  # in the order of the source


def test_versions_and_records(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        versions = checkpoint.state_dicts[0].versions
    create(tmp_path / "a.pt", NewFormat.TORCH, tmp_path / "b.pt", versions=versions, history=[{"x": 1}])
    loaded = torch.load(tmp_path / "b.pt")
    expected = copy.deepcopy(model.state_dict()._metadata)
    assert {name: entry["version"] for name, entry in loaded._metadata.items()} == {
        name: entry["version"] for name, entry in expected.items()
    }
    model.load_state_dict(loaded, strict=True)
    create(tmp_path / "a.pt", NewFormat.TORCH, tmp_path / "c.pt", history=[{"x": 1}])
    assert not hasattr(torch.load(tmp_path / "c.pt"), "_metadata")
    for name in ("b.pt", "c.pt"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.records == {"": ({"x": 1},)}


def test_tied_tensors_stay_tied_and_small_views_stay_small(tmp_path):
    base = torch.arange(1000.0)
    state = {
        "a.weight": base[:10].view(2, 5),
        "b.weight": base[10:20].view(2, 5).t(),
        "c.weight": torch.arange(9999.0)[:3],
    }
    state["d.weight"] = state["a.weight"]
    torch.save(state, tmp_path / "a.pt")
    create(tmp_path / "a.pt", NewFormat.TORCH, tmp_path / "b.pt")
    loaded = torch.load(tmp_path / "b.pt")
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert loaded["a.weight"].data_ptr() == loaded["d.weight"].data_ptr()
    assert loaded["b.weight"].stride() == (1, 5)
    assert loaded["b.weight"].untyped_storage().data_ptr() == loaded["a.weight"].untyped_storage().data_ptr()
    assert (tmp_path / "b.pt").stat().st_size < 10_000


def test_refuses_what_the_format_cannot_hold(tmp_path):
    torch.save({"a.weight": torch.zeros(2, dtype=torch.complex128), "b.weight": torch.zeros(2)}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert list(find_unwritable(checkpoint.state_dicts[0].tensors, NewFormat.SAFETENSORS)) == ["a.weight"]
    with pytest.raises(RefusedError, match="complex128"):
        create(tmp_path / "a.pt", NewFormat.SAFETENSORS, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_never_writes_over_anything_unasked(tmp_path):
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_text("precious")
    with pytest.raises(UnwritableFileError):
        create(tmp_path / "a.pt", NewFormat.TORCH, tmp_path / "b.pt")
    with pytest.raises(UsageError):
        create(tmp_path / "a.pt", NewFormat.TORCH, tmp_path / "a.pt")
    assert (tmp_path / "b.pt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]
