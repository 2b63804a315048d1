"""``bntool freeze`` as a user meets it."""

import json
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from bntool.cli.main import main
from bntool.freezing.live import apply_freeze
from tests import programs
from tests.fixtures.models.mmdet_resnet import detector
from tests.places import SAMPLES


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    torch.save(detector().state_dict(), tmp_path / "detector.pt")
    return tmp_path / "detector.pt"


def test_says_loudly_that_the_file_alone_freezes_nothing(tmp_path, capsys):
    target = tmp_path / "frozen.pt"
    assert main(["freeze", str(SAMPLES / "digits.pt"), "-o", str(target)]) == 0
    out = capsys.readouterr().out
    assert "The file alone freezes nothing" in out
    assert f"bntool.apply_freeze(model, {str(target)!r})" in out
    assert "train" in out
    assert target.exists()


def test_json(checkpoint, tmp_path, capsys):
    arguments = ["--no-requires-grad", "--layers", "neck.*", "--frozen-stages", "0", "--json"]
    assert main(["freeze", str(checkpoint), "-o", str(tmp_path / "out.pt"), *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    (facts,) = document["files"]
    assert document["command"] == "freeze"
    assert facts["policy"]["layers"] == ["neck.1"]
    assert facts["policy"]["stages"]["in_eval"] == ["backbone.bn1"]
    assert facts["layers"] == ["backbone.bn1", "neck.1"]
    assert facts["frozen_parameters"] == [
        "backbone.conv1.weight",
        "backbone.bn1.weight",
        "backbone.bn1.bias",
        "neck.1.weight",
        "neck.1.bias",
    ]
    assert facts["steps"] == []
    assert facts["recorded"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),  # neither an output nor --dry-run
        (["--dry-run"], 0),
        (["-o", "{same}"], 2),
        (["-o", "{out}", "--layers", "nothing"], 2),
        (["-o", "{out}", "--no-norm-eval"], 2),
        (["-o", "{out}", "--as", "constant"], 4),
        (["-o", "{out}", "--as", "constant", "--eps", "1e-5"], 0),
        (["-o", "{out}", "--frozen-stages", "7"], 2),
        (["-o", "{missing}/x.pt"], 3),
        (["--emit", "python"], 0),
        (["--emit", "mmdet"], 4),  # the neck and the head have BatchNorm, too
        (["--emit", "mmdet", "--layers", "backbone.*"], 0),
        (["--emit", "timm"], 4),
    ],
)
def test_exit_codes(arguments, code, checkpoint, tmp_path, capsys):
    places = {"same": checkpoint, "out": tmp_path / "out.pt", "missing": tmp_path / "missing"}
    assert main(["freeze", str(checkpoint), *(a.format(**places) for a in arguments)]) == code
    assert (tmp_path / "out.pt").exists() == (code == 0 and "-o" in arguments)


def test_code_is_printed_for_files_without_a_place_for_a_record(tmp_path, capsys):
    state = {key: value.clone() for key, value in detector().state_dict().items()}  # no _metadata
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert main(["freeze", str(tmp_path / "old.pth"), "-o", str(tmp_path / "out.pth")]) == 4
    assert "--emit python" in capsys.readouterr().err
    assert main(["freeze", str(tmp_path / "old.pth"), "--emit", "python"]) == 0
    assert "backbone.bn1" in capsys.readouterr().out
    # or converted first, as the message says
    assert main(["convert", str(tmp_path / "old.pth"), "--to", "torch", "-o", str(tmp_path / "new.pt")]) == 0
    assert main(["freeze", str(tmp_path / "new.pt"), "-o", str(tmp_path / "out.pt")]) == 0


def test_sharded_files(tmp_path, capsys):
    state = detector().state_dict()
    parts = {
        "a.safetensors": [n for n in state if "backbone" in n],
        "b.safetensors": [n for n in state if "backbone" not in n],
    }
    for file, names in parts.items():
        save_file({name: state[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / index.name
    assert main(["freeze", str(index), "-o", str(target), "--no-requires-grad"]) == 0
    assert main(["diff", str(index), str(target), "--expect", "identical"]) == 0
    model = detector()
    assert "neck.1" in apply_freeze(model, target).layers
    assert not model.neck[1].weight.requires_grad


def test_strict_refuses_skips(tmp_path):
    source = str(SAMPLES / "broken_nan_variance.pt")
    options = ["-o", str(tmp_path / "out.pt"), "--as", "constant", "--eps", "1e-5"]
    assert main(["freeze", source, *options, "--strict"]) == 4
    assert main(["freeze", source, *options]) == 0


def test_printed_python_freezes_what_the_policy_freezes(checkpoint, tmp_path, capsys):
    arguments = ["--no-requires-grad", "--layers", "neck.*", "--frozen-stages", "1"]
    assert (
        main(["freeze", str(checkpoint), "-o", str(tmp_path / "out.pt"), *arguments, "--emit", "python", "--json"]) == 0
    )
    code = json.loads(capsys.readouterr().out)["files"][0]["emitted"]
    by_code, by_policy = detector(), detector()
    namespace = {}
    exec(code, namespace)
    by_code.train()
    namespace["freeze"](by_code)
    apply_freeze(by_policy, tmp_path / "out.pt")
    by_policy.train()
    for mine, other in zip(by_code.named_modules(), by_policy.named_modules(), strict=True):
        assert (mine[0], mine[1].training) == (other[0], other[1].training)
    for mine, other in zip(by_code.named_parameters(), by_policy.named_parameters(), strict=True):
        assert (mine[0], mine[1].requires_grad) == (other[0], other[1].requires_grad)


def test_printed_load_line_works(tmp_path, capsys):
    target = tmp_path / "out.pt"
    assert main(["freeze", str(SAMPLES / "digits_training.pt"), "-o", str(target)]) == 0
    out = capsys.readouterr().out
    code = out[out.index("    import torch") :]
    exec(textwrap.dedent(code), {"model": _digits_net()})
    assert main(["freeze", str(SAMPLES / "digits.pt"), "-o", str(target), "--force", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def _digits_net():
    sys.path.insert(0, str(SAMPLES))
    try:
        import digits_net

        return digits_net.build()
    finally:
        sys.path.remove(str(SAMPLES))
        sys.modules.pop("digits_net", None)


def test_imports_neither_torch_nor_numpy(tmp_path):
    loaded = programs.list_loaded("freeze", SAMPLES / "digits.pt", "-o", tmp_path / "out.pt", "--quiet")
    assert not {"torch", "numpy", "rich"} & loaded
