"""Nets in text: read as Caffe reads them, edited without touching the rest, and put together with their model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.caffe.deployment import FrozenLayer, deploy, find_freezing_edits
from bntool.checkpoints.caffe.prototxt import parse_prototxt, read_prototxt
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.formats import open_checkpoint
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UnsafeFileError, UsageError
from tests.fuzz import mutate, time_limit

NET = """
name: "net"  # a comment { with braces
layer { name: 'conv' type: "Convolution" bottom: "data" top: "conv"
  param { lr_mult: 1 } convolution_param { num_output: 4 pad: 0 pad: 1 group: 0x2 bias_term: false } }
layer <
  name: "bn" "1"; type: "BatchNorm", bottom: "conv" top: "conv"
  param: [{ lr_mult: 1 }, { decay_mult: 1 }]
  batch_norm_param { eps: 1e-3f use_global_stats: false }
>
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "conv" bottom: "label" include { phase: TRAIN } }
layer { name: "accuracy" type: "Accuracy" bottom: "conv" exclude { phase: TEST } }
"""


def test_reads_layers_that_run_in_test() -> None:
    layers = parse_prototxt(NET).layers
    assert [layer.name for layer in layers] == ["conv", "bn1", "scale"]
    assert layers[0].parameters == {
        "convolution_param.num_output": 4, "convolution_param.pad": 1, "convolution_param.group": 2,
        "convolution_param.bias_term": False,
    }  # fmt: skip
    assert layers[1].parameters == {"batch_norm_param.eps": 1e-3, "batch_norm_param.use_global_stats": False}
    assert (layers[2].bottoms, layers[2].tops) == (("conv",), ("conv",))


def freeze_prototxt(net, layers) -> str:
    return net.edited(sorted(find_freezing_edits(net, layers)))


def test_nothing_to_change_changes_nothing() -> None:
    assert parse_prototxt(NET).edited([]) == NET
    assert freeze_prototxt(parse_prototxt(NET), {}) == NET


def test_freezing_sets_switches_and_learning_rates_and_nothing_else() -> None:
    frozen = freeze_prototxt(parse_prototxt(NET), {"bn1": FrozenLayer(statistics=True, affine=True)})
    assert frozen.count("use_global_stats: true") == 1
    before, after = parse_prototxt(NET).layers, parse_prototxt(frozen).layers
    assert [layer.parameters for layer in after][::2] == [layer.parameters for layer in before][::2]
    rates = [[spec.values("lr_mult") for spec in layer.source.all("param")] for layer in after]
    assert rates == [[("1",)], [("0",), ("0",), ("0",)], [("0",), ("0",)]]
    assert "# a comment { with braces" in frozen
    assert freeze_prototxt(parse_prototxt(frozen), {"bn1": FrozenLayer(statistics=True, affine=True)}) == frozen


@pytest.mark.parametrize(
    "text",
    ["layer {", "layer { name: }", 'layer { name: "a }', "layer }", "layer 5", "layer { name: \x01 }", "a: [1, 2", "}"],
)
def test_what_is_no_net_is_corrupt(text: str) -> None:
    with pytest.raises(CorruptFileError, match="line"):
        parse_prototxt(text)


def test_nesting_is_bounded() -> None:
    with pytest.raises(UnsafeFileError, match="nested"):
        parse_prototxt("a {" * 10_000)


def test_damaged_texts_are_refused_or_read() -> None:
    rng = random.Random(3)
    for _ in range(1000):
        text = mutate(NET.encode(), rng, [NET.encode()]).decode("utf-8", errors="backslashreplace")
        try:
            with time_limit(5):
                net = parse_prototxt(text)
                freeze_prototxt(net, {"bn1": FrozenLayer(statistics=True, affine=False)})
        except BntoolError:
            pass


def test_the_eps_of_the_net_wins(fixtures: Path, tmp_path: Path) -> None:
    """As in Caffe: the model's blobs are copied into the net of the .prototxt, its parameters are not."""
    interop = fixtures / "interop"
    for model, net, eps in (("std", "eps1e3", 1e-3), ("eps1e3", "std", 1e-5)):
        with open_checkpoint(interop / f"caffe_tiny_{model}.caffemodel") as checkpoint:
            deployed = deploy(checkpoint, read_prototxt(SourceFile(interop / f"caffe_tiny_{net}.prototxt")))
            (norm,) = find_batchnorms(deployed.state_dict(""))
            assert norm.eps == eps


def test_the_net_of_another_model_is_refused(fixtures: Path) -> None:
    text = (fixtures / "interop" / "caffe_tiny_std.prototxt").read_text()
    with open_checkpoint(fixtures / "interop" / "caffe_tiny_std.caffemodel") as checkpoint:
        with pytest.raises(UsageError, match="another net"):
            deploy(checkpoint, parse_prototxt(text.replace('"bn1"', '"bn9"')))
        with pytest.raises(RefusedError, match="another layer"):
            deploy(checkpoint, parse_prototxt(text.replace('"scale1"', '"scale9"')))
