"""What changed between two checkpoints: the oracle is torch in float64."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bntool
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import equal_streams
from bntool.cli.main import main
from bntool.comparison.checkpoint import (
    Change,
    Expectation,
    diff,
    find_violations,
)
from bntool.comparison.name_alignment import align_names
from bntool.errors import UsageError
from tests import programs
from tests.fixtures.models.mmdet_resnet import detector
from tests.places import SAMPLES


def compare(a, b, **options):
    with open_checkpoint(a) as one, open_checkpoint(b) as two:
        return diff(one, two, **options)


def met(a, b, **options):
    comparison = compare(a, b, **options)
    return {expectation.value for expectation in Expectation if not find_violations(comparison, expectation)}


@pytest.fixture
def state():
    torch.manual_seed(0)
    model = detector()
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32))
    return model.state_dict()


def save(state, path):
    torch.save(state, path)
    return path


def changed_copy(state, **changes):
    copied = {key: value.clone() for key, value in state.items()}
    for key, value in changes.items():
        copied[key.replace("__", ".")] = value
    return copied


def test_same_tensors_in_every_format(tmp_path):
    names = ["digits.pt", "digits.safetensors", "digits_legacy.pth", "digits_module.pt", "digits_training.pt"]
    for name in names[1:]:
        comparison = compare(SAMPLES / names[0], SAMPLES / name)
        assert comparison.identical, name
        assert len(comparison.layers) == 9


def test_measures_agree_with_torch():
    """Shift in sigmas and variance ratio from the tensors, scale and shift from what eval mode does to 0 and 1."""
    before = torch.load(SAMPLES / "digits.pt")
    after = torch.load(SAMPLES / "drifted.pt")
    comparison = compare(SAMPLES / "digits.pt", SAMPLES / "drifted.pt")
    assert len(comparison.layers) == 9
    for layer in comparison.layers:
        mean_a, var_a, mean_b, var_b = (
            state[f"{layer.name}.{role}"].double()
            for state in (before, after)
            for role in ("running_mean", "running_var")
        )
        shift = (mean_b - mean_a) / (var_b + 1e-5).sqrt()
        assert layer.statistics.mean_shift == pytest.approx(shift.square().mean().sqrt().item())
        assert layer.statistics.worst_mean_shift == pytest.approx(shift.abs().max().item())
        ratio = ((var_b + 1e-5) / (var_a + 1e-5)).log()
        assert layer.statistics.variance_ratio == pytest.approx(ratio.mean().exp().item())
        assert layer.statistics.variance_spread == pytest.approx(ratio.square().mean().sqrt().exp().item())
        assert layer.statistics.worst_variance_ratio == pytest.approx(ratio[ratio.abs().argmax()].exp().item())
        far = torch.maximum(shift.abs(), ratio.abs())
        assert layer.statistics.find_worst_channel() == far.argmax().item()
        answers = []
        for state in (before, after):
            norm = nn.BatchNorm1d(len(mean_a)).double().eval()
            norm.load_state_dict({r: state[f"{layer.name}.{r}"] for r in norm.state_dict()})
            zero = norm(torch.zeros(1, len(mean_a), dtype=torch.float64))[0].detach()
            one = norm(torch.ones(1, len(mean_a), dtype=torch.float64))[0].detach()
            answers.append((one - zero, zero))
        (scale_a, shift_a), (scale_b, shift_b) = answers
        assert layer.scale_change == pytest.approx(((scale_b - scale_a).norm() / scale_a.norm()).item())
        assert layer.shift_change == pytest.approx(((shift_b - shift_a).norm() / shift_a.norm()).item())
        assert not layer.eps_known
    severities = [layer.severity for layer in comparison.layers]
    assert severities == sorted(severities, reverse=True)


def test_eps_of_pickled_modules_counts():
    assert all(layer.eps_known for layer in compare(*[SAMPLES / "digits_module.pt"] * 2).layers)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("neck__1__running_mean", {"stats-only"}),
        ("neck__1__running_var", {"stats-only"}),
        ("neck__1__num_batches_tracked", {"stats-only"}),
        ("neck__1__weight", {"norm-eval"}),
        ("neck__1__bias", {"norm-eval"}),
        ("neck__0__weight", {"norm-eval", "frozen"}),
    ],
)
def test_expectations(key, expected, state, tmp_path):
    a = save(state, tmp_path / "a.pt")
    name = key.replace("__", ".")
    value = state[name].clone()
    # one bit of one element
    flat = value.view(-1).view(torch.int32 if value.dtype is torch.float32 else torch.int64)
    flat[0] ^= 1
    b = save(changed_copy(state, **{key: value}), tmp_path / "b.pt")
    assert met(a, b) == expected
    assert met(a, a) == {expectation.value for expectation in Expectation}
    assert met(a, b, layers=["backbone.*"]) >= {"norm-eval", "frozen"} or "neck.1" not in name


def test_expectations_of_a_folded_or_foreign_file(state, tmp_path):
    a = save(state, tmp_path / "a.pt")
    folded = {key: value for key, value in state.items() if not key.startswith("neck.1.")}
    comparison = compare(a, save(folded, tmp_path / "b.pt"))
    assert {c for layer in comparison.layers if layer.name == "neck.1" for c in layer.changes.values()} == {
        Change.ONLY_A
    }
    assert comparison.layers[0].name == "neck.1"
    assert met(a, tmp_path / "b.pt") == set()
    linear = save(nn.Linear(2, 2).state_dict(), tmp_path / "c.pt")
    assert met(linear, linear) == {"identical"}


def test_other_tensors(state, tmp_path):
    a = save(state, tmp_path / "a.pt")
    other = changed_copy(state)
    other["cls_head.weight"] = state["cls_head.weight"].double()
    other["cls_head.bias"] = torch.zeros(5)
    other["reg_head.0.weight"] = state["reg_head.0.weight"].half()
    del other["reg_head.0.bias"]
    other["new.weight"] = torch.zeros(2, 2)
    save_file(other, tmp_path / "b.safetensors")
    comparison = compare(a, tmp_path / "b.safetensors")
    found = {name: change for name, change in comparison.others.items() if change is not Change.SAME}
    assert found == {
        "cls_head.weight": Change.DTYPE,
        "cls_head.bias": Change.SHAPE,
        "reg_head.0.weight": Change.VALUES,
        "reg_head.0.bias": Change.ONLY_A,
        "new.weight": Change.ONLY_B,
    }


def test_strides_do_not_matter(state, tmp_path):
    other = changed_copy(state)
    other["cls_head.weight"] = state["cls_head.weight"].to(memory_format=torch.channels_last)
    assert met(save(state, tmp_path / "a.pt"), save(other, tmp_path / "b.pt")) >= {"identical"}


def test_quantised_tensors_are_not_taken_for_equal(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8)
        path = save({"a.weight": quantised, "b.weight": torch.zeros(2)}, tmp_path / "q.pt")
    comparison = compare(path, path)
    assert comparison.others["a.weight"] is Change.UNKNOWN
    assert find_violations(comparison, Expectation.IDENTICAL)


def test_prefixes_are_aligned(state, tmp_path):
    a = save(state, tmp_path / "a.pt")
    wrapped = save({f"module.{key}": value for key, value in state.items()}, tmp_path / "b.pt")
    assert met(a, wrapped) >= {"identical"}
    backbone = save(
        {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")},
        tmp_path / "c.pt",
    )
    comparison = compare(backbone, a)
    assert (comparison.path_a, comparison.path_b) == ("", "backbone.")
    assert {layer.name for layer in comparison.layers if not layer.changed} >= {"bn1", "layer2.0.bn3"}
    assert {n for n, c in comparison.others.items() if c is Change.SAME} >= {"conv1.weight"}
    assert compare(a, backbone).path_a == "backbone."


def test_align_names():
    assert align_names(["a.x", "b.x"], ["a.x", "b.x"]) == ("", "")
    assert align_names(["conv.w", "bn.w"], ["m.conv.w", "m.bn.w", "head.w"]) == ("", "m.")
    assert align_names(["m.conv.w", "m.bn.w", "head.w"], ["conv.w", "bn.w"]) == ("m.", "")
    assert align_names(["u", "v", "w"], ["m.u", "x", "y"]) == ("", "")  # one of three is chance


def test_state_dicts_by_key():
    options = {"state_dict": "ema_state_dict"}
    assert compare(SAMPLES / "digits_training.pt", SAMPLES / "digits_training.pt", **options).a.key == "ema_state_dict"
    comparison = compare(SAMPLES / "digits_training.pt", SAMPLES / "digits.pt", **options)
    assert not comparison.identical
    with pytest.raises(UsageError):
        compare(SAMPLES / "digits.pt", SAMPLES / "digits.pt", **options)


def test_the_model_and_its_average_in_one_file():
    training = SAMPLES / "digits_training.pt"
    comparison = compare(training, training, state_dict="state_dict", state_dict_b="ema_state_dict")
    assert (comparison.a.key, comparison.b.key) == ("state_dict", "ema_state_dict")
    assert comparison.not_compared == (("ema_state_dict",), ("state_dict",))
    content = torch.load(training, weights_only=False)
    model = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    average = {name.removeprefix("module."): value for name, value in content["ema_state_dict"].items()}
    expected = {name for name in model if not torch.equal(model[name], average[name])} | (average.keys() - model.keys())
    changed = {name for name, change in comparison.others.items() if change is not Change.SAME}
    changed |= {
        f"{layer.name}.{r}" for layer in comparison.layers for r, c in layer.changes.items() if c != Change.SAME
    }
    assert changed == expected != set()


def test_nan_is_equal_to_itself_and_worst_where_it_is_new():
    broken = SAMPLES / "broken_nan_variance.pt"
    assert met(broken, broken) == {expectation.value for expectation in Expectation}
    comparison = compare(SAMPLES / "digits.pt", broken)
    assert comparison.layers[0].name == "layer2.0.bn1"
    assert [layer.changed for layer in comparison.layers].count(True) == 1


def test_equal_streams():
    assert equal_streams(iter([b"ab", b"c"]), iter([b"a", b"bc"]))
    assert not equal_streams(iter([b"ab"]), iter([b"abc"]))
    assert not equal_streams(iter([b"ab", b"d"]), iter([b"a", b"bc"]))
    assert equal_streams(iter([]), iter([]))


def test_imports_neither_torch_nor_numpy():
    loaded = programs.list_loaded("diff", "digits.pt", "drifted.pt", "--expect", "stats-only", cwd=SAMPLES)
    assert not {"torch", "numpy", "rich"} & loaded


def modules_that_differ(tmp_path, **changes):
    """Two pickled modules with the same tensors."""
    one = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    other.load_state_dict(one.state_dict())
    for name, value in changes.items():
        setattr(other[1], name, value)
    paths = tmp_path / "a.pt", tmp_path / "b.pt"
    for model, path in zip((one, other), paths, strict=True):
        torch.save(model, path)
    return paths


@pytest.mark.parametrize(
    ("changes", "setting", "met_by"),
    [
        ({"eps": 1e-3}, (1e-5, 1e-3), set()),
        ({"momentum": 0.01}, (0.1, 0.01), set()),
        ({"momentum": None}, (0.1, None), set()),
        ({"track_running_stats": False}, (True, False), set()),
        ({"training": False}, (True, False), {"frozen", "norm-eval", "stats-only"}),  # what a freeze does
    ],
)
def test_everything_that_files_say_of_a_layer_is_compared(tmp_path, changes, setting, met_by):
    a, b = modules_that_differ(tmp_path, **changes)
    (layer,) = compare(a, b).layers
    assert layer.changed
    assert dict(layer.settings) == {next(iter(changes)): setting}
    assert not compare(a, b).identical
    assert met(a, b) == met_by


def test_requires_grad_of_one_parameter_is_compared(tmp_path):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    torch.save(model, tmp_path / "a.pt")
    model[0].weight.requires_grad_(False)
    torch.save(model, tmp_path / "b.pt")
    (layer,) = compare(tmp_path / "a.pt", tmp_path / "b.pt").layers
    assert dict(layer.settings) == {"requires_grad": (True, "bias only")}


def test_requires_grad_is_compared_and_a_frozen_file_is_as_expected(tmp_path):
    import bntool

    a, b = modules_that_differ(tmp_path)
    bntool.freeze_checkpoint(a, tmp_path / "f.pt", requires_grad=False)
    assert compare(a, b).identical
    (layer,) = compare(a, tmp_path / "f.pt").layers
    assert dict(layer.settings) == {"training": (True, False), "requires_grad": (True, False)}
    assert met(a, tmp_path / "f.pt") == {"frozen", "norm-eval", "stats-only"}


def test_a_class_that_differs_is_a_change(tmp_path):
    class FrozenBatchNorm2d(nn.BatchNorm2d):
        pass

    model, other = nn.BatchNorm2d(4), FrozenBatchNorm2d(4)
    other.load_state_dict(model.state_dict())
    (layer,) = diff(model, other).layers
    assert dict(layer.settings) == {"kind": ("BatchNorm", "FrozenBatchNorm")}
    assert diff(nn.BatchNorm2d(4), nn.SyncBatchNorm(4)).identical  # the same in eval mode


def test_what_one_file_leaves_open_is_no_difference(tmp_path):
    a, b = modules_that_differ(tmp_path, eps=1e-3)
    torch.save(torch.load(b, weights_only=False).state_dict(), tmp_path / "state.pt")
    assert compare(a, tmp_path / "state.pt").identical


def test_an_eps_that_a_conversion_recorded_is_compared(tmp_path):
    import bntool

    a, b = modules_that_differ(tmp_path, eps=1e-3)
    for path in (a, b):
        bntool.convert(path, path.with_suffix(".safetensors"), to="safetensors")
    comparison = diff(a.with_suffix(".safetensors"), b.with_suffix(".safetensors"), expect="frozen")
    assert comparison.violations == ("1: eps differs (1e-05 and 0.001)",)
    assert diff(a, b.with_suffix(".safetensors")).layers[0].settings == {"eps": (1e-5, 1e-3)}


@pytest.fixture
def flat(tmp_path):
    """A model under net. and its average under ema., in one state dict, as some trainers write them."""
    torch.manual_seed(0)
    model = detector()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(3):
        model(torch.randn(4, 3, 32, 32))
        average.update_parameters(model)
    parts = {"net.": model, "ema.": average}
    state = {prefix + name: t for prefix, part in parts.items() for name, t in part.state_dict().items()}
    save(model.state_dict(), tmp_path / "net.pt")
    save(average.module.state_dict(), tmp_path / "ema.pt")
    return save(state, tmp_path / "flat.pt")


@pytest.mark.parametrize("prefixes", [("net.", "ema."), ("net", "ema"), ("net.", "ema.module.")])
def test_a_model_and_its_average_in_one_state_dict(prefixes, flat):
    together = diff(flat, flat, prefix=prefixes[0], prefix_b=prefixes[1])
    apart = diff(flat.parent / "net.pt", flat.parent / "ema.pt")
    assert together.layers == apart.layers
    assert {name: c for name, c in together.others.items() if name != "n_averaged"} == apart.others
    assert len(together.layers) > 10
    assert not together.identical
    assert diff(flat, flat, prefix="net.").identical
    assert (together.path_a, together.path_b) == ("net.", "ema.module.")


def test_a_part_of_one_file_is_compared_with_the_whole_of_another(flat):
    assert diff(flat, flat.parent / "net.pt", prefix="net.").identical
    assert diff(flat.parent / "net.pt", flat, prefix_b="net.").identical


@pytest.fixture
def in_buffers(flat):
    """The same average in buffers of the model, as EMAHook of mmcv 1.7 registers them; and the model alone."""
    model, average = torch.load(flat.parent / "net.pt"), torch.load(flat.parent / "ema.pt")
    buffers = {f"ema_{name.replace('.', '_')}": tensor for name, tensor in average.items()}
    return save({"meta": {"epoch": 3}, "state_dict": {**model, **buffers}}, flat.parent / "mmcv.pth")


@pytest.mark.parametrize("prefix", ["ema_", "ema"])
def test_an_average_in_buffers_is_compared_under_the_names_of_its_model(prefix, in_buffers):
    together = diff(in_buffers, in_buffers, prefix_b=prefix)
    apart = diff(in_buffers.parent / "net.pt", in_buffers.parent / "ema.pt")
    assert (together.layers, together.others) == (apart.layers, apart.others)
    assert len(together.layers) > 10
    assert (together.path_a, together.path_b) == ("", "ema_")
    turned = diff(in_buffers, in_buffers, prefix=prefix, prefix_b="backbone.")
    assert turned.path_a == "ema_backbone_"


def test_an_average_in_buffers_beside_other_files(in_buffers):
    folder = in_buffers.parent
    assert diff(in_buffers, folder / "ema.pt", prefix="ema_").identical
    assert diff(folder / "ema.pt", in_buffers, prefix_b="ema_").identical
    assert diff(in_buffers, in_buffers, prefix="ema_").identical  # of both files
    with pytest.raises(UsageError, match=r"--prefix 'ema_': no tensor's name begins"):
        diff(folder / "net.pt", in_buffers, prefix="ema_")
    with pytest.raises(UsageError, match=r"there are 'ema_'"):
        diff(in_buffers, in_buffers, prefix="average")


def test_parameters_alone_that_are_averaged_in_buffers(in_buffers):
    """As EMAHook does: it averages what named_parameters gives."""
    content = torch.load(in_buffers)
    kept = {n: t for n, t in content["state_dict"].items() if "running" not in n or not n.startswith("ema_")}
    comparison = diff(save({"state_dict": kept}, in_buffers), in_buffers, prefix_b="ema_")
    changes = comparison.layers[0].changes
    assert changes["running_mean"] is Change.ONLY_A
    assert changes["weight"] in (Change.SAME, Change.VALUES)


def test_why_there_is_no_layer_is_said(state, tmp_path, capsys):
    parameters = {n: t for n, t in state.items() if not n.endswith(("running_mean", "running_var", "tracked"))}
    path = save(parameters, tmp_path / "parameters.pt")
    (violation,) = diff(path, path, expect="frozen").violations
    assert "in A and B the state dict has no BatchNorm layer with statistics" in violation
    assert "may be some without" in violation
    other = save({"fc.weight": torch.ones(2, 2)}, tmp_path / "fc.pt")
    violations = diff(path, other, expect="norm-eval").violations
    assert "in A the state dict has no BatchNorm layer with statistics" in violations[0]
    assert violations[1].endswith("in B the state dict has no BatchNorm layer")
    assert main(["diff", str(other), str(other), "--expect", "frozen", "--quiet"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("in A and B the state dict has no BatchNorm layer, against --expect frozen")


def test_a_prefix_that_nothing_begins_with(flat):
    with pytest.raises(UsageError, match=r"--prefix-b 'average': no tensor's name begins .*'net.', 'ema.'"):
        diff(flat, flat, prefix="net.", prefix_b="average")


def test_frozen_layers_need_not_be_named_again(state, tmp_path):
    layers = ["backbone.bn1", "backbone.layer1.0.bn1"]
    before = bntool.freeze_checkpoint(
        save(state, tmp_path / "a.pt"), tmp_path / "frozen.pt", layers=layers, requires_grad=False
    ).output
    others_moved = {
        name: t + 1 if "running" in name and not name.startswith(tuple(layers)) else t for name, t in state.items()
    }
    after = save(others_moved, tmp_path / "b.pt")
    comparison = diff(before, after, expect="frozen")
    assert comparison.violations == ()
    assert comparison.recorded == tuple(layers) == tuple(layer.name for layer in comparison.layers)
    assert diff(before, after, expect="frozen", layers=["*"]).violations
    assert diff(tmp_path / "a.pt", after, expect="frozen").violations  # nothing is recorded there: all layers count
    others_moved["backbone.bn1.running_var"] = state["backbone.bn1.running_var"] * 2
    save(others_moved, after)
    assert diff(before, after, expect="frozen").violations == ("backbone.bn1: running_var changed",)
    gone = {name: t for name, t in others_moved.items() if not name.startswith("backbone.layer1.0.bn1.")}
    save(gone, after)
    assert (
        "backbone.layer1.0.bn1: weight, bias, running_mean, running_var, num_batches_tracked only in A"
        in diff(before, after, expect="norm-eval").violations[0]
    )


def test_one_channel_among_many_is_named(tmp_path, capsys):
    """The measures of its layer say little of it: x 1e6 in one of 64 channels is a factor of 1.2 on average."""
    before = torch.load(SAMPLES / "digits.pt")
    layer = "layer2.0.bn2"
    for factor, what in ((1e6, "running_var of channel 5 by a factor of 1e6"), (float("nan"), "NaN, infinite")):
        after = {name: tensor.clone() for name, tensor in before.items()}
        after[f"{layer}.running_var"][5] *= factor
        main(["diff", str(SAMPLES / "digits.pt"), str(save(after, tmp_path / "after.pt"))])
        moved = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("moved most"))
        assert layer in moved
        assert what in moved
    assert f"{layer} (channel 5)" in moved
    after["bn1.running_mean"][3] += 1000
    main(["diff", str(SAMPLES / "digits.pt"), str(save(after, tmp_path / "after.pt"))])
    others = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("moved most of the others"))
    assert "bn1, running_mean of channel 3" in others
