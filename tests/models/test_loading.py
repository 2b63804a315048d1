"""Model specs, and what the user's code may do wrong."""

import sys
import warnings

import pytest
import torch

from bntool.errors import MissingExtraError, RefusedError, UsageError, UserCodeError
from bntool.models.assignments import parse_assignments
from bntool.models.exported import check_has_layers
from bntool.models.loading import load_model, parse_value
from bntool.models.user_code import find_user_line
from tests.places import SAMPLES


@pytest.fixture
def write(tmp_path):
    """Write a Python file of the user's, under a name that no other test uses."""

    def write_file(name, code):
        path = tmp_path / f"{name}.py"
        path.write_text(code)
        return path

    yield write_file
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_factory_of_a_file():
    model = load_model(f"{SAMPLES / 'digits_net.py'}:build", arguments={})
    assert type(model).__name__ == "DigitsNet"
    assert sys.modules["digits_net"].DigitsNet is type(model)


def test_arguments_are_literals_or_strings():
    model = load_model(f"{SAMPLES / 'digits_net.py'}:DigitsNet", arguments={"width": "4"})
    assert model.conv1.out_channels == 4
    assert [parse_value(text) for text in ("1e-3", "True", "[1, 2]", "None", "relu", "a b")] == [
        1e-3,
        True,
        [1, 2],
        None,
        "relu",
        "a b",
    ]


def test_assignments():
    assert parse_assignments(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_assignments(["a"])


def test_a_factory_of_a_module():
    model = load_model("torch.nn:BatchNorm2d", arguments={"num_features": "3", "eps": "1e-3"})
    assert isinstance(model, torch.nn.BatchNorm2d)
    assert model.eps == 1e-3


def test_a_file_finds_its_siblings_and_the_path_is_given_back(write):
    write("sibling_of_model", "WIDTH = 5")
    path = write(
        "model_with_sibling", "import torch\nimport sibling_of_model\nnet = torch.nn.Linear(sibling_of_model.WIDTH, 1)"
    )
    before = list(sys.path)
    assert load_model(f"{path}:net", arguments={}).in_features == 5
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "can be: "),
        ("model.py", "model.py:NAME"),
        ("absent.py:build", "no such file"),
        ("no_such_package.models:build", "no module 'no_such_package'"),
        ("math:pi", "neither a module nor callable"),
        ("math:nothing_like_it", "has no 'nothing_like_it'"),
        ("builtins:list", "returned list"),
        ("absent.pt2", "no such file"),
        ("mmdet:absent.py", "no such config"),
    ],
)
def test_specs_that_cannot_be_understood(spec, message):
    with pytest.raises(UsageError, match=message):
        load_model(spec, arguments={})


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18"])
def test_missing_packages_are_named(spec, monkeypatch):
    package = spec.partition(":")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"pip install {package}"):
        load_model(spec, arguments={})


def test_unknown_arguments_are_a_usage_error():
    with pytest.raises(UsageError, match="unexpected keyword argument 'width'"):
        load_model(f"{SAMPLES / 'digits_net.py'}:build", arguments={"width": "8"})


def test_a_name_that_is_not_there_lists_what_is():
    with pytest.raises(UsageError, match="BasicBlock, DigitsNet, build"):
        load_model(f"{SAMPLES / 'digits_net.py'}:built", arguments={})


@pytest.mark.parametrize("raised", ["ValueError('bad width')", "SystemExit(3)", "RuntimeError('bad\\nwidth')"])
def test_what_the_users_code_raises_is_named_with_its_line(write, raised):
    path = write("raising_model", f"def build():\n    inner()\n\ndef inner():\n    raise {raised}\n")
    with pytest.raises(UserCodeError, match=r"raising_model\.py:5") as caught:
        load_model(f"{path}:build", arguments={})
    assert "\n" not in str(caught.value)
    assert type(caught.value.__cause__).__name__ == raised.partition("(")[0]


def test_what_importing_raises(write):
    path = write("unimportable_model", "x = 1\nimport a_package_that_is_not_there\n")
    with pytest.raises(UserCodeError, match=r"unimportable_model\.py:2"):
        load_model(f"{path}:build", arguments={})
    assert "unimportable_model" not in sys.modules


def test_a_syntax_error_is_named_with_its_line(write):
    path = write("misspelt_model", "x = 1\ny = = 2\n")
    with pytest.raises(UserCodeError, match=r"misspelt_model\.py:2"):
        load_model(f"{path}:build", arguments={})


def test_an_error_inside_torch_is_blamed_on_the_users_line(write):
    path = write("shapes_model", "import torch\ndef build():\n    torch.zeros(2) @ torch.zeros(3)\n")
    with pytest.raises(UserCodeError, match=r"shapes_model\.py:3"):
        load_model(f"{path}:build", arguments={})
    assert find_user_line(ValueError("never raised")) == ""


def test_an_exported_program_runs(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3),)), tmp_path / "net.pt2")
    loaded = load_model(str(tmp_path / "net.pt2"), arguments={})
    x = torch.randn(1, 3)
    torch.testing.assert_close(loaded(x), model(x))


def test_a_plain_checkpoint_is_no_model():
    with pytest.raises(UsageError, match=r"model\.py:build"):
        load_model(str(SAMPLES / "digits.pt"), arguments={})


def test_programs_have_no_layers_to_watch(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    torch.export.save(torch.export.export(model, (torch.zeros(2, 3),)), tmp_path / "net.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(model).save(str(tmp_path / "net.ts"))
    for name, kind in (("net.pt2", "an exported"), ("net.ts", "a TorchScript")):
        spec = str(tmp_path / name)
        with pytest.raises(RefusedError, match=f"{kind} program, whose layers cannot be watched"):
            check_has_layers(load_model(spec, arguments={}), spec)
    check_has_layers(model, "")
    check_has_layers(torch.fx.symbolic_trace(model), "")


def test_a_package_that_cannot_be_imported_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(MissingExtraError, match="is installed but cannot be imported"):
        load_model("torchvision:resnet18", arguments={})
