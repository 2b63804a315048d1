"""``bntool recalibrate`` from the outside."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bntool.cli.main import main
from tests.places import SAMPLES
from tests.programs import copy_user_code, start_bntool

MODEL = f"{SAMPLES / 'digits_net.py'}:build"
TRAIN, TEST = str(SAMPLES / "digits_train.npz"), str(SAMPLES / "digits_test.npz")


@pytest.fixture
def recalibrate(capsys, tmp_path):
    """Run the command on a sample; exit code, stdout, stderr, and where the output would be."""

    def run(checkpoint, *options, data=TRAIN, model=MODEL, output="out.pt"):
        out = tmp_path / output
        arguments = [
            "recalibrate",
            str(SAMPLES / checkpoint),
            "--model",
            model,
            "--data",
            data,
            "-o",
            str(out),
            *options,
        ]
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err, out

    return run


def accuracy(state_dict, data=TEST):
    sys.path.insert(0, str(SAMPLES))
    try:
        from digits_net import build
    finally:
        sys.path.remove(str(SAMPLES))
    model = build()
    model.load_state_dict(state_dict)
    arrays = np.load(data)
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(arrays["images"]))
    return float((outputs.argmax(1).numpy() == arrays["labels"]).mean())


@pytest.mark.parametrize("method", ["pooled", "exact", "paper"])
def test_drifted_statistics_are_repaired(recalibrate, method):
    code, out, err, path = recalibrate("drifted.pt", "--eval-data", TEST, "--method", method)
    assert (code, err) == (0, "")
    assert "top1 39.17 % -> 98." in out
    assert "First layer in execution order to part from the data: bn1" in out
    assert f"wrote {path}" in out
    written = torch.load(path, weights_only=True)
    assert accuracy(written) > 0.985
    before = torch.load(SAMPLES / "drifted.pt", weights_only=True)
    changed = [key for key in before if not torch.equal(before[key], written[key])]
    assert len(changed) == 27
    assert all(key.endswith(("running_mean", "running_var", "num_batches_tracked")) for key in changed)


@pytest.mark.parametrize("name", ["broken_nan_variance.pt", "broken_never_updated.pt"])
def test_broken_statistics_are_repaired(recalibrate, name):
    code, out, _, path = recalibrate(name, "--eval-data", TEST)
    assert code == 0
    assert accuracy(torch.load(path, weights_only=True)) > 0.985
    if "nan" in name:
        assert "outputs held NaN or infinity before, and no longer do" in out


def test_the_printed_lines_load_the_output(recalibrate):
    code, out, _, _ = recalibrate("digits_training.pt", "--force")
    assert code == 0
    lines = [line.strip() for line in out.split("Load it without bntool:\n")[1].splitlines()]
    sys.path.insert(0, str(SAMPLES))
    try:
        from digits_net import build

        model = build()
        exec("\n".join(lines), {"model": model})
    finally:
        sys.path.remove(str(SAMPLES))
    assert int(model.bn1.num_batches_tracked) == 23


def test_only_the_chosen_state_dict_changes(recalibrate):
    code, _, _, path = recalibrate("digits_training.pt", "--state-dict", "ema_state_dict", "--samples", "256")
    assert code == 0
    before = torch.load(SAMPLES / "digits_training.pt", weights_only=False)
    after = torch.load(path, weights_only=False)
    assert all(torch.equal(after["state_dict"][key], tensor) for key, tensor in before["state_dict"].items())
    assert not torch.equal(
        after["ema_state_dict"]["module.bn1.running_mean"], before["ema_state_dict"]["module.bn1.running_mean"]
    )


def test_safetensors_without_counters(recalibrate, tmp_path):
    tensors = {k: v for k, v in load_file(SAMPLES / "digits.safetensors").items() if "tracked" not in k}
    save_file(tensors, tmp_path / "in.safetensors")
    code, _, err, path = recalibrate(tmp_path / "in.safetensors", "--samples", "256", output="out.safetensors")
    assert (code, err) == (0, "")
    assert list(load_file(path)) == list(tensors)


def test_json(recalibrate):
    code, out, err, path = recalibrate("drifted.pt", "--json", "--eval-data", TEST, "--layers", "layer1.*")
    assert (code, err) == (0, "")
    (facts,) = json.loads(out)["files"]
    assert facts["samples"] == 1437
    assert [layer["layer"] for layer in facts["layers"]] == [
        "layer1.0.bn1",
        "layer1.0.bn2",
        "layer1.1.bn1",
        "layer1.1.bn2",
    ]
    assert facts["evaluation"]["before"] == pytest.approx(0.39167, abs=1e-4)
    assert facts["output"] == str(path)


def test_keep_if_better_writes_only_then(recalibrate):
    code, out, _, path = recalibrate(
        "digits.pt", "--eval-data", TEST, "--keep-if-better", data=str(SAMPLES / "digits_contrast_train.npz")
    )
    assert code == 0
    assert "kept the old statistics" in out
    assert not path.exists()
    code, _, _, path = recalibrate("drifted.pt", "--eval-data", TEST, "--keep-if-better")
    assert code == 0
    assert path.exists()


def test_a_metric_that_fell_is_said_where_it_was_written_all_the_same(recalibrate):
    contrast = str(SAMPLES / "digits_contrast_train.npz")
    sentence = "the new statistics are worse here; --keep-if-better would not have written them"
    _, out, _, path = recalibrate("digits.pt", "--eval-data", TEST, "--samples", "256", data=contrast)
    assert sentence in out.splitlines()
    assert path.exists()
    _, out, _, _ = recalibrate("digits.pt", "--eval-data", TEST, "--samples", "256", "--dry-run", data=contrast)
    assert sentence not in out
    _, out, _, _ = recalibrate("drifted.pt", "--eval-data", TEST, "--samples", "256", "--force")
    assert sentence not in out


def test_large_changes_are_plain_numbers(recalibrate, tmp_path):
    state = torch.load(SAMPLES / "drifted.pt", weights_only=True)
    state["bn1.running_mean"] += 123
    torch.save(state, tmp_path / "off.pt")
    _, out, _, _ = recalibrate(tmp_path / "off.pt", "--samples", "256", "--dry-run")
    row = next(line for line in out.splitlines() if line.startswith("bn1 "))
    assert re.search(r" [1-9][\d,]{2,} σ ", row)
    assert re.search(r" [1-9][\d,]{2,} %", row)
    assert not re.search(r"\de\d [σ%]", out)


def test_a_dry_run_writes_nothing(recalibrate):
    code, out, _, path = recalibrate("drifted.pt", "--samples", "256", "--dry-run")
    assert code == 0
    assert "nothing was written" in out
    assert not path.exists()


def test_the_output_records_where_the_statistics_are_from(recalibrate):
    _, _, _, path = recalibrate("drifted.pt", "--samples", "100", "--prior", "5")
    record = torch.load(path, weights_only=True)._metadata[""]["bntool"]
    assert '"prior": 5.0' in str(record) or "5.0" in str(record)


def test_a_second_run_writes_the_same_bytes(recalibrate):
    _, _, _, first = recalibrate("drifted.pt", "--samples", "512", output="a.pt")
    _, _, _, second = recalibrate("drifted.pt", "--samples", "512", output="b.pt")
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def user_code(tmp_path):
    path = copy_user_code("faulty_digits", tmp_path)
    yield lambda name: f"{path}:{name}"
    sys.modules.pop(path.stem, None)


@pytest.mark.parametrize(
    ("options", "expected", "message"),
    [
        ({"data": "empty"}, 2, "gave no batch"),
        ({"data": "raising"}, 6, "OSError: disk gone"),
        ({"data": "interrupted"}, 130, "interrupted; nothing was written"),
        ({"data": "poisoned"}, 4, "sample 13 of"),
        ({"model": "build"}, 6, "no weights here"),
        ({"model": "absent"}, 2, "has no 'absent'"),
        ({"model": "images"}, 2, "neither a module nor callable"),
    ],
)
def test_faults_give_one_sentence_and_no_file(recalibrate, user_code, options, expected, message):
    for key in options:
        options[key] = user_code(options[key])
    code, out, err, path = recalibrate("drifted.pt", **options)
    assert code == expected
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert not path.exists()


@pytest.mark.parametrize(("data", "code"), [("interrupted", "interrupted"), ("raising", "user-code")])
def test_failures_in_json_name_the_checkpoint(recalibrate, user_code, data, code):
    _, out, _, _ = recalibrate("drifted.pt", "--json", data=user_code(data))
    (facts,) = json.loads(out)["files"]
    assert facts["file"] == str(SAMPLES / "drifted.pt")
    assert facts["error"]["code"] == code


def test_labels_that_the_model_has_no_outputs_for(recalibrate, tmp_path):
    arrays = dict(np.load(TEST))
    np.savez(tmp_path / "beyond.npz", images=arrays["images"], labels=arrays["labels"] + 1)
    code, _, err, path = recalibrate("drifted.pt", "--eval-data", str(tmp_path / "beyond.npz"))
    assert (code, path.exists()) == (2, False)
    assert "there is a label 10, but the model has 10 outputs" in err
    np.savez(tmp_path / "masks.npz", images=arrays["images"], labels=np.zeros((360, 16, 16), "int64"))
    code, out, _, _ = recalibrate("drifted.pt", "--eval-data", str(tmp_path / "masks.npz"))
    assert code == 0
    assert "! not measured: top-1 needs outputs (samples, classes)" in out


def test_class_folders_that_are_not_the_models_classes(recalibrate, tmp_path):
    for index, name in enumerate(["a", "a", "b", "b"]):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 16), 60 * index).save(tmp_path / "photos" / name / f"{index}.png")
    steps = ("--preprocess", "mnist,resize=16,crop=16")
    code, out, _, path = recalibrate("drifted.pt", *steps, "--json", data=str(tmp_path / "photos"))
    (facts,) = json.loads(out)["files"]
    assert code == 0
    assert facts["preprocessing"] == {
        "steps": "resize=16,crop=16,mean=0.1307,std=0.3081,channels=1",
        "origin": "mnist, changed",
    }
    assert "2 class folders, but the model has 10 outputs" in facts["warnings"][0]
    path.unlink()
    code, _, err, _ = recalibrate("drifted.pt", *steps, "--keep-if-better", data=str(tmp_path / "photos"))
    assert (code, path.exists()) == (2, False)
    assert "2 class folders" in err


def test_a_folder_of_which_no_image_can_be_read(recalibrate, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "good").mkdir()
    Image.new("L", (8, 8), 60).save(tmp_path / "good" / "c.png")
    for name in ("a.png", "b.png"):
        (tmp_path / "photos" / name).write_bytes(b"")
    options = ("--preprocess", "mnist", "--on-bad-data", "skip")
    for more in ((), ("--eval-data", str(tmp_path / "good"))):  # found before, and while the statistics are measured
        code, _, err, path = recalibrate("drifted.pt", *options, *more, data=str(tmp_path / "photos"))
        assert (code, path.exists()) == (4, False)
        assert re.search(r"no sample is left: 2 were left out, first \S+[ab]\.png cannot be read", err)


def test_data_without_labels(recalibrate, tmp_path):
    np.save(tmp_path / "images.npy", np.load(TRAIN)["images"][:100])
    code, out, _, _ = recalibrate("drifted.pt", "--dry-run", data=str(tmp_path / "images.npy"))
    assert code == 0
    assert "images.npy (the calibration data); there are no labels" in out


def test_bad_batches_are_left_out_on_request(recalibrate, user_code):
    code, out, _, _ = recalibrate("drifted.pt", "--on-bad-data", "skip", data=user_code("poisoned"))
    assert code == 0
    assert "30 samples in 2 batches" in out
    assert "10 samples left out: NaN or infinity in sample 13 of" in out
    assert "(all 10 samples of the batch)" in out
    assert "NaN or infinity, with the new statistics too" not in out


@pytest.mark.parametrize(
    ("extra", "expected", "message"),
    [
        (["--layers", "nothing.*"], 2, "selects none of the 9 BatchNorm layers"),
        (["--keep-if-better", "--data", "{half}"], 2, "needs labels"),
        (["--metric", "accuracy"], 2, "top1, top5"),
        (["--device", "cuda:99"], 2, "cannot be moved"),
        (["--device", "toaster"], 2, "cannot be moved"),
        (["--state-dict", "nothing"], 2, "holds ''"),
        (["--method", "best"], 2, "'pooled', 'exact', 'paper'"),
        (["--preprocess", "imagenet"], 2, "--preprocess"),
        (["--model-arg", "width=3"], 2, "width"),
    ],
)
def test_what_cannot_be_done(recalibrate, user_code, extra, expected, message):
    extra = [text.format(half=user_code("half")) for text in extra]
    code, _, err, path = recalibrate("drifted.pt", *extra)
    assert code == expected
    assert message in err
    assert not path.exists()


def test_a_selection_of_nothing_is_refused_before_data_is_read(recalibrate, user_code):
    code, _, err, path = recalibrate("drifted.pt", "--layers", "nothing.*", data=user_code("raising"))
    assert code == 2
    assert "selects none of the 9" in err
    assert not path.exists()


def test_a_model_that_does_not_fit_is_explained(recalibrate):
    code, _, err, _ = recalibrate(
        "drifted.pt", "--model-arg", "width=8", model=f"{SAMPLES / 'digits_net.py'}:DigitsNet"
    )
    assert code == 4
    assert "does not fit the model" in err
    assert "[12, 1, 3, 3] in the file, [8, 1, 3, 3] in the model" in err


def test_another_number_of_classes_is_guessed(recalibrate, user_code, tmp_path):
    state = torch.load(SAMPLES / "drifted.pt", weights_only=True)
    state |= {"fc.weight": state["fc.weight"][:7].clone(), "fc.bias": state["fc.bias"][:7].clone()}
    torch.save(state, tmp_path / "seven.pt")
    code, _, err, _ = recalibrate(tmp_path / "seven.pt")
    assert code == 4
    assert "build the model so, e.g. --model-arg num_classes=7" in err


def test_half_precision_files(recalibrate, tmp_path):
    state = {
        k: v.half() if v.is_floating_point() else v
        for k, v in torch.load(SAMPLES / "drifted.pt", weights_only=True).items()
    }
    torch.save(state, tmp_path / "half.pt")
    code, _, _, path = recalibrate(tmp_path / "half.pt", "--eval-data", TEST)
    assert code == 0
    written = torch.load(path, weights_only=True)
    assert written["bn1.running_var"].dtype is torch.float16
    assert accuracy(written) > 0.98


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_statistics_that_half_precision_cannot_hold_are_promoted_on_request(recalibrate, tmp_path, suffix):
    state = torch.load(SAMPLES / "drifted.pt", weights_only=True)
    state["conv1.weight"] *= 4e3  # variances of some 1e6, where float16 ends at 65504
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    given = tmp_path / f"half.{suffix}"
    (torch.save if suffix == "pt" else save_file)(half, given)
    output = f"out.{suffix}"
    code, _, err, path = recalibrate(given, "--samples", "256", output=output)
    assert code == 4
    assert "float16 cannot hold the new variance" in err
    assert "--promote stores such statistics as float32" in err
    assert not path.exists()
    code, out, _, path = recalibrate(given, "--promote", "--json", output=output)
    assert code == 0
    promoted = ["bn1.running_mean", "bn1.running_var"]
    assert json.loads(out)["files"][0]["promoted"] == promoted
    written = torch.load(path, weights_only=True) if suffix == "pt" else load_file(path)
    assert set(written) == set(half)
    changed = [name for name, tensor in written.items() if tensor.dtype is not half[name].dtype]
    assert changed == promoted
    assert torch.isfinite(written["bn1.running_var"]).all()
    assert written["bn1.running_var"].max() > 65504
    assert all(torch.equal(written[n], half[n]) for n in half if "running" not in n and "num_batches" not in n)
    assert accuracy(written) > 0.98  # loads, strictly, into the model in float32


def test_a_model_in_half_precision_cannot_take_promoted_statistics(recalibrate, tmp_path):
    source = copy_user_code("half_model", tmp_path)
    torch.save(torch.nn.Sequential(torch.nn.BatchNorm2d(1)).half().state_dict(), tmp_path / "half.pt")
    code, _, err, path = recalibrate(tmp_path / "half.pt", "--promote", model=f"{source}:build", data=f"{source}:data")
    assert code == 4
    assert "float16 cannot hold the new variance" in err
    assert not path.exists()


def test_bfloat16_is_approximate_and_says_so(recalibrate):
    code, out, _, path = recalibrate("drifted.pt", "--precision", "bfloat16", "--eval-data", TEST, "--samples", "512")
    assert code == 0
    assert "approximate (forwards in bfloat16)" in out
    approximate = torch.load(path, weights_only=True)
    recalibrate("drifted.pt", "--samples", "512", "--force")
    full = torch.load(path, weights_only=True)
    names = [name for name in full if name.endswith("running_var")]
    worst = max(float((approximate[name] / full[name]).log().abs().max()) for name in names)
    assert 1e-5 < worst < 0.1  # it did compute in bfloat16, whose numbers have eight bits
    assert accuracy(approximate) > 0.98
    code, _, err, _ = recalibrate("drifted.pt", "--precision", "bfloat16", "--method", "exact", "--dry-run")
    assert code == 2
    assert "exact statistics cannot be computed in bfloat16" in err


def test_more_samples_than_there_are(recalibrate):
    _, out, _, _ = recalibrate("drifted.pt", "--samples", "5000")
    assert "only 1,437 of the 5,000 samples asked for were there" in out


def test_samples_auto_takes_as_many_as_fit_and_says_how_many_those_are(recalibrate, monkeypatch):
    monkeypatch.setattr("bntool.recalibration.exact.reading.find_available", lambda _device: 5_000_000)
    code, out, err, path = recalibrate("drifted.pt", "--method", "exact")
    assert code == 4
    assert not path.exists()
    assert "1437 samples on their way would need about" in err
    code, out, err, path = recalibrate("drifted.pt", "--method", "exact", "--samples", "auto")
    assert (code, err) == (0, "")
    used = int(re.search(r"exact statistics of (\d+) samples", out)[1])
    assert 64 <= used < 1437
    assert f"! only {used} of the 1,437 samples fit into memory" in out
    assert path.exists()


def test_samples_are_a_number_or_auto(recalibrate):
    code, out, _, _ = recalibrate("drifted.pt", "--samples", "auto", "--method", "exact")
    assert code == 0
    assert "exact statistics of 1,437 samples" in out
    assert "of memory" in out
    code, _, err, _ = recalibrate("drifted.pt", "--samples", "some", "--dry-run")
    assert code == 2
    assert "a number of at least 1, or auto" in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("method", ["pooled", "exact"])
def test_ctrl_c_ends_cleanly(tmp_path, method):
    copy_user_code("slow", tmp_path)
    torch.save(torch.nn.ModuleDict({"bn": torch.nn.BatchNorm1d(2)}).state_dict(), tmp_path / "in.pt")
    arguments = ("in.pt", "--model", "slow.py:Slow", "--data", "slow.py:batches", "-o", "out.pt", "--method", method)
    process = start_bntool("recalibrate", *arguments, cwd=tmp_path)
    with process.stdout, process.stderr:
        process.stderr.readline()  # where everything that user code prints goes
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
    assert process.wait() == 130
    *before, last = said.splitlines()
    assert last == "bntool: error: interrupted; nothing was written"
    assert all(line == "running" or line.startswith("bntool: pooled") for line in before)  # until it had the signal
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["in.pt", "slow.py"]


@pytest.fixture
def bad_evaluation_data(tmp_path):
    arrays = dict(np.load(TEST))
    arrays["images"][5, 0, 3, 3] = np.nan
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    return str(path)


def test_bad_evaluation_data_stop_the_command_or_are_counted(recalibrate, bad_evaluation_data):
    code, _, err, path = recalibrate("drifted.pt", "--eval-data", bad_evaluation_data)
    assert code == 4
    assert re.search(r"NaN or infinity in row 5 of .*bad\.npz", err)
    assert not path.exists()
    code, out, _, _ = recalibrate(
        "drifted.pt", "--eval-data", bad_evaluation_data, "--on-bad-data", "skip", "--batch-size", "60", "--json"
    )
    assert code == 0
    (warning,) = json.loads(out)["files"][0]["warnings"]
    assert warning.startswith("60 samples of the evaluation data were left out, first NaN or infinity in row 5 of")


@pytest.fixture
def factories(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    yield copy_user_code("factories", tmp_path)
    for name in ("factories", "digits_net"):
        sys.modules.pop(name, None)


def test_a_stream_is_read_once_whatever_the_workers(recalibrate, factories):
    code, out, err, path = recalibrate("drifted.pt", "--workers", "2", "--json", data=f"{factories}:stream")
    assert (code, err) == (0, "")
    assert json.loads(out)["files"][0]["samples"] == 200
    assert torch.load(path, weights_only=True)["bn1.num_batches_tracked"] == 4


@pytest.mark.parametrize("name", ["used_up", "again"])
def test_an_iterator_is_refused_with_what_to_do(recalibrate, factories, name):
    code, _, err, path = recalibrate("drifted.pt", data=f"{factories}:{name}")
    assert code == 2
    assert "an iterator can be read once only, so name a function that makes a new one" in err
    assert not path.exists()


def test_the_first_tensor_of_the_outputs_counts(recalibrate, factories):
    code, out, err, _ = recalibrate("drifted.pt", "--eval-data", TEST, model=f"{factories}:with_loss")
    assert (code, err) == (0, "")
    assert "top1 39.17 % -> 98." in out


def test_globs_that_select_nothing_are_named(recalibrate):
    code, _, err, _ = recalibrate("drifted.pt", "--layers", "bn1", "--layers", "nope", "--eval-data", TEST)
    assert code == 2
    assert "--layers 'nope' selects none of the 9 BatchNorm layers" in err


def test_the_meta_device_computes_nothing(recalibrate):
    code, _, err, path = recalibrate("drifted.pt", "--device", "meta")
    assert (code, err) == (2, "bntool: error: --device meta computes nothing\n")
    assert not path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full here")
@pytest.mark.parametrize("form", [[], ["--json"], ["--help"]])
def test_a_result_that_cannot_be_printed(form):
    command = [sys.executable, "-m", "bntool", "inspect", str(SAMPLES / "drifted.pt"), *form]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=600)
    assert done.returncode == 3
    assert done.stderr == "bntool: error: what was to be printed cannot be written: No space left on device\n"


def test_one_of_several_processes_answers_in_json(capsys, monkeypatch):
    arguments = ["recalibrate", str(SAMPLES / "drifted.pt"), "--json"]  # neither model nor data
    monkeypatch.setenv("RANK", "1")  # of no job
    assert main(arguments) == 2
    assert "--model SPEC" in json.loads(capsys.readouterr().out)["files"][0]["error"]["message"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--model SPEC" in captured.err
    monkeypatch.setenv("RANK", "0")
    assert main(arguments) == 2
    assert "--model SPEC" in json.loads(capsys.readouterr().out)["files"][0]["error"]["message"]


@pytest.mark.parametrize("has_it", [True, False])
def test_a_processor_without_bfloat16_is_named(recalibrate, monkeypatch, has_it):
    monkeypatch.setattr("bntool.recalibration.checkpoint.is_faster_in_bfloat16", lambda _model: has_it)
    code, out, _, _ = recalibrate("drifted.pt", "--precision", "bfloat16", "--samples", "64", "--dry-run")
    assert code == 0
    assert ("this processor has no bfloat16 instructions" in out) is not has_it


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not list the processor's flags")
def test_what_a_processor_has_is_what_the_system_lists():
    from bntool.recalibration.memory_format import is_faster_in_bfloat16

    flags = Path("/proc/cpuinfo").read_text()
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        assert is_faster_in_bfloat16(torch.nn.Linear(1, 1))
    elif "avx2" in flags and "avx512" not in flags and "avx_ne_convert" not in flags:
        assert not is_faster_in_bfloat16(torch.nn.Linear(1, 1))
    else:
        pytest.skip("a processor between the two")


NORM = {"a.weight": (4, 3, 3, 3), "b.weight": (4,), "b.bias": (4,), "b.running_mean": (4,), "b.running_var": (4,)}


@pytest.mark.parametrize(
    ("kept", "code", "words"),
    [
        (["a.weight"], 4, "the file has no BatchNorm layer: there is nothing to recalibrate"),
        (["a.weight", "b.weight", "b.bias"], 2, "give --model SPEC and --data SPEC"),  # statistics may be missing
        (list(NORM), 2, "give --model SPEC and --data SPEC"),
    ],
)
def test_a_model_is_asked_for_only_where_there_may_be_something_to_do(kept, code, words, tmp_path, capsys):
    save_file({name: torch.ones(NORM[name]) for name in kept}, tmp_path / "a.safetensors")
    assert main(["recalibrate", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "b.safetensors")]) == code
    assert words in capsys.readouterr().err
