"""Planning a freeze of a file: the oracles are torch.load, torch in float64, and mmdet's recorded names."""

import json
import sys

import pytest
import torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.cli.main import main
from bntool.errors import RefusedError, UsageError
from bntool.freezing.checkpoint import Carrier, plan_freeze
from bntool.freezing.live import apply_freeze, unfreeze
from bntool.freezing.options import FreezeForm
from bntool.freezing.stages import find_frozen_stages, is_within
from bntool.plan import Record, SkipReason
from tests.fixtures.models.mmdet_resnet import detector, resnet50
from tests.places import FIXTURES, SAMPLES


@pytest.fixture
def digits_net(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    import digits_net

    yield digits_net
    sys.modules.pop("digits_net", None)


def freeze_file(source, target, **options):
    with open_checkpoint(source) as checkpoint:
        freeze = plan_freeze(checkpoint, **options)
        save_checkpoint(apply_plan(checkpoint, freeze.plan), target, force=True)
    return freeze


@pytest.mark.parametrize("name", ["digits.pt", "digits.safetensors", "digits_training.pt", "digits_legacy.pth"])
def test_every_tensor_stays_and_the_policy_applies(name, tmp_path, digits_net):
    target = tmp_path / name
    freeze_file(SAMPLES / name, target, requires_grad=False, layers=["layer1.*", "neck_bn"], frozen_stages=0)
    with open_checkpoint(SAMPLES / name) as before, open_checkpoint(target) as after:
        for old, new in zip(before.state_dicts, after.state_dicts, strict=True):
            assert list(old.tensors) == list(new.tensors)
            assert all(b"".join(old.tensors[k].chunks()) == b"".join(new.tensors[k].chunks()) for k in old.tensors)
    model = digits_net.build()
    policy = apply_freeze(model, target)
    assert policy.layers == ("layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2", "neck_bn")
    model.train()
    held = {name for name, module in model.named_modules() if not module.training}
    assert held == {"bn1", *policy.layers}
    without = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"conv1.weight", "bn1.weight", "neck_bn.bias"} <= without
    assert "layer2.0.bn1.weight" not in without
    unfreeze(model)


def test_policy_names_are_those_without_prefix(tmp_path, digits_net):
    target = tmp_path / "out.pt"
    freeze_file(SAMPLES / "digits_training.pt", target)
    wrapped = torch.nn.DataParallel(digits_net.build())
    policy = apply_freeze(wrapped, target)
    assert "bn1" in policy.layers
    wrapped.train()
    assert not wrapped.module.bn1.training


def test_whole_module_flags_are_set_in_the_file(tmp_path, digits_net):
    target = tmp_path / "module.pt"
    freeze_file(SAMPLES / "digits_module.pt", target, requires_grad=False, layers=["layer1.*"], frozen_stages=0)
    assert "digits_net" not in sys.modules or digits_net  # planned and written without it, see the next test
    model = torch.load(target, weights_only=False)
    without = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = {n for n, _ in model.named_parameters() if n.startswith("layer1.") and ".bn" in n}
    assert without == expected | {"conv1.weight", "bn1.weight", "bn1.bias"}
    held = {name for name, module in model.named_modules() if not module.training}
    assert held == {"bn1", "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2"}
    reference = torch.load(SAMPLES / "digits_module.pt", weights_only=False).state_dict()
    assert all(torch.equal(value, reference[key]) for key, value in model.state_dict().items())


def test_classes_that_are_not_installed_do_not_matter(tmp_path):
    assert "digits_net" not in sys.modules
    freeze = freeze_file(SAMPLES / "digits_module.pt", tmp_path / "module.pt", requires_grad=False)
    assert freeze.carrier is Carrier.MODULES
    assert "digits_net" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "module.pt", weights_only=False)


@pytest.mark.parametrize("name", ["digits.pt", "digits_module.pt", "dead_channels.pt"])
def test_constant_computes_the_same_in_eval_mode(name, tmp_path, digits_net):
    target = tmp_path / name
    freeze_file(SAMPLES / name, target, form=FreezeForm.CONSTANT, eps=1e-5)
    models = []
    for path in (SAMPLES / name, target):
        content = torch.load(path, weights_only=False)
        if not isinstance(content, torch.nn.Module):
            model = digits_net.build()
            model.load_state_dict(content, strict=True)
            content = model
        models.append(content.double().eval())
    assert models[1].neck_bn.running_mean.abs().max() == 0
    torch.testing.assert_close(models[1].neck_bn.running_var.float(), torch.full((32,), 1 - 1e-5), rtol=0, atol=0)
    x = torch.randn(64, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference, outcome = models[0](x).detach(), models[1](x).detach()
    # weight, bias and variance are rounded to float32 once each
    torch.testing.assert_close(outcome, reference, rtol=0, atol=2e-6 * float(reference.abs().max()))


def test_constant_needs_eps_and_believes_the_file(tmp_path):
    with open_checkpoint(SAMPLES / "digits.pt") as checkpoint, pytest.raises(RefusedError, match="--eps"):
        plan_freeze(checkpoint, form=FreezeForm.CONSTANT)
    with open_checkpoint(SAMPLES / "digits_module.pt") as checkpoint:
        plan_freeze(checkpoint, form=FreezeForm.CONSTANT)
        with pytest.raises(UsageError, match="contradicts"):
            plan_freeze(checkpoint, form=FreezeForm.CONSTANT, eps=1e-3)


def test_constant_leaves_broken_layers_alone():
    with open_checkpoint(SAMPLES / "broken_nan_variance.pt") as checkpoint:
        freeze = plan_freeze(checkpoint, form=FreezeForm.CONSTANT, eps=1e-5)
    assert [(skip.layer, skip.reason) for skip in freeze.plan.skips] == [("layer2.0.bn1", SkipReason.NOT_FINITE)]
    assert "layer2.0.bn1" not in freeze.plan.layers


def test_constant_leaves_layers_without_weight_and_underflow_alone(tmp_path):
    plain = torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False), torch.nn.BatchNorm1d(3).half())
    plain[1].weight.data.fill_(1e-4)
    plain[1].running_var.fill_(6e4)
    torch.save(plain.state_dict(), tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        freeze = plan_freeze(checkpoint, form=FreezeForm.CONSTANT, eps=1e-5)
    assert [(skip.layer, skip.reason) for skip in freeze.plan.skips] == [
        ("0", SkipReason.NOT_AFFINE),
        ("1", SkipReason.OVERFLOW),
    ]


def test_frozen_batchnorm_has_nothing_to_freeze(tmp_path):
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).state_dict()
    del state["0.num_batches_tracked"]
    state._metadata["0"]["version"] = 1
    torch.save(state, tmp_path / "frozen.pt")
    with open_checkpoint(tmp_path / "frozen.pt") as checkpoint:
        freeze = plan_freeze(checkpoint)
    assert not freeze.plan.steps
    assert freeze.plan.skips[0].reason is SkipReason.FROZEN


def test_nothing_to_freeze_is_an_error():
    with open_checkpoint(SAMPLES / "digits.pt") as checkpoint:
        with pytest.raises(UsageError, match="nothing is frozen"):
            plan_freeze(checkpoint, norm_eval=False)
        with pytest.raises(UsageError, match="selects none of the 9 BatchNorm layers; there are: bn1, "):
            plan_freeze(checkpoint, layers=["nothing"])
        with pytest.raises(UsageError, match="has no layer3"):
            plan_freeze(checkpoint, frozen_stages=9)


def test_files_without_a_place_for_a_record(tmp_path):
    state = {key: value.clone() for key, value in detector().state_dict().items()}  # no _metadata
    path = tmp_path / "plain.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(RefusedError, match="no place"):
            plan_freeze(checkpoint)
        constant = plan_freeze(checkpoint, form=FreezeForm.CONSTANT, eps=1e-5)
        assert not list(constant.plan.steps_of(Record))
        save_checkpoint(apply_plan(checkpoint, constant.plan), tmp_path / "out.pth")


def test_apply_freeze_names_what_does_not_fit(tmp_path):
    torch.save(detector().state_dict(), tmp_path / "detector.pt")
    with pytest.raises(UsageError, match="no freeze policy"):
        apply_freeze(detector(), tmp_path / "detector.pt")
    freeze_file(tmp_path / "detector.pt", tmp_path / "out.pt")
    with pytest.raises(UsageError, match=r"backbone\.bn1"):
        apply_freeze(resnet50(2), tmp_path / "out.pt")
    model = detector()
    apply_freeze(model, tmp_path / "out.pt")
    assert not model.train().neck[1].training


def test_optimizer_entries_of_frozen_parameters():
    with open_checkpoint(SAMPLES / "digits_training.pt") as checkpoint:
        (entries,) = plan_freeze(checkpoint, requires_grad=False).optimizers
    content = torch.load(SAMPLES / "digits_training.pt", weights_only=False)
    names = [n for n in content["state_dict"] if not n.endswith(("_mean", "_var", "tracked"))]
    frozen = {n.removeprefix("module.") for n in names if "bn" in n or "downsample.1" in n}
    assert entries.frozen == {n.removeprefix("module."): i for i, n in enumerate(names) if n[7:] in frozen}
    assert entries.count == len(names)


def test_optimizer_with_several_groups_is_not_guessed(tmp_path):
    model = detector()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD([{"params": weights}, {"params": others}], lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        (entries,) = plan_freeze(checkpoint, requires_grad=False).optimizers
    assert entries.frozen is None
    assert "several parameter groups" in entries.reason


MMDET = json.loads((FIXTURES / "mmdet_freezing.json").read_text())["cases"]


@pytest.mark.parametrize("case", [c for c in MMDET if c["keys"]], ids=lambda case: case["title"])
def test_stages_of_every_family_agree_with_mmdet(case):
    keys = case["keys"]
    stages = find_frozen_stages([key.rpartition(".")[0] for key in keys], case["frozen_stages"])
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = [key for key in keys if key.rpartition(".")[2] not in buffers]
    assert [key for key in parameters if is_within(key, stages.without_gradient)] == case["frozen"]
    owners = {key.rpartition(".")[0] for key in keys}
    held = {name for name in owners if is_within(name, stages.in_eval)}
    assert held == owners & set(case["eval_modules"])


def test_the_recorded_resnet50_agrees_with_the_first_record():
    first = json.loads((FIXTURES / "mmdet_resnet50_frozen1_normeval.json").read_text())
    again = next(case for case in MMDET if case["title"] == "norm_eval, stage 1")
    assert first["frozen"] == again["frozen"]
    assert first["eval_modules"] == again["eval_modules"]


def test_stages_are_found_below_a_prefix_and_not_guessed():
    names = [name for name, _ in detector().named_modules()]
    stages = find_frozen_stages(names, 1)
    assert stages.root == "backbone"
    assert stages.in_eval == ("backbone.bn1", "backbone.layer1")
    with pytest.raises(UsageError, match="several backbones"):
        find_frozen_stages([f"{side}.{name}" for side in ("left", "right") for name in names], 1)
    with pytest.raises(UsageError, match="stages are known"):
        find_frozen_stages(["features.0", "features.1"], 1)


@pytest.mark.parametrize(("names", "conditional"), [(("1", "4"), True), (("backbone.1", "backbone.4"), False)])
def test_code_for_mmdet_says_what_it_takes_the_file_for(names, conditional, tmp_path):
    import bntool

    state = {f"{name}.{key}": t for name in names for key, t in torch.nn.BatchNorm2d(3).state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    code = bntool.freeze_checkpoint(tmp_path / "m.pt", emit="mmdet").code
    assert ("# if what the file holds is the backbone" in code) is conditional
    scope = {}
    exec(code, scope)
    assert scope["model"] == {"backbone": {"norm_eval": True}}


class InPlaceABN(torch.nn.BatchNorm2d):
    """As inplace_abn's: y = leaky_relu((|weight| + eps) (x - mean) / sqrt(var + eps) + bias)."""


def test_inplace_abn_takes_the_magnitude_of_its_weight(tmp_path):
    """A shift computed from a negative weight would be another one; the class is recorded with the tensors."""
    layer = InPlaceABN(2)
    torch.nn.init.constant_(layer.weight, -1)
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), layer), tmp_path / "module.pt")
    assert main(["convert", str(tmp_path / "module.pt"), "--to", "torch", "-o", str(tmp_path / "tensors.pt")]) == 0
    for name in ("module.pt", "tensors.pt"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            plan = plan_freeze(checkpoint, form=FreezeForm.CONSTANT).plan
        assert [skip.reason for skip in plan.skips] == [SkipReason.NOT_RECOGNISED]
    out = ["-o", str(tmp_path / "out.pt")]
    assert main(["convert", str(tmp_path / "tensors.pt"), "--to", "frozen-batchnorm", *out]) == 4
    assert main(["fold", str(tmp_path / "tensors.pt"), "--pair", "0=1", *out]) == 4
    assert not (tmp_path / "out.pt").exists()


def test_the_recorded_eps_is_the_one_of_constants(tmp_path):
    layer = torch.nn.BatchNorm2d(2, eps=0.01)
    torch.save(layer, tmp_path / "module.pt")
    assert main(["convert", str(tmp_path / "module.pt"), "--to", "torch", "-o", str(tmp_path / "tensors.pt")]) == 0
    with open_checkpoint(tmp_path / "tensors.pt") as checkpoint, pytest.raises(UsageError, match="contradicts"):
        plan_freeze(checkpoint, form=FreezeForm.CONSTANT, eps=1e-5)
    freeze_file(tmp_path / "tensors.pt", tmp_path / "constant.pt", form=FreezeForm.CONSTANT)
    data = torch.rand(1, 2, 3, 3)
    expected = layer.eval()(data)
    layer.load_state_dict(torch.load(tmp_path / "constant.pt", weights_only=True))
    torch.testing.assert_close(layer(data), expected)


@pytest.mark.parametrize(("whole", "skipped"), [(False, {"0", "1"}), (True, set())])
def test_a_weight_of_two_layers_cannot_become_two(tmp_path, whole, skipped):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2))
    model[0].running_var.fill_(4)
    model[1].weight = model[0].weight
    if whole:  # the same module twice, which gets the same elements
        model[1] = model[0]
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    freeze = freeze_file(tmp_path / "tied.pt", tmp_path / "out.pt", form=FreezeForm.CONSTANT, eps=1e-5)
    assert {skip.layer for skip in freeze.plan.skips} == skipped
    data = torch.rand(1, 2, 3, 3)
    expected = model.eval()(data)
    model.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    torch.testing.assert_close(model(data), expected)
