"""Folding a file without its model: the same bits as folding the live one, whatever dtype and layout tensors have."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bntool
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.state_dict import fold_state_dict
from tests.benchmarks.measuring import python, run_command
from tests.folding.folding_networks import LAYOUTS

PAIRS = {"0": "1", "2": "3", "5": "6"}  # producer: BatchNorm
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Rows that divide no block that is read (3 * 7 * 7, 37 * 9), producers larger than a block, no affine in one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 37, 7, bias=False),
        nn.BatchNorm2d(37),
        nn.Conv2d(37, 111, 3, bias=False),
        nn.BatchNorm2d(111),
        nn.Flatten(),
        nn.Linear(111 * 4 * 4, 24),
        nn.BatchNorm1d(24, affine=False),
    )
    for norm in (model[1], model[3], model[6]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return model.to(dtype).eval()


def fold_file(path: Path, output: Path, *, layout: Layout = Layout.FOLDED) -> None:
    with bntool.open_checkpoint(path) as checkpoint:
        pairs = {norm: producer for producer, norm in PAIRS.items()}
        options = FoldOptions(layout=layout, eps=1e-5)
        result = fold_state_dict(checkpoint, choose_state_dict(checkpoint), options, pairs=pairs, tolerance=1e-5)
        assert len(result.plan.folds) == 3
        assert result.checkpoint is not None
        bntool.save_checkpoint(result.checkpoint, output)


def fold_live(model: nn.Module, layout: Layout) -> dict[str, torch.Tensor]:
    """What folding the live model gives; verification would need a dtype that the CPU computes well in."""
    from bntool.folding.planning import plan_fold
    from bntool.graphs.traced.tracing import trace
    from bntool.modules.application import apply_plan, read_state

    graph = trace(copy.deepcopy(model).float(), torch.randn(2, 3, 12, 12))
    folded = copy.deepcopy(model)
    apply_plan(folded, plan_fold(read_state(model), graph, FoldOptions(layout=layout)))
    return folded.state_dict()


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(a, b), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_folds_to_the_bits_of_the_live_model(tmp_path: Path, dtype: torch.dtype, layout: Layout) -> None:
    model = network(dtype)
    wanted = fold_live(model, layout)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    for name, load in (("pt", torch.load), ("safetensors", load_file)):
        fold_file(tmp_path / f"a.{name}", tmp_path / f"b.{name}", layout=layout)
        assert_same_bits(load(tmp_path / f"b.{name}"), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_are_those_of_torch_in_float64_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    state = network(dtype).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    fold_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    folded = load_file(tmp_path / "b.safetensors")
    weight, bias, mean, variance = (state[f"3.{r}"].double() for r in ("weight", "bias", "running_mean", "running_var"))
    scale = weight / (variance + 1e-5).sqrt()
    exact = state["2.weight"].double() * scale.reshape(-1, 1, 1, 1)
    half_unit = torch.finfo(dtype).eps / 2 * (8 if dtype is torch.float64 else 1)  # torch's own vector maths rounds too
    bound = exact.abs() * half_unit + torch.finfo(dtype).smallest_normal * half_unit  # rounding once moves no further
    assert torch.all((folded["2.weight"].double() - exact).abs() <= bound * (1 + 2**-40))
    shift = bias - mean * scale
    assert torch.all((folded["2.bias"].double() - shift).abs() <= shift.abs() * half_unit * (1 + 2**-40))


def channels_last(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for k, t in state.items()}


def transposed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: t.t().contiguous().t() if t.dim() == 2 else t for k, t in state.items()}


def with_gaps(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every second element of a storage twice as large."""
    return {k: torch.stack([t, torch.full_like(t, 7)], dim=-1)[..., 0] if t.dim() else t for k, t in state.items()}


def in_one_storage(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As flattened parameters (FSDP, apex) are saved: all tensors are views of one."""
    flat = torch.cat([t.reshape(-1) for t in state.values() if t.is_floating_point()])
    views, position = {}, 0
    for name, tensor in state.items():
        if tensor.is_floating_point():
            views[name] = flat[position : position + tensor.numel()].view(tensor.shape)
            position += tensor.numel()
        else:
            views[name] = tensor
    return views


def backwards(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, stored in the reverse order of the names."""
    return dict(reversed(in_one_storage(dict(reversed(state.items()))).items()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("store", [channels_last, transposed, with_gaps, in_one_storage, backwards])
def test_how_tensors_lie_in_storages_does_not_matter(
    tmp_path: Path, store: Callable[..., dict[str, torch.Tensor]], legacy: bool, layout: Layout
) -> None:
    model = network()
    state = store(model.state_dict())
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    fold_file(tmp_path / "a.pt", tmp_path / "b.pt", layout=layout)
    assert_same_bits(torch.load(tmp_path / "b.pt"), fold_live(model, layout))
    assert_same_bits(torch.load(tmp_path / "a.pt"), model.state_dict())


def test_a_weight_that_something_else_shares_does_not_change_for_it(tmp_path: Path) -> None:
    model = network()
    state = model.state_dict()
    state["copy_of_a_row"] = state["2.weight"][5]
    torch.save(state, tmp_path / "a.pt")
    fold_file(tmp_path / "a.pt", tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt")
    assert torch.equal(found.pop("copy_of_a_row"), model[2].weight[5])
    assert_same_bits(found, fold_live(model, Layout.FOLDED))


def write_large_safetensors(path: Path, *, layers: int) -> None:
    """Convolutions of 9 MiB, zeros that take no place on the disk, each with its BatchNorm."""
    shapes = {"weight": [512, 512, 3, 3]}
    norm = {"weight": [512], "bias": [512], "running_mean": [512], "running_var": [512]}
    header, position = {}, 0
    for layer in range(layers):
        for part, roles in (("conv", shapes), ("bn", norm)):
            for role, shape in roles.items():
                size = 4 * torch.Size(shape).numel()
                header[f"{part}{layer}.{role}"] = {
                    "dtype": "F32",
                    "shape": shape,
                    "data_offsets": [position, position + size],
                }
                position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)


def test_a_file_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_large_safetensors(path, layers=12)
    assert path.stat().st_size > 100 << 20
    pairs = [argument for layer in range(12) for argument in ("--pair", f"conv{layer}=bn{layer}")]
    command = python("-m", "bntool", "fold", str(path), *pairs, "--eps", "1e-5", "-o", str(tmp_path / "b.safetensors"))
    _, megabytes, _ = run_command(command)
    assert megabytes < 60  # torch alone takes more
