"""What flags of modules do, held against PyTorch itself, and what is found in them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.graphs.architectures.catalogue import load_catalogue
from bntool.inspection.findings import FindingCode, Severity
from bntool.inspection.module_findings import describe_behaviour
from bntool.inspection.results import StateDictInspection
from tests.benchmarks.inspection import resnet50_state


def inspected(model: nn.Module, path: Path, *, live: bool = False) -> StateDictInspection:
    torch.save(model, path / "m.pt")
    return bntool.inspect(model if live else path / "m.pt").state_dicts[0]


def codes(inspection: StateDictInspection) -> dict[str, dict[FindingCode, Severity]]:
    return {layer.name: {f.code: f.severity for f in layer.findings} for layer in inspection.layers if layer.findings}


def trained(*, updates: int = 120) -> nn.Sequential:
    """Three layers that trained for some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(updates):
        optimizer.zero_grad()
        (model(torch.randn(8, 3, 5, 5) + 1) - 1).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("live", [False, True])
def test_a_model_as_it_should_be_has_none(live: bool, tmp_path: Path) -> None:
    assert codes(inspected(trained(), tmp_path, live=live)) == {}
    assert codes(inspected(trained().eval(), tmp_path, live=live)) == {}


@pytest.mark.parametrize("live", [False, True])
def test_a_layer_without_tensors_is_listed_in_its_place(live: bool, tmp_path: Path) -> None:
    model = nn.Sequential(*trained(), nn.BatchNorm2d(4, affine=False, track_running_stats=False))
    model.insert(1, nn.BatchNorm2d(4, affine=False, track_running_stats=False))
    state_dict = inspected(model, tmp_path, live=live)
    assert [layer.name for layer in state_dict.layers] == ["1", "2", "5", "6", "7"]
    assert codes(state_dict) == {name: {FindingCode.BATCH_STATISTICS: Severity.NOTICE} for name in ("1", "7")}
    layer = state_dict["1"].layer
    assert (layer.num_features, layer.affine, layer.track_running_stats, layer.training) == (4, False, False, True)
    assert bntool.find_batchnorms(state_dict.state_dict)[0].name == "2"  # what can be folded is another question


def outputs_depend_on_the_batch(bn: nn.BatchNorm1d) -> bool:
    x = torch.randn(8, 4)
    return not torch.allclose(bn(x)[:4], bn(x[:4]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("tracks", ["always", "never", "switched off"])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_what_is_said_of_flags_is_what_torch_does(
    training: bool, affine: bool, tracks: str, momentum: float | None, tmp_path: Path
) -> None:
    bn = nn.BatchNorm1d(4, affine=affine, track_running_stats=tracks != "never", momentum=momentum)
    bn.track_running_stats = tracks == "always"
    bn.train(training)
    norm = inspected(bn, tmp_path).layers[0].layer
    said = " ".join(describe_behaviour(norm))
    bn.eval()
    assert ("normalises by those of the batch, in eval mode, too" in said) is outputs_depend_on_the_batch(bn)
    bn.train()
    before = copy.deepcopy(bn.state_dict())
    x = torch.randn(16, 4) * 3 + 2
    bn(x)
    if tracks == "switched off":
        assert "does not update the running ones" in said
        assert torch.equal(before["running_mean"], bn.running_mean)
    assert ("it only normalises" in said) is (not affine)
    if tracks == "always":
        moved = not torch.equal(before["running_mean"], bn.running_mean)
        assert ("never move" in said) is (not moved)
        is_of_last_batch = torch.allclose(bn.running_mean, x.mean(0))
        assert ("those of the last batch" in said or "plain average over all batches" in said) is is_of_last_batch


@pytest.mark.parametrize(
    ("momentum", "severity"), [(0.1, None), (0.5, None), (0.6, "warning"), (0.99, "warning"), (0.0, "notice")]
)
def test_a_momentum_that_is_another_frameworks(momentum: float, severity: str | None, tmp_path: Path) -> None:
    model = trained()
    model[1].momentum = momentum
    expected = {} if severity is None else {"1": {FindingCode.MOMENTUM: Severity(severity)}}
    assert codes(inspected(model, tmp_path)) == expected


def test_a_layer_left_in_train_mode(tmp_path: Path) -> None:
    model = trained().eval()
    model[4].train()
    state_dict = inspected(model, tmp_path)
    assert codes(state_dict) == {"4": {FindingCode.LEFT_IN_TRAIN_MODE: Severity.WARNING}}


def test_a_layer_left_in_eval_mode(tmp_path: Path) -> None:
    model = trained()
    model[4].eval()
    assert codes(inspected(model, tmp_path)) == {"4": {FindingCode.LEFT_IN_EVAL_MODE: Severity.NOTICE}}
    for module in model:
        module.train(not isinstance(module, nn.BatchNorm2d))
    assert codes(inspected(model, tmp_path)) == {}  # all of them: norm_eval


@pytest.mark.parametrize("live", [False, True])
def test_layers_that_need_no_gradient_while_others_do(live: bool, tmp_path: Path) -> None:
    model = trained()
    model[1].requires_grad_(False)
    assert codes(inspected(model, tmp_path, live=live)) == {"1": {FindingCode.NO_GRADIENT: Severity.NOTICE}}
    model.requires_grad_(False)
    assert codes(inspected(model, tmp_path, live=live)) == {}


def test_frozen_weights_do_not_keep_statistics(tmp_path: Path) -> None:
    model = trained()
    model[1].requires_grad_(False)
    (finding,) = inspected(model, tmp_path)["1"].findings
    before = model[1].running_mean.clone()
    model(torch.randn(8, 3, 6, 6) + 1)
    assert not model[1].running_mean.equal(before)
    assert "statistics move all the same" in finding.message
    model[1].eval()
    of_mode, of_gradient = inspected(model, tmp_path)["1"].findings
    assert of_mode.code is FindingCode.LEFT_IN_EVAL_MODE
    assert "move all the same" not in of_gradient.message


@pytest.mark.parametrize(("eps", "severity"), [(1e-3, "notice"), (0.0, "warning"), (1e-5, None)])
def test_an_eps_that_no_other_layer_has(eps: float, severity: str | None, tmp_path: Path) -> None:
    model = nn.Sequential(*(layer for _ in range(2) for layer in trained()))
    model[4].eps = eps
    found = codes(inspected(model.eval(), tmp_path))
    assert found == ({} if severity is None else {"4": {FindingCode.EPS: Severity(severity)}})
    model[-2].eps = model[4].eps = 1e-3  # two parts of a model, made differently
    assert codes(inspected(model, tmp_path)) == {}


@pytest.mark.parametrize(
    ("role", "factor", "code"),
    [("running_var", 1e7, FindingCode.OUTLYING_VARIANCE), ("running_mean", 1e5, FindingCode.OUTLYING_MEAN)],
)
def test_a_whole_layer_far_from_all_others(role: str, factor: float, code: FindingCode, tmp_path: Path) -> None:
    model = nn.Sequential(*(layer for _ in range(2) for layer in trained()))
    getattr(model[4], role).mul_(factor)
    assert codes(inspected(model, tmp_path)) == {"4": {code: Severity.WARNING}}
    getattr(model[4], role).div_(factor)
    for layer in (model[1], model[7]):  # what the model is given may be of any size, also at a second place
        getattr(layer, role).mul_(factor)
        assert codes(inspected(model, tmp_path)) == {}
        getattr(layer, role).div_(factor)


def test_a_counter_that_another_layer_contradicts(tmp_path: Path) -> None:
    model = trained()
    for layer in (module for module in model if isinstance(module, nn.BatchNorm2d)):
        layer.num_batches_tracked.fill_(5)
        layer.running_var.fill_(3.0)
    assert set(codes(inspected(model, tmp_path))["4"]) == {FindingCode.COUNTER_LOW}
    model[1].running_var[0] = 0.01  # 5 updates leave 0.59 of 1
    assert codes(inspected(model, tmp_path)) == {name: {FindingCode.COUNTER_RESET: Severity.NOTICE} for name in "145"}


def test_layers_that_never_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[1].requires_grad_(False)  # and is forgotten in the state dict
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for step in range(101):
        torch.save(model.state_dict(), tmp_path / f"{step}.pt")
        optimizer.zero_grad()
        (model(torch.randn(8, 3, 5, 5) + 1) - 1).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), tmp_path / "last.pt")
    assert codes(bntool.inspect(tmp_path / "99.pt").state_dicts[0]) == {}
    last = codes(bntool.inspect(tmp_path / "last.pt").state_dicts[0])
    assert last == {"1": {FindingCode.AFFINE_INITIAL: Severity.WARNING}}


def test_columns_of_a_table_have_scales_of_their_own(tmp_path: Path) -> None:
    """fastai's tabular models normalise raw columns by a BatchNorm."""
    torch.manual_seed(0)
    raw = torch.randn(64, 6) * torch.tensor([1.0, 2.0, 1.0, 0.5, 1e6, 3.0])
    raw -= raw.mean(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    for _ in range(40):
        model(raw)
    assert codes(inspected(model, tmp_path)) == {"0": {FindingCode.OUTLYING_VARIANCE: Severity.WARNING}}
    model[2].load_state_dict(model[0].state_dict())
    assert codes(inspected(model, tmp_path))["2"] == {FindingCode.OUTLYING_VARIANCE: Severity.ERROR}


def build_resnet50(**options: float) -> nn.Module:
    """Modules of the names and shapes of torchvision's resnet50; kernels are one number, repeated."""
    root, state = nn.Module(), resnet50_state()
    for key in [key for key in state if key.endswith(".weight")]:
        *path, leaf = key.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        module: nn.Module = nn.Module()
        if f"{key.removesuffix('weight')}running_var" in state:
            module = nn.BatchNorm2d(len(state[key]), **options)
            module.load_state_dict({k: state[key.removesuffix("weight") + k] for k in module.state_dict()})
        else:
            module.weight = nn.Parameter(torch.zeros(1).expand(state[key].shape))
            if leaf == "fc":
                module.bias = nn.Parameter(torch.zeros(1000))
        parent.add_module(leaf, module)
    return root.train()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        ({"eps": 1e-3}, {(FindingCode.EPS, Severity.WARNING)}),
        ({"momentum": 0.01}, {(FindingCode.MOMENTUM, Severity.NOTICE)}),
        ({"momentum": 0.9}, {(FindingCode.MOMENTUM, Severity.WARNING)}),  # which needs no architecture
    ],
)
def test_eps_and_momentum_are_held_against_the_architecture(
    options: dict[str, float], expected: set[tuple[FindingCode, Severity]], tmp_path: Path
) -> None:
    state_dict = inspected(build_resnet50(**options), tmp_path)
    assert "torchvision:resnet50" in state_dict.architectures[0].names
    assert state_dict.architectures[0].whole
    found = {(f.code, f.severity) for layer in state_dict.layers for f in layer.findings}
    assert {one for one in found if one[0] in (FindingCode.EPS, FindingCode.MOMENTUM)} == expected
    if options.get("momentum") == 0.01:
        (message,) = {f.message for f in state_dict.layers[0].findings if f.code is FindingCode.MOMENTUM}
        assert message.endswith("names and shapes the tensors have it is 0.1")


def test_the_catalogue_knows_momentum_that_is_not_usual() -> None:
    catalogue = load_catalogue()  # torchvision 0.28: models/mnasnet.py, models/mobilenetv3.py
    assert catalogue.momentum("torchvision:mnasnet1_0") == ((52, pytest.approx(3e-4)),)
    assert catalogue.momentum("torchvision:mobilenet_v3_small") == ((34, 0.01),)
    assert catalogue.momentum("torchvision:resnet50") is None
