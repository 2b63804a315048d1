"""``bntool fold`` from the outside: the folded file computes what the original does."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bntool
from bntool.checkpoints.formats import open_checkpoint
from bntool.cli.main import main
from bntool.folding.loading import load_folded
from bntool.folding.speed import measure_speed
from bntool.modules.loading import load_state
from tests.places import FIXTURES, INTEROP, SAMPLES
from tests.programs import copy_user_code

MODEL = f"{SAMPLES / 'digits_net.py'}:build"
SHAPE = ("--input-shape", "2,1,8,8")  # without it larger ones are tried, too, which takes twice the time
RESNET = FIXTURES / "models" / "cifar_resnet20.py"


def build(path: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.build().eval()


@pytest.fixture
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = np.load(SAMPLES / "digits_test.npz")
    return torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])


@pytest.fixture
def fold(capsys, tmp_path):
    """Run the command; exit code, JSON document, stderr and the output."""

    def run(checkpoint, *options, model=MODEL, output=None, shape_is_guessed=False):
        out = tmp_path / (output or f"folded{Path(checkpoint).suffix}")
        arguments = ["fold", str(checkpoint), "-o", str(out), "--json", *options]
        if model == MODEL and not {"--input-shape", "--data"} & set(options) and not shape_is_guessed:
            arguments += SHAPE
        code = main([*arguments, "--model", model] if model else arguments)
        captured = capsys.readouterr()
        return code, json.loads(captured.out)["files"][0], captured.err, out

    return run


def original(path: Path, key: str | None = None) -> nn.Module:
    model = build(SAMPLES / "digits_net.py")
    with open_checkpoint(path) as checkpoint:
        load_state(model, checkpoint.state_dict(key or ("" if len(checkpoint.state_dicts) == 1 else "state_dict")))
    return model


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("digits.pt", (), None),
        ("digits.safetensors", (), None),
        ("digits_legacy.pth", (), None),
        ("digits_training.pt", (), "state_dict"),
        ("digits_training.pt", ("--state-dict", "ema_state_dict"), "ema_state_dict"),
        ("drifted.pt", (), None),
        ("dead_channels.pt", (), None),
    ],
)
def test_every_sample_is_folded_whole(fold, digits, name: str, options: tuple[str, ...], key: str | None) -> None:
    code, document, error, out = fold(SAMPLES / name, *options, shape_is_guessed=name == "digits.pt")
    assert code == 0, error
    assert len(document["folds"]) == 9
    assert not document["skips"]
    assert document["verification"]["exact"] < 1e-12
    folded = load_folded(build(SAMPLES / "digits_net.py"), out, state_dict=key).eval()
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in folded.modules())
    images, labels = digits
    with torch.no_grad():
        before, after = original(SAMPLES / name, key)(images), folded(images)
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert int((after.argmax(1) == labels).sum()) == int((before.argmax(1) == labels).sum())


def test_training_checkpoint_loses_its_optimizer_and_says_so(fold) -> None:
    _, document, _, out = fold(SAMPLES / "digits_training.pt")
    assert document["dropped"] == ["optimizer"]
    assert any("ema_state_dict" in warning for warning in document["warnings"])
    before = torch.load(SAMPLES / "digits_training.pt", weights_only=False)
    after = torch.load(out, weights_only=False)
    assert set(before) - set(after) == {"optimizer"}
    assert after["epoch"] == before["epoch"]
    assert list(after["ema_state_dict"]) == list(before["ema_state_dict"])


def test_biases_follow_their_weights(fold) -> None:
    *_, out = fold(SAMPLES / "digits.pt")
    keys = list(torch.load(out))
    assert keys[:2] == ["conv1.weight", "conv1.bias"]
    assert not any("bn" in key for key in keys)


@pytest.mark.parametrize("name", ["digits.pt", "digits.safetensors", "digits_legacy.pth"])
def test_same_keys_loads_strictly_into_unmodified_code(fold, digits, name: str) -> None:
    code, document, _, out = fold(SAMPLES / name, "--layout", "same-keys")
    assert code == 0
    assert all(entry["stays"] for entry in document["folds"])
    state = load_file(out) if name.endswith("safetensors") else torch.load(out)
    model = build(SAMPLES / "digits_net.py")
    assert list(state) == list(
        load_file(SAMPLES / name) if name.endswith("safetensors") else torch.load(SAMPLES / name)
    )
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        before, after = original(SAMPLES / name)(digits[0]), model(digits[0])
    assert torch.equal(before.argmax(1), after.argmax(1))
    bn = model.bn1
    assert torch.equal(torch.sqrt(bn.running_var + bn.eps), torch.ones(12))
    assert torch.equal(bn.weight, torch.ones(12))


def test_whole_modules_only_with_same_keys(fold, digits) -> None:
    code, document, _, out = fold(SAMPLES / "digits_module.pt")
    assert code == 4
    assert "same-keys" in document["error"]["message"]
    assert not out.exists()
    code, _, _, out = fold(SAMPLES / "digits_module.pt", "--layout", "same-keys")
    assert code == 0
    build(SAMPLES / "digits_net.py")  # the class that the pickle names
    model = torch.load(out, weights_only=False).eval()
    before = torch.load(SAMPLES / "digits_module.pt", weights_only=False).eval()
    with torch.no_grad():
        assert torch.equal(before(digits[0]).argmax(1), model(digits[0]).argmax(1))


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("digits.pt", ()), ("digits.safetensors", ()), ("digits_training.pt", ("--state-dict", "ema_state_dict"))],
)
def test_printed_lines_load_the_file_without_bntool(digits, tmp_path, capsys, name: str, options, layout: str) -> None:
    out = tmp_path / f"folded{Path(name).suffix}"
    arguments = ["fold", str(SAMPLES / name), "--model", MODEL, *SHAPE, "-o", str(out), "--layout", layout, *options]
    assert main(arguments) == 0
    heading = "or without bntool:" if layout == "folded" else "load it into the unmodified model:"
    printed = capsys.readouterr().out.partition(heading)[2].splitlines()[1:]
    model = build(SAMPLES / "digits_net.py")
    exec("\n".join(line.removeprefix("  ") for line in printed), {"model": model})
    expected = original(SAMPLES / name, options[1] if options else None)(digits[0])
    with torch.no_grad():
        assert torch.equal(expected.argmax(1), model.eval()(digits[0]).argmax(1))
    if layout == "folded":
        assert not any(key.endswith("running_mean") for key in model.state_dict())
        other = load_folded(build(SAMPLES / "digits_net.py"), out, state_dict=options[1] if options else None)
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize("layout", ["list", "numbers", "arrays"])
def test_printed_lines_load_one_of_several_models(digits, tmp_path, capsys, layout: str) -> None:
    one, two = torch.load(SAMPLES / "digits.pt"), torch.load(SAMPLES / "digits.pt")
    arrays = {name: tensor.numpy() for name, tensor in two.items()}
    root = {"list": [one, two], "numbers": {0: one, 1: two}, "arrays": (one, arrays)}[layout]
    torch.save(root, tmp_path / "several.pt")
    arguments = ["fold", str(tmp_path / "several.pt"), "--state-dict", "1", "--model", MODEL, *SHAPE]
    assert main([*arguments, "-o", str(tmp_path / "folded.pt")]) == 0
    ours, _, plain = capsys.readouterr().out.partition("or without bntool:\n")
    expected = original(SAMPLES / "digits.pt", None)(digits[0])
    for lines in (ours.splitlines()[-1:], plain.splitlines()):
        scope = {"model": build(SAMPLES / "digits_net.py"), "bntool": bntool}
        exec("\n".join(line.removeprefix("  ") for line in lines), scope)
        assert not any(key.endswith("running_mean") for key in scope["model"].state_dict())
        with torch.no_grad():
            assert torch.equal(expected.argmax(1), scope["model"].eval()(digits[0]).argmax(1))


def test_without_a_model_it_says_what_to_give(fold) -> None:
    code, document, _, out = fold(SAMPLES / "digits.pt", model=None)
    assert code == 4
    assert "--model" in document["error"]["message"]
    assert "--pair" in document["error"]["message"]
    assert "9 pairs look likely, the first is --pair conv1=bn1" in document["error"]["message"]
    assert not out.exists()


def test_declared_pairs_give_the_same_bytes_as_a_trace(fold) -> None:
    *_, traced = fold(SAMPLES / "digits.safetensors", "--layers", "bn1", output="traced.safetensors")
    code, document, _, declared = fold(
        SAMPLES / "digits.safetensors",
        "--pair",
        "conv1=bn1",
        "--eps",
        "1e-5",
        model=None,
        output="declared.safetensors",
    )
    assert code == 0
    assert document["assumptions"]
    a, b = load_file(traced), load_file(declared)
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_of_pairs_is_as_good_as_each(fold, tmp_path) -> None:
    (tmp_path / "pairs.txt").write_text("conv1=bn1\nneck=neck_bn\n")
    code, document, *_ = fold(
        SAMPLES / "digits.pt", "--pair", f"@{tmp_path / 'pairs.txt'}", "--eps", "1e-5", model=None
    )
    assert code == 0
    assert [entry["layer"] for entry in document["folds"]] == ["bn1", "neck_bn"]


def test_weights_and_removed_elements_are_reported(fold) -> None:
    _, document, _, out = fold(SAMPLES / "dead_channels.pt")
    before, after = torch.load(SAMPLES / "dead_channels.pt"), torch.load(out)
    gone = sum(t.numel() for t in before.values()) - sum(t.numel() for t in after.values())
    assert sum(document["removed"].values()) == gone
    for weight in document["weights"]:
        for state, key in ((before, "before"), (after, "after")):
            largest = state[weight["name"]].flatten(1).abs().amax(1)
            assert weight[key]["largest"] == pytest.approx(float(largest.max()), rel=1e-6)
            assert weight[key]["smallest"] == pytest.approx(float(largest[largest > 0].min()), rel=1e-6)
    assert len(document["weights"]) == 9


def test_an_exported_program_runs_without_the_code(fold, digits, tmp_path) -> None:
    path = tmp_path / "folded.pt2"
    code, document, error, out = fold(SAMPLES / "digits.pt", "--export", str(path), "--input-shape", "2,1,8,8")
    assert code == 0, error
    assert document["export"]["any_batch"]
    program = torch.export.load(path)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        before, after = original(SAMPLES / "digits.pt")(digits[0]), program.module()(digits[0])
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert out.exists()


def test_an_export_alone(fold, digits, tmp_path, capsys) -> None:
    path = tmp_path / "folded.onnx"
    arguments = ["fold", str(SAMPLES / "digits.pt"), "--model", MODEL, "--export", str(path)]
    code = main([*arguments, "--input-shape", "2,1,8,8", "--json"])
    (document,) = json.loads(capsys.readouterr().out)["files"]
    assert (code, document["output"], document["export"]["format"]) == (0, None, "onnx")
    assert list(tmp_path.iterdir()) == [path]
    session = onnxruntime.InferenceSession(path)
    (after,) = session.run(None, {session.get_inputs()[0].name: digits[0].numpy()})
    with torch.no_grad():
        before = original(SAMPLES / "digits.pt")(digits[0])
    assert torch.equal(before.argmax(1), torch.from_numpy(after).argmax(1))


def test_a_whole_module_can_be_exported(tmp_path, capsys) -> None:
    arguments = ["fold", str(SAMPLES / "digits_module.pt"), "--model", MODEL, "--input-shape", "2,1,8,8"]
    assert main([*arguments, "--export", str(tmp_path / "a.pt2")]) == 0
    printed = capsys.readouterr().out
    assert "torch.export.load" in printed
    assert "load_folded" not in printed


def test_checkpoint_and_program_appear_together_or_not_at_all(fold, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.pt2"
    monkeypatch.setattr("bntool.checkpoints.outputs._sync_folder", lambda folder: None)
    link = os.link

    def appears_meanwhile(source, target):
        if target == path:
            path.write_text("of somebody else")
        link(source, target)

    monkeypatch.setattr(os, "link", appears_meanwhile)
    options = ("--export", str(path), "--input-shape", "2,1,8,8")
    code, document, *_ = fold(SAMPLES / "digits.pt", *options)
    assert (code, document["error"]["code"]) == (3, "unwritable")
    assert [other.name for other in tmp_path.iterdir()] == ["a.pt2"]
    assert path.read_text() == "of somebody else"


def test_a_dry_run_exports_nothing(fold, tmp_path) -> None:
    shape = ("--input-shape", "2,1,8,8")
    code, document, _, out = fold(SAMPLES / "digits.pt", "--export", str(tmp_path / "a.pt2"), *shape, "--dry-run")
    assert (code, document["export"]["output"]) == (0, None)
    assert not out.exists()
    assert not (tmp_path / "a.pt2").exists()


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (f"--export a.onnx --model {MODEL} --input-shape 2,1,8,8", 2, "pip install 'bntool[onnx]'"),
        (f"--export a.bin --model {MODEL}", 2, "FILE.pt2"),
        (f"--export a.pt2 --model {MODEL}", 2, "--input-shape"),
        ("--export a.pt2 --pair conv1=bn1 --eps 1e-5", 2, "--model"),
        (f"--export absent/a.pt2 --model {MODEL} --input-shape 2,1,8,8", 3, "create it first"),
        (f"--export folded.pt2 --model {MODEL} --input-shape 2,1,8,8", 2, "two files to write have this name"),
    ],
)
def test_an_export_that_cannot_be_written_stops_early(
    fold, tmp_path, monkeypatch, *, options: str, exit_code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bntool.folding.outputs._PACKAGES", ("no_such_package",))
    code, document, _, out = fold(SAMPLES / "digits.pt", *options.split(), model=None, output="folded.pt2")
    assert code == exit_code
    assert words in document["error"]["message"]
    assert not out.exists()


def test_uneven_and_subnormal_weights_are_warned_of_and_kept(fold, tmp_path) -> None:
    layer, norm = nn.Conv2d(1, 32, 1, bias=False), nn.BatchNorm2d(32)
    with torch.no_grad():
        layer.weight.fill_(1e-10)
        norm.weight.fill_(1e-30)[0] = 1.0
    torch.save(nn.ModuleDict({"conv": layer, "bn": norm}).state_dict(), tmp_path / "tiny.pt")
    _, document, _, out = fold(tmp_path / "tiny.pt", "--pair", "conv=bn", "--eps", "1e-5", model=None)
    assert any(text.startswith("quantisation: in 1 of 1 weights") for text in document["warnings"])
    assert any(text.startswith("31 weight elements became subnormal") for text in document["warnings"])
    assert int((torch.load(out)["conv.weight"] != 0).sum()) == 32


@pytest.mark.parametrize(("factor", "flushed"), [("1.0", 31), ("3e19", 0)])
def test_subnormal_weights_become_zero_where_that_is_proven_harmless(fold, tmp_path, factor: str, flushed: int) -> None:
    tiny_net = copy_user_code("tiny_net", tmp_path)
    layer, norm = nn.Conv2d(1, 32, 1, bias=False), nn.BatchNorm2d(32)
    with torch.no_grad():
        layer.weight.fill_(1e-9)
        norm.weight.fill_(1e-30)[0] = 1.0
    torch.save(nn.ModuleDict({"conv": layer, "bn": norm}).state_dict(), tmp_path / "tiny.pt")
    options = ("--input-shape", "2,1,4,4", "--model-arg", f"factor={factor}")
    code, document, error, out = fold(tmp_path / "tiny.pt", *options, model=f"{tiny_net}:build")
    assert code == 0, error
    (weight,) = document["weights"]
    assert (weight["flushed"], weight["subnormal"]) == (flushed, 31 - flushed)
    assert int((torch.load(out)["conv.weight"] == 0).sum()) == flushed
    words = "were set to zero" if flushed else "they were kept"
    assert any(words in text for text in document["warnings"])
    model = sys.modules["tiny_net"].build(float(factor))
    model.load_state_dict(torch.load(tmp_path / "tiny.pt"))
    live = bntool.fold(model, torch.randn(2, 1, 4, 4)).model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in torch.load(out).items())


def test_a_benchmark_is_measured(fold, monkeypatch) -> None:
    monkeypatch.setattr("bntool.folding.speed.measure_speed", partial(measure_speed, seconds=0))
    _, document, *_ = fold(SAMPLES / "digits.pt", "--benchmark", "--input-shape", "4,1,8,8", "--dry-run")
    speed = document["speed"]
    assert (speed["rounds"], speed["shapes"]) == (10, [[4, 1, 8, 8]])
    assert speed["wall"]["low"] <= speed["wall"]["ratio"] <= speed["wall"]["high"]
    code, document, *_ = fold(SAMPLES / "digits.pt", "--benchmark", "--pair", "conv1=bn1", model=None)
    assert (code, document["error"]["code"]) == (2, "usage")


def test_costs_and_errors_by_layer_are_reported(fold) -> None:
    _, document, *_ = fold(SAMPLES / "digits.pt", "--input-shape", "4,1,8,8")
    layers = document["verification"]["layers"]
    assert [layer["layer"] for layer in layers] == [entry["layer"] for entry in document["folds"]]
    assert all(layer["exact"] < 1e-13 < layer["stored"] < 1e-5 for layer in layers)
    elements, net = [], original(SAMPLES / "digits.pt")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.register_forward_hook(lambda module, inputs, output: elements.append(output.numel()))
    net(torch.zeros(4, 1, 8, 8))
    assert document["cost"]["removed"] == sum(elements)


def test_declared_pairs_need_eps(fold) -> None:
    code, document, *_ = fold(SAMPLES / "digits.pt", "--pair", "conv1=bn1", model=None)
    assert code == 2
    assert "--eps" in document["error"]["message"]


@pytest.mark.parametrize(
    ("command", "recorded"),
    [
        (["freeze", "--as", "constant", "--eps", "1e-3"], 1e-3),
        (["convert", "--to", "frozen-batchnorm", "--eps", "1e-3", "--target-eps", "1e-5"], 1e-5),
    ],
)
def test_what_was_made_for_an_eps_is_folded_with_that_one(fold, tmp_path, command, recorded) -> None:
    source = tmp_path / "made.pt"
    name, *options = command
    assert main([name, str(SAMPLES / "digits.pt"), *options, "-o", str(source), "--quiet"]) == 0
    pair = ("--pair", "conv1=bn1")
    code, document, *_ = fold(source, *pair, "--eps", "1e-4", model=None)
    assert (code, "contradicts" in document["error"]["message"]) == (2, True)
    *_, alone = fold(source, *pair, model=None, output="alone.pt")
    *_, given = fold(source, *pair, "--eps", str(recorded), model=None, output="given.pt")
    a, b = (torch.load(path) for path in (alone, given))
    assert torch.equal(a["conv1.weight"], b["conv1.weight"])
    assert torch.equal(a["conv1.bias"], b["conv1.bias"])


def test_declared_pairs_take_eps_from_the_model_and_are_verified(fold) -> None:
    code, document, *_ = fold(SAMPLES / "digits.pt", "--pair", "conv1=bn1")
    assert code == 0
    assert document["verification"]["exact"] < 1e-12


def test_a_wrong_pair_fails_verification_and_writes_nothing(fold) -> None:
    code, _, _, out = fold(SAMPLES / "digits.pt", "--pair", "layer1.0.conv1=layer1.1.bn2")
    assert code == 5
    assert not out.exists()


def test_strict_refuses_what_is_assumed(fold) -> None:
    code, *_ = fold(SAMPLES / "digits.pt", "--pair", "conv1=bn1", "--eps", "1e-5", "--strict", model=None)
    assert code == 4


def test_broken_statistics_cannot_be_proven(fold) -> None:
    code, document, _, out = fold(SAMPLES / "broken_nan_variance.pt")
    assert code == 5
    assert "NaN" in document["error"]["message"]
    assert not out.exists()


def test_dry_run_writes_nothing(fold) -> None:
    code, document, _, out = fold(SAMPLES / "digits.pt", "--dry-run")
    assert (code, document["output"]) == (0, None)
    assert not out.exists()


def test_data_and_input_shape_are_used(fold) -> None:
    _, document, *_ = fold(SAMPLES / "digits.pt", "--data", str(SAMPLES / "digits_test.npz"))
    assert document["verification"]["inputs"] == 7  # three batches, three random ones, and one sample
    code, *_ = fold(SAMPLES / "digits.pt", "--input-shape", "1,1,8,8", "--force")
    assert code == 0


def test_folding_twice_finds_nothing_more(fold) -> None:
    *_, out = fold(SAMPLES / "digits.pt", "--layers", "bn1")
    with open_checkpoint(out) as checkpoint:
        (records,) = checkpoint.records.values()
    assert records[0]["removed_modules"] == ["bn1"]


@pytest.fixture(scope="module")
def cifar(shared) -> tuple[torch.Tensor, torch.Tensor]:
    """200 test images, and what the original ResNet-20 answers."""
    data = np.load(shared / "data" / "cifar10_test_2000.npz")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(data["images"][:200]).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    model = build(RESNET)
    with open_checkpoint(shared / "weights" / "resnet20-12fca82f.th") as checkpoint:
        load_state(model, checkpoint.state_dicts[0])
    answers = top1(model, images)
    assert float((answers == torch.from_numpy(data["labels"][:200])).float().mean()) > 0.9
    return images, answers


def top1(model, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def test_real_resnet20_is_folded_whole(fold, shared, cifar) -> None:
    images, answers = cifar
    shape, model = ("--input-shape", "2,3,32,32"), f"{RESNET}:build"
    code, document, error, out = fold(
        shared / "weights" / "resnet20-12fca82f.th", *shape, model=model, output="folded.th"
    )
    assert code == 0, error
    assert len(document["folds"]) == 19
    assert not document["skips"]
    assert torch.equal(top1(load_folded(build(RESNET), out).eval(), images), answers)


def test_direct_only_leaves_what_an_addition_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(INTEROP / "keras_folding" / "residual_stream.keras")
    assert main(["fold", file, "--dry-run"]) == 0
    assert "fold 4 of 4 BatchNorm layers" in capsys.readouterr().out
    assert main(["fold", file, "--dry-run", "--direct-only"]) == 0
    assert "fold 2 of 4 BatchNorm layers" in capsys.readouterr().out
    assert main(["fold", file, "--dry-run", "--direct-only", "--strict"]) == 4


def test_no_file_that_is_read_is_written_to(tmp_path, capsys):
    code, data = copy_user_code("small_net", tmp_path), tmp_path / "images.npz"
    np.savez(data, images=np.zeros((4, 3, 8, 8), np.float32))
    before = {path: path.read_bytes() for path in (code, data)}
    arguments = ["fold", str(SAMPLES / "digits.pt"), "--model", f"{code}:build", "--data", str(data), "--force"]
    for output in (["-o", str(code)], ["-o", str(data)]):
        assert main([*arguments, *output]) == 2
        assert "the file is read, too: name another one to write" in capsys.readouterr().err
    both = str(tmp_path / "folded.pt2")
    assert main([*arguments, "-o", both, "--export", both]) == 2
    assert "two files to write have this name" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
