"""Conversions: the oracles are torch, the safetensors library, and torch in float64 eval mode."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bntool
from bntool.batchnorm import NormKind
from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.creation import create_file
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.comparison.checkpoint import diff
from bntool.conversion.checkpoint import plan_conversion
from bntool.conversion.options import ConversionTarget, FrozenKind
from bntool.errors import RefusedError, UsageError
from bntool.plan import SkipReason
from tests.fixtures.models.mmdet_resnet import detector
from tests.places import FIXTURES, SAMPLES

TARGETS = {target.value: target for target in ConversionTarget}


def convert(source, to, target, **options):
    with open_checkpoint(source) as checkpoint:
        conversion = plan_conversion(checkpoint, TARGETS[to], **options)
        if conversion.new is not None:
            create_file(conversion.new, conversion.new_format, target, source=checkpoint)
        else:
            save_checkpoint(apply_plan(checkpoint, conversion.plan), target)
    return conversion


def identical(a, b):
    with open_checkpoint(a) as one, open_checkpoint(b) as two:
        return diff(one, two).identical


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    model = detector()
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32) + 1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("name", ["torch_2.1.2.pt2", "torch_2.7.1.pt2"])
def test_what_the_graph_of_a_program_says_is_recorded(name, tmp_path):
    source, target = FIXTURES / "exported" / name, tmp_path / "model.pt"
    conversion = convert(source, "torch", target)
    assert [loss.partition(":")[0] for loss in conversion.losses] == ["the program"]
    assert identical(source, target)
    with open_checkpoint(target) as checkpoint:
        (record,) = checkpoint.records[""]
    (facts,) = record["modules"].values()
    assert (facts["eps"], facts["momentum"]) == (1e-3, 0.03)


@pytest.mark.parametrize("name", ["digits.pt", "digits_legacy.pth", "digits_module.pt", "digits_training.pt"])
def test_to_safetensors_and_back(name, tmp_path):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.pt"
    convert(SAMPLES / name, "safetensors", there)
    convert(there, "torch", back)
    assert identical(SAMPLES / name, there)
    assert identical(SAMPLES / name, back)
    loaded = torch.load(back)
    assert list(loaded) == list(load_file(there)) or set(loaded) == set(load_file(there))
    if name == "digits.pt":
        original = torch.load(SAMPLES / name)
        assert list(loaded) == list(original)
        versions = {module: entry["version"] for module, entry in original._metadata.items()}
        assert {module: entry["version"] for module, entry in loaded._metadata.items()} == versions


def test_header_texts_survive_the_way_over_torch(tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt", "author": "me"})
    convert(tmp_path / "a.safetensors", "torch", tmp_path / "b.pt")
    convert(tmp_path / "b.pt", "safetensors", tmp_path / "c.safetensors")
    with open_checkpoint(tmp_path / "c.safetensors") as checkpoint:
        assert checkpoint.entries["author"] == "me"


def test_losses_are_listed(tmp_path):
    with open_checkpoint(SAMPLES / "digits_training.pt") as checkpoint:
        losses = plan_conversion(checkpoint, ConversionTarget.SAFETENSORS).losses
    assert any("ema_state_dict" in loss for loss in losses)
    assert any("optimizer" in loss for loss in losses)
    with open_checkpoint(SAMPLES / "digits.pt") as checkpoint:
        assert plan_conversion(checkpoint, ConversionTarget.SAFETENSORS).losses == ()
    weight = torch.randn(4, 6)
    torch.save({"a.weight": weight, "b.weight": weight, "c.weight": torch.randn(3, 2).t()}, tmp_path / "tied.pt")
    with open_checkpoint(tmp_path / "tied.pt") as checkpoint:
        losses = plan_conversion(checkpoint, ConversionTarget.SAFETENSORS).losses
        assert plan_conversion(checkpoint, ConversionTarget.TORCH).losses == ()
    assert any("b.weight = a.weight" in loss for loss in losses)
    assert any("c.weight" in loss and "strides" in loss for loss in losses)


class FrozenBatchNorm2d(nn.Module):
    """The four buffers that those of torchvision, timm and detectron2 have; computed by torch's own eval mode."""

    def __init__(self, channels, eps):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def frozen_detector(eps):
    model = detector()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, FrozenBatchNorm2d(child.num_features, eps))
    return model


@pytest.mark.parametrize("kind", list(FrozenKind))
@pytest.mark.parametrize(("eps", "target_eps"), [(1e-5, None), (1e-3, None), (1e-3, 1e-3)])
def test_frozen_batchnorm_and_back(kind, eps, target_eps, trained, tmp_path):
    there, back = tmp_path / "there.pt", tmp_path / "back.pt"
    conversion = convert(trained, "frozen-batchnorm", there, eps=eps, frozen_kind=kind, target_eps=target_eps)
    loaded = torch.load(there)
    model = frozen_detector(target_eps or 1e-5)
    model.load_state_dict(loaded, strict=True)
    assert loaded._metadata["neck.1"]["version"] == kind.version
    reference = detector()
    reference.load_state_dict(torch.load(trained))
    for module in reference.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = eps
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    expected = reference.double().eval()(x).detach()
    torch.testing.assert_close(model.double()(x).detach(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    with open_checkpoint(there) as checkpoint:
        assert {norm.kind for norm in find_batchnorms(checkpoint.state_dicts[0])} == {NormKind.FROZEN_BATCH_NORM}
    assert bool(conversion.losses) == (eps != (target_eps or 1e-5))

    convert(there, "batchnorm", back)
    assert identical(trained, back)
    original, again = torch.load(trained), torch.load(back)
    assert list(original) == list(again)
    assert {n: e["version"] for n, e in original._metadata.items()} == {
        n: e["version"] for n, e in again._metadata.items()
    }
    detector().load_state_dict(again, strict=True)
    with open_checkpoint(back) as checkpoint:
        assert plan_conversion(checkpoint, ConversionTarget.BATCHNORM).plan.steps == ()


def test_way_back_of_a_variance_that_was_changed_meanwhile(trained, tmp_path):
    convert(trained, "frozen-batchnorm", tmp_path / "frozen.pt", eps=1e-3)
    state = torch.load(tmp_path / "frozen.pt")
    state["neck.1.running_var"] += 1
    torch.save(state, tmp_path / "changed.pt")
    convert(tmp_path / "changed.pt", "batchnorm", tmp_path / "back.pt")
    expected = state["neck.1.running_var"].double() - (1e-3 - 1e-5)
    torch.testing.assert_close(
        torch.load(tmp_path / "back.pt")["neck.1.running_var"].double(), expected, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("options", [{"eps": float("nan")}, {"eps": 1e-5, "target_eps": float("inf")}])
def test_an_eps_that_is_none_is_refused(options, trained):
    with open_checkpoint(trained) as checkpoint, pytest.raises(UsageError, match="no finite number"):
        plan_conversion(checkpoint, ConversionTarget.FROZEN_BATCHNORM, **options)


def test_a_pickled_module_brings_its_eps_along(tmp_path):
    convert(SAMPLES / "digits_module.pt", "torch", tmp_path / "state.pt")
    with open_checkpoint(tmp_path / "state.pt") as checkpoint:
        (record,) = checkpoint.records[""]
        assert record["modules"]["neck_bn"] == {
            "eps": 1e-5,
            "momentum": 0.1,
            "class": "torch.nn.modules.batchnorm.BatchNorm1d",
        }
        with pytest.raises(UsageError, match="contradicts"):
            plan_conversion(checkpoint, ConversionTarget.FROZEN_BATCHNORM, eps=1e-3)
    with open_checkpoint(SAMPLES / "digits_module.pt") as module, pytest.raises(RefusedError, match="--to torch"):
        plan_conversion(module, ConversionTarget.FROZEN_BATCHNORM)
    convert(tmp_path / "state.pt", "frozen-batchnorm", tmp_path / "frozen.pt")
    convert(tmp_path / "frozen.pt", "batchnorm", tmp_path / "back.pt")
    with open_checkpoint(tmp_path / "back.pt") as checkpoint:
        assert checkpoint.records[""][-1]["modules"]["neck_bn"]["momentum"] == 0.1
    assert identical(tmp_path / "state.pt", tmp_path / "back.pt")


def test_eps_must_be_known(trained):
    with open_checkpoint(trained) as checkpoint, pytest.raises(RefusedError, match="--eps"):
        plan_conversion(checkpoint, ConversionTarget.FROZEN_BATCHNORM)


def test_missing_counters_are_added_and_said_to_be_assumed(trained, tmp_path):
    state = {key: value for key, value in torch.load(trained).items() if not key.endswith("tracked")}
    torch.save(state, tmp_path / "old.pt")  # as torch before 0.4.1 wrote it
    conversion = convert(tmp_path / "old.pt", "batchnorm", tmp_path / "new.pt")
    assert len(conversion.plan.assumptions) == 1
    added = torch.load(tmp_path / "new.pt")
    detector().load_state_dict(added, strict=True)
    assert added["neck.1.num_batches_tracked"].dtype is torch.int64
    assert added["neck.1.num_batches_tracked"].shape == ()
    assert list(added) == list(torch.load(trained))


def test_layers_that_cannot_be_frozen_are_skipped(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        plan = plan_conversion(checkpoint, ConversionTarget.FROZEN_BATCHNORM, eps=1e-5).plan
    assert [(skip.layer, skip.reason) for skip in plan.skips] == [("0", SkipReason.NOT_AFFINE)]
    assert plan.layers == ("1",)


def test_optimizer_is_said_not_to_fit(tmp_path):
    with open_checkpoint(SAMPLES / "digits_training.pt") as checkpoint:
        losses = plan_conversion(checkpoint, ConversionTarget.FROZEN_BATCHNORM, eps=1e-5).losses
    assert any("optimizer" in loss for loss in losses)


def test_real_frozen_batchnorm2d_load_it(trained, tmp_path):
    ops = pytest.importorskip("torchvision.ops")
    convert(trained, "frozen-batchnorm", tmp_path / "there.pt", eps=1e-5)
    state = torch.load(tmp_path / "there.pt")
    layer = ops.FrozenBatchNorm2d(8)
    layer.load_state_dict({role: state[f"neck.1.{role}"] for role in layer.state_dict()}, strict=True)


def test_names_that_safetensors_cannot_hold_are_refused(tmp_path):
    state = {f"a\ud800.{name}": tensor for name, tensor in torch.nn.BatchNorm1d(3).state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(RefusedError, match="no text of Unicode, which safetensors asks for"):
        bntool.convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert not list(tmp_path.glob("*b.safetensors*"))
