"""Live freezing: the oracle is torch itself, and mmdet's recorded names."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.errors import RefusedError, UsageError
from bntool.freezing.live import freeze, frozen, unfreeze
from bntool.plan import SkipReason
from tests.fixtures.models.mmdet_resnet import detector, resnet50
from tests.places import FIXTURES


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(model, before):
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def run(model, *, steps=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(4, 3, 32, 32, generator=generator) * 2 + 1).square().mean().backward()


def statistics(model):
    return {k for k in model.state_dict() if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return detector().train()


def test_statistics_stay_after_train(model):
    before = snapshot(model)
    freeze(model)
    model.train()
    run(model)
    assert changed(model, before) == set()
    assert all(not module.training for _, module in batchnorms(model))
    assert model.training
    assert model.neck[0].training


def test_unfrozen_statistics_do_move(model):
    before = snapshot(model)
    run(model)
    assert changed(model, before) == statistics(model)


def batchnorms(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_keys_names_and_isinstance_stay(model):
    keys, text = list(model.state_dict()), repr(model)
    freeze(model, requires_grad=False)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert isinstance(model.neck[1], nn.BatchNorm2d)
    assert type(model.neck[1]).__name__ == "BatchNorm2d"
    fresh = detector()
    fresh.load_state_dict(model.state_dict(), strict=True)


def test_direct_train_of_a_layer_is_inert(model):
    freeze(model)
    model.neck[1].train()
    model.backbone.train(mode=True)
    assert not any(module.training for _, module in batchnorms(model))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_freeze_travels_with_copies(model, way):
    freeze(model, requires_grad=False, layers="neck.*")
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    before = snapshot(twin)
    twin.train()
    assert not twin.neck[1].training
    assert not twin.neck[1].weight.requires_grad
    run(twin)
    assert not any(key.startswith("neck.1.") for key in changed(twin, before))
    assert any(key.startswith("backbone.bn1.") for key in changed(twin, before))
    unfreeze(twin)
    assert type(twin.neck[1]) is nn.BatchNorm2d
    assert type(twin) is type(detector())
    assert twin.neck[1].training
    assert twin.neck[1].weight.requires_grad
    assert not model.neck[1].training  # the original is still frozen


def test_sync_batchnorm_conversion_is_survived(model):
    freeze(model, requires_grad=False)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    converted.train()
    assert all(isinstance(module, nn.SyncBatchNorm) for _, module in batchnorms(converted))
    assert not any(module.training for _, module in batchnorms(converted))
    converted.neck[1].train()
    assert not converted.neck[1].training
    unfreeze(converted)
    assert all(module.training for _, module in batchnorms(converted))
    assert all(type(module) is nn.SyncBatchNorm for _, module in batchnorms(converted))
    assert all(parameter.requires_grad for parameter in converted.parameters())


def test_sync_batchnorm_frozen_after_conversion_on_a_cpu(model):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    freeze(converted)
    before = snapshot(converted)
    converted.train()
    run(converted)
    assert changed(converted, before) == set()


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (4, 6)), (nn.BatchNorm3d, (4, 6, 2, 2, 2))])
def test_every_dimension(kind, shape):
    model = nn.Sequential(kind(6))
    freeze(model)
    before = snapshot(model)
    model.train()(torch.randn(shape))
    assert changed(model, before) == set()


def test_a_model_that_is_one_batchnorm():
    model = nn.BatchNorm1d(3)
    freeze(model)
    model.train()
    assert not model.training
    unfreeze(model)
    assert model.training
    assert type(model) is nn.BatchNorm1d


def test_lazy_layers_are_refused_until_materialised():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).train()
    with pytest.raises(RefusedError, match="lazy"):
        freeze(model)
    assert type(model) is nn.Sequential
    model(torch.randn(2, 3, 8, 8))
    freeze(model)
    assert not model.train()[1].training


def test_scripted_models_are_refused():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.trace(nn.Sequential(nn.BatchNorm1d(3)).eval(), torch.zeros(2, 3))
    with pytest.raises(RefusedError, match="script"):
        freeze(model)


def test_stale_gradients_are_dropped(model):
    run(model)
    freeze(model, requires_grad=False)
    before = snapshot(model)
    assert model.neck[1].weight.grad is None
    assert model.neck[0].weight.grad is not None
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1).step()
    moved = changed(model, before)
    assert not any(".bn" in key or key.startswith("neck.1") for key in moved)
    assert "neck.0.weight" in moved


def test_unfreeze_restores_exactly(model):
    model.neck[1].eval()
    model.backbone.bn1.weight.requires_grad_(requires_grad=False)
    kinds = [type(module) for module in model.modules()]
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    freeze(model, requires_grad=False, frozen_stages=1)
    freeze(model, layers="neck.*", requires_grad=True)  # a second freeze adds to the first
    unfreeze(model)
    assert [type(module) for module in model.modules()] == kinds
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    with pytest.raises(UsageError, match="not frozen"):
        unfreeze(model)


def test_unfreeze_heeds_modes_asked_for_meanwhile(model):
    freeze(model, frozen_stages=0)
    model.eval()
    unfreeze(model)
    assert not any(module.training for module in model.modules())
    freeze(model, frozen_stages=1)
    model.train()
    unfreeze(model)
    assert all(module.training for module in model.modules())


def test_unfreeze_of_a_part_says_so(model):
    freeze(model)
    with pytest.raises(UsageError, match="larger model"):
        unfreeze(model.neck)


def test_frozen_gives_back_what_it_borrowed(model):
    model.neck[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}

    class Stop(Exception):
        pass

    def work():
        with frozen(model, requires_grad=False):
            model.train()
            assert not model.neck[1].training
            assert not model.neck[1].weight.requires_grad
            raise Stop

    with pytest.raises(Stop):
        work()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.neck[1]) is nn.BatchNorm2d


def test_frozen_inside_of_a_freeze(model):
    freeze(model, layers="neck.*")
    with frozen(model, requires_grad=False):
        assert not model.backbone.bn1.training
    assert model.backbone.bn1.training
    model.train()
    assert not model.neck[1].training
    assert model.neck[1].weight.requires_grad
    unfreeze(model)
    assert model.neck[1].training


def test_nothing_to_freeze_is_an_error(model):
    with pytest.raises(UsageError, match="selects none of the 11 BatchNorm layers"):
        freeze(model, layers="nothing.*")
    with pytest.raises(UsageError, match="freeze nothing"):
        freeze(model, norm_eval=False)
    with pytest.raises(UsageError, match="no BatchNorm layer"):
        freeze(nn.Linear(2, 2))


def test_gradient_checkpointing_keeps_statistics(model):
    from torch.utils.checkpoint import checkpoint

    freeze(model)
    before = snapshot(model)
    model.train()
    checkpoint(model, torch.randn(4, 3, 32, 32), use_reentrant=False).sum().backward()
    assert changed(model, before) == set()
    assert model.neck[1].weight.grad is not None


def test_update_bn_leaves_frozen_statistics_alone(model):
    freeze(model, layers="neck.*")
    before = snapshot(model)
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 32, 32)], model)
    moved = changed(model, before)
    assert not any(key.startswith("neck.1.") for key in moved)
    assert "backbone.bn1.running_mean" in moved
    unfreeze(model)
    model.neck[1].reset_running_stats()
    assert model.neck[1].running_mean.abs().max() == 0


def test_saved_whole_models_can_be_read_and_applied_again(model, tmp_path):
    freeze(model, layers="neck.*")
    torch.save(model, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        (state_dict,) = checkpoint.state_dicts
        (neck,) = [norm for norm in find_batchnorms(state_dict) if norm.name == "neck.1"]
    assert neck.eps == 1e-5
    assert neck.class_path.endswith("BatchNorm2d")
    assert neck.attributes["training"] is False


def test_compiled_models(model):
    x = torch.randn(4, 3, 32, 32)
    expected = copy.deepcopy(model)
    for _, module in batchnorms(expected):
        module.eval()
    freeze(model)
    before = snapshot(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled.train()
    torch.testing.assert_close(compiled(x), expected(x))
    assert changed(model, before) == set()
    again = torch.compile(detector().train(), backend="eager")
    policy = freeze(again)  # through the wrapper
    again.train()
    assert "neck.1" in policy.layers
    assert not again._orig_mod.neck[1].training


def test_fx_tracing_keeps_the_freeze(model):
    freeze(model)
    traced = torch.fx.symbolic_trace(model).train()
    before = snapshot(traced)
    traced(torch.randn(4, 3, 32, 32))
    assert changed(traced, before) == set()
    freeze(traced, layers="neck.*", requires_grad=False)  # a GraphModule carries a freeze too
    assert not traced.train().get_submodule("neck.1").training


RECORDED = json.loads((FIXTURES / "mmdet_freezing.json").read_text())["cases"]


@pytest.mark.parametrize("case", [c for c in RECORDED if c["backbone"] == "ResNet-50"], ids=lambda case: case["title"])
def test_agrees_with_mmdet_name_by_name(case):
    model = resnet50(width=2).train()
    if case["sync"]:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    requires_grad = None if case["norm_requires_grad"] else False
    if case["norm_eval"] or requires_grad is False or case["frozen_stages"] >= 0:
        freeze(
            model,
            norm_eval=case["norm_eval"],
            requires_grad=requires_grad,
            frozen_stages=case["frozen_stages"],
        )
    model.train()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == case["frozen"]
    assert [name for name, module in model.named_modules() if not module.training] == case["eval_modules"]
    assert len(list(model.parameters())) == 159
    assert len(batchnorms(model)) == 53


def test_classes_that_others_changed_after_freezing_stay() -> None:
    class Absolute(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.abs()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 6, 6)
    freeze(model)
    parametrize.register_parametrization(model[1], "weight", Absolute())
    model.__class__ = type("Sharded", (type(model),), {"shards": 2})  # as fully_shard does
    kinds = type(model), type(model[1])
    model.train()
    assert not model[1].training
    unfreeze(model)
    assert (type(model), type(model[1])) == kinds
    assert model.shards == 2
    model.train()
    assert model[1].training
    model[1].reset_running_stats()
    model(x)
    assert not torch.equal(model[1].running_mean, torch.zeros(4))


class _Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1, self.bn1, self.dropout = nn.Conv2d(6, 6, 3), norm(6), nn.Dropout2d(0.9)

    def forward(self, x):
        return self.dropout(self.bn1(self.conv1(x)))


class _Staged(nn.Module):
    """A stem and stages that are called as in ResNet, with a dropout in the first."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), norm(6)
        self.layer1 = nn.Sequential(_Block(norm))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 4, 3), norm(4, affine=False))

    def forward(self, x):
        return self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))


_WHOLE = {"frozen_stages": 1, "norm_eval": True}


@pytest.mark.filterwarnings("error", "ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    ("norm", "options", "moving"),
    [
        (nn.BatchNorm2d, {}, set()),
        (nn.BatchNorm2d, {"layers": ["layer1.*"]}, {"bn1", "layer2.1"}),
        (nn.BatchNorm2d, {"frozen_stages": 1, "norm_eval": False, "requires_grad": False}, {"layer2.1"}),
        (nn.BatchNorm2d, _WHOLE, set()),
        (nn.SyncBatchNorm, _WHOLE, set()),
    ],
)
def test_a_script_keeps_the_freeze(tmp_path, norm, options, moving):
    torch.manual_seed(0)
    model, x = _Staged(norm).train(), torch.randn(4, 3, 12, 12)
    freeze(model, **options)
    expected = copy.deepcopy(model).eval()(x)
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, tmp_path / "scripted.pt")
    for kept in (scripted, torch.jit.load(tmp_path / "scripted.pt")):
        kept.eval()
        torch.testing.assert_close(kept(x), expected)
        kept.train()
        before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
        assert before.keys() == model.state_dict().keys()
        outputs = kept(x)
        changed = {name for name, tensor in kept.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name.rpartition(".")[0] for name in changed} == moving
        if options is _WHOLE:  # the dropout is frozen too
            torch.testing.assert_close(outputs, expected)
        trained = {name for name, parameter in kept.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unfreeze(model)  # scripting has left it as it was
    assert {type(module) for module in model.modules()} >= {norm, nn.Dropout2d}


def test_statistics_of_frozen_stages_outlast_a_reset_of_all():
    model = _Staged().train()
    model(torch.randn(8, 3, 12, 12))
    freeze(model, frozen_stages=1, norm_eval=False, requires_grad=True)
    before = model.layer1[0].bn1.running_mean.clone()
    torch.optim.swa_utils.update_bn([torch.randn(8, 3, 12, 12)], model)
    assert torch.equal(model.layer1[0].bn1.running_mean, before)


class _OwnNorm(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_part_that_is_scripted_later_stays_frozen():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
    freeze(model)
    model[0] = torch.jit.script(model[0])
    before = snapshot(model)
    model.train()(torch.randn(4, 3, 9, 9))
    assert not changed(model, before)
    assert model[0].training


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripting_a_layer_that_asks_for_the_mode_says_that_the_freeze_is_lost():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _OwnNorm(8))
    freeze(model)
    with pytest.warns(UserWarning, match="script does not keep the freeze of _OwnNorm"):
        scripted = torch.jit.script(model)
    with pytest.raises(RefusedError, match="freeze the model and script it then"):
        freeze(scripted)


def test_exported_programs_and_graphs_keep_the_freeze():
    torch.manual_seed(0)
    model, x = _Staged().train(), torch.randn(4, 3, 12, 12)
    model(x)
    freeze(model, **_WHOLE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    graph = torch.fx.symbolic_trace(model).train()
    for program in (exported, graph):
        torch.testing.assert_close(program(x), expected)
        assert all(torch.equal(program.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_tracing_a_frozen_model_keeps_the_freeze():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    freeze(model)
    traced = torch.jit.trace(model, torch.randn(4, 3, 9, 9)).train()
    before = traced.state_dict()["1.running_mean"].clone()
    traced(torch.randn(4, 3, 9, 9) + 3)
    assert torch.equal(before, traced.state_dict()["1.running_mean"])


def test_layers_without_statistics_cannot_be_kept_in_eval_mode():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)
    )
    net[1].track_running_stats, net[1].running_mean, net[1].running_var = False, None, None  # as Tent does
    assert freeze(net).layers == ("2",)
    unfreeze(net)
    assert freeze(net, requires_grad=False).layers == ("1", "2", "3")
    assert not net[3].weight.requires_grad
    with pytest.raises(UsageError, match="keeps no statistics and normalises by each batch"):
        freeze(nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False)), layers="0")


class OtherNames(nn.Module):
    """A BatchNorm that calls its statistics as another framework does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(8))
        self.register_buffer("moving_variance", torch.ones(8))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.moving_mean, self.moving_variance, training=self.training)


def test_statistics_under_other_names_are_named():
    with pytest.raises(UsageError, match=r"OtherNames \(1\) has moving_mean and moving_variance"):
        freeze(nn.Sequential(nn.Conv2d(3, 8, 3), OtherNames()))


def test_statistics_under_other_names_beside_batchnorms_are_named():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), OtherNames(), nn.BatchNorm2d(8))
    policy = freeze(net)
    assert policy.layers == ("1", "3")
    (skip,) = policy.skips
    assert (skip.layer, skip.reason) == ("2", SkipReason.NOT_RECOGNISED)
    assert skip.detail.startswith("OtherNames has moving_mean and moving_variance, and only running_mean")
    assert "OtherNames has moving_mean" in policy._repr_html_()
    assert freeze(net, layers="1").skips == ()
    before = net[2].moving_mean.clone()
    net.train()(torch.randn(4, 3, 5, 5))
    assert not torch.equal(net[2].moving_mean, before)


def test_statistics_that_another_layer_changes_are_not_frozen():
    net = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    net[2].running_var = net[0].running_var
    with pytest.raises(RefusedError, match="its statistics are those of 2, too"):
        freeze(net, layers="0")
    freeze(net, layers=["0", "2"])
    before = net[0].running_var.clone()
    net.train()(torch.randn(4, 8, 3, 3) * 3)
    assert torch.equal(net[2].running_var, before)


class NotFrozen(nn.BatchNorm2d):
    """Has a flag of its own instead of the mode."""

    frozen = False

    def forward(self, x):
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return functional.batch_norm(x, *statistics, training=not self.frozen)


class Averaging(nn.BatchNorm2d):
    """Goes on averaging in eval mode, and puts new buffers in the place of the old ones."""

    def forward(self, x):
        self.running_mean = self.running_mean * 0.9 + x.detach().mean((0, 2, 3)) * 0.1
        return super().forward(x)


class InTrainModeForever(nn.BatchNorm2d):
    """Does not take another mode."""

    @property
    def training(self):
        return True

    @training.setter
    def training(self, mode):
        pass


class InTrainMode(nn.BatchNorm2d):
    """Does not take another mode from train(); a held layer is not asked."""

    def train(self, mode=True):
        self.training = True
        return self


@pytest.mark.parametrize("kind", [NotFrozen, Averaging, InTrainModeForever])
def test_layers_that_eval_mode_does_not_hold_are_not_called_frozen(kind, tmp_path):
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), kind(4)), []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    before = snapshot(model)
    policy = freeze(model)
    assert policy.layers == ("1",)
    assert [(skip.layer, skip.reason) for skip in policy.skips] == [("2", SkipReason.TRAIN_MODE)]
    assert not changed(model, before)
    assert not seen
    model.train()
    run(model)
    moved = changed(model, before)
    assert {name.partition(".")[0] for name in moved} == {"2"}
    with pytest.raises(UsageError, match=f"{kind.__name__} changes its statistics in eval mode too"):
        freeze(kind(4))
    assert freeze(kind(4), norm_eval=False, requires_grad=False).layers == ("",)


@pytest.mark.parametrize("kind", [InTrainMode, _OwnNorm])
def test_layers_of_ones_own_that_eval_mode_holds_are_frozen(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4))
    before = snapshot(model)
    assert freeze(model).layers == ("1",)
    run(model.train())
    assert not changed(model, before)


class Around(nn.Module):
    """Normalises with the statistics of a layer inside, in a mode of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.normalise(x)

    def normalise(self, x):
        norm = self.norm
        return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)


def test_a_module_that_normalises_for_its_layers_is_named():
    model = nn.Sequential(Around(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"the forward of Around calls batch_norm .*the first is 0\.norm"):
        freeze(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze(model, layers="2")


def test_exported_programs_are_refused():
    program = torch.export.export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(), (torch.ones(2, 3, 5, 5),)
    )
    for model in (program.module(), nn.Sequential(program.module())):
        with pytest.raises(RefusedError, match="an exported program cannot be frozen"):
            freeze(model)
