"""What other tools make of networks whose fold is not allowed; recorded in tests/fixtures/interop/folding_tools.json.

Each tool gets each network in eval mode; what it gives back is run by torch, onnxruntime or OpenCV and held against the
original. Without an argument the record is held against the tools; with --record it is written.
"""

from __future__ import annotations

import copy
import io
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.places import INTEROP

REQUIREMENTS = [
    *("torch==2.13.0", "torchvision==0.28.0", "timm==1.0.31", "onnx==1.23.2", "onnxruntime==1.31.1", "onnxsim==0.8.1"),
    *("onnxslim==0.1.98", "mmcv-lite==2.1.0", "mmengine==0.10.7", "opencv-python-headless<5", "aimet-torch==2.42.0"),
]
RECORDED = INTEROP / "folding_tools.json"
WRONG = 1e-3  # of the largest output, in float32
C = 6
Network = tuple[nn.Module, torch.Tensor]
CASES: dict[str, Callable[[], Network]] = {}


def net(forward: Callable[..., torch.Tensor], **layers: nn.Module) -> nn.Module:
    """A network of layers in the order in which they are given, of a class of its own, as tracers want it."""
    made: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        made.add_module(name, layer)
    return made


class CannotRun(Exception):
    """A tool does not run the network even where it folds nothing."""


class BatchStatistics(nn.BatchNorm2d):
    """As in test-time adaptation: normalises by the batch in eval mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def case(title: str) -> Callable[[Callable[[], Network]], Callable[[], Network]]:
    def register(build: Callable[[], Network]) -> Callable[[], Network]:
        CASES[title] = build
        return build

    return register


def conv(channels: int = C) -> nn.Conv2d:
    return nn.Conv2d(channels, C, 3, padding=1)


def norm(kind: type[nn.Module] = nn.BatchNorm2d, **options: Any) -> Any:
    """With statistics and scales of both signs."""
    layer: Any = kind(C, **options)
    with torch.no_grad():
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 3)
        layer.weight.copy_(torch.randn(C) + torch.tensor([1.5, -1.5] * (C // 2)))
        layer.bias.normal_()
    return layer


def image() -> torch.Tensor:
    return torch.randn(2, C, 8, 8)


def simple(forward: Callable[..., torch.Tensor], **more: nn.Module) -> Network:
    return net(forward, conv=conv(), bn=norm(), **more), image()


@case("nothing in the way: `bn(conv(x))`")
def direct() -> Network:
    return simple(lambda self, x: self.bn(self.conv(x)))


@case("shared output: `y = conv(x); bn(y) + y`")
def shared() -> Network:
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y

    return simple(forward)


@case("shared output: two BNs read one conv")
def two_norms() -> Network:
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * self.bn2(y)

    return simple(forward, bn2=norm())


@case("reused: the conv is called twice")
def called_twice() -> Network:
    return simple(lambda self, x: self.bn(self.conv(self.conv(x))))


@case("reused: the BN is called on two convs")
def norm_called_twice() -> Network:
    return simple(lambda self, x: self.bn(self.conv(x)) + self.bn(self.conv2(x)), conv2=conv())


@case("reused: two convs share a weight")
def tied() -> Network:
    def forward(self, x):
        return self.bn(self.conv(x)) + F.relu(F.conv2d(x, self.conv.weight, padding=1))

    return simple(forward)


@case("not adjacent: `bn(relu(conv(x)))`")
def activation() -> Network:
    return simple(lambda self, x: self.bn(self.relu(self.conv(x))), relu=nn.ReLU())


@case("not adjacent: a max-pool between, scales of both signs")
def pool() -> Network:
    return simple(lambda self, x: self.bn(self.pool(self.conv(x))), pool=nn.MaxPool2d(2))


@case("order of registration: `conv(relu(bn(x)))`")
def pre_activation() -> Network:
    return simple(lambda self, x: self.conv(torch.relu(self.bn(x))))


@case("axis mismatch: Linear, then BatchNorm1d on (N, L, C)")
def axis() -> Network:
    made = net(lambda self, x: self.bn(self.fc(x)), fc=nn.Linear(5, C), bn=norm(nn.BatchNorm1d))
    return made, torch.randn(2, C, 5)


@case("no statistics: `track_running_stats=False`")
def no_statistics() -> Network:
    return net(lambda self, x: self.bn(self.conv(x)), conv=conv(), bn=norm(track_running_stats=False)), image()


@case("the BN normalises by batch statistics in eval mode too")
def by_batch() -> Network:
    return net(lambda self, x: self.bn(self.conv(x)), conv=conv(), bn=norm(BatchStatistics)), image()


@case("InstanceNorm in place of a BN")
def instance() -> Network:
    layer = norm(nn.InstanceNorm2d, affine=True, track_running_stats=False)
    return net(lambda self, x: self.bn(self.conv(x)), conv=conv(), bn=layer), image()


@case("computed weight: spectral norm")
def computed() -> Network:
    layer = nn.utils.parametrizations.spectral_norm(conv())
    return net(lambda self, x: self.bn(self.conv(x)), conv=layer, bn=norm()), image()


@case("quantised: the weight is fake-quantised (`torch.ao.nn.qat.Conv2d`)")
def quantised() -> Network:
    from torch.ao.nn.qat import Conv2d
    from torch.ao.quantization import default_qat_qconfig

    layer = Conv2d(C, C, 3, padding=1, qconfig=default_qat_qconfig)
    layer(image())
    layer.apply(torch.ao.quantization.disable_observer)
    return net(lambda self, x: self.bn(self.conv(x)), conv=layer, bn=norm()), image()


@case("grouped ConvTranspose2d")
def transposed() -> Network:
    layer = nn.ConvTranspose2d(C, C, 3, groups=2)
    return net(lambda self, x: self.bn(self.conv(x)), conv=layer, bn=norm()), image()


@case("timm's BatchNormAct2d, whose activation must stay")
def combined() -> Network:
    from timm.layers import BatchNormAct2d

    return net(lambda self, x: self.bn(self.conv(x)), conv=conv(), bn=norm(BatchNormAct2d)), image()


# the tools: each gives a folded model and how many BatchNorms it has left, or raises


def count(model: nn.Module) -> int:
    """Modules that still normalise; fx keeps what BatchNormAct2d calls as a plain function."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    functions = sum("batch_norm" in str(node.target) for node in getattr(getattr(model, "graph", None), "nodes", ()))
    if isinstance(model, torch.fx.GraphModule):
        used = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
        return functions + sum(isinstance(m, kinds) and name in used for name, m in model.named_modules())
    return sum(isinstance(module, kinds) for module in model.modules())


def by_bntool(model: nn.Module, inputs: torch.Tensor) -> tuple[Any, int]:
    from bntool.folding.live import fold

    result = fold(model, inputs)
    return result.model, len(result.plan.skips)


def by_fx(model: nn.Module, inputs: torch.Tensor) -> tuple[Any, int]:
    from torch.fx.experimental.optimization import fuse

    folded = fuse(model)
    return folded, count(folded)


def by_fuse_modules(model: nn.Module, inputs: torch.Tensor) -> tuple[Any, int]:
    """The user names the pairs, here by what names suggest."""
    from torch.ao.quantization import fuse_modules

    producer = "fc" if hasattr(model, "fc") else "conv"
    folded = fuse_modules(model, [[producer, "bn"]])
    return folded, count(folded)


def by_mmcv(model: nn.Module, inputs: torch.Tensor) -> tuple[Any, int]:
    from mmcv.cnn.utils.fuse_conv_bn import fuse_conv_bn

    folded = fuse_conv_bn(model)
    return folded, count(folded)


def by_aimet(model: nn.Module, inputs: torch.Tensor) -> tuple[Any, int]:
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    fold_all_batch_norms(model, tuple(inputs.shape), dummy_input=inputs)
    return model, count(model)


def export(model: nn.Module, inputs: torch.Tensor) -> Any:
    """An ONNX model in which every BatchNorm still is: the exporter would fold direct pairs itself."""
    import onnx

    stream = io.BytesIO()
    options = {"dynamo": False, "training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    try:
        torch.onnx.export(model, (inputs,), stream, opset_version=17, input_names=["x"], **options)
    except torch.onnx.errors.OnnxExporterError as error:
        raise CannotRun from error
    return onnx.load_from_string(stream.getvalue())


def run_onnx(onnx_model: Any) -> tuple[Any, int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(onnx_model.SerializeToString(), options)
    left = sum(node.op_type == "BatchNormalization" for node in onnx_model.graph.node)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), left


def by_onnxsim(model: nn.Module, inputs: torch.Tensor) -> tuple[Any, int]:
    import onnxsim

    return run_onnx(onnxsim.simplify(export(model, inputs))[0])


def by_onnxslim(model: nn.Module, inputs: torch.Tensor) -> tuple[Any, int]:
    import onnxslim

    return run_onnx(onnxslim.slim(export(model, inputs)))


def by_opencv(model: nn.Module, inputs: torch.Tensor) -> tuple[Any, int | None]:
    """OpenCV folds while it loads and does not say what."""
    import cv2

    data = np.frombuffer(export(model, inputs).SerializeToString(), np.uint8)

    def run(x: torch.Tensor, *, fuse: bool = True) -> torch.Tensor:
        loaded = cv2.dnn.readNetFromONNX(data)
        loaded.enableFusion(fuse)
        loaded.setInput(x.numpy())
        return torch.from_numpy(loaded.forward())

    try:
        plain = run(inputs, fuse=False)
    except cv2.error as error:
        raise CannotRun from error
    if not measure(model(inputs), plain) < WRONG:
        raise CannotRun
    return run, None


TOOLS: dict[str, Callable[[nn.Module, torch.Tensor], tuple[Any, int | None]]] = {
    "bntool": by_bntool,
    "torch.fx fuse": by_fx,
    "fuse_modules": by_fuse_modules,
    "mmcv": by_mmcv,
    "AIMET": by_aimet,
    "onnxsim": by_onnxsim,
    "onnxslim": by_onnxslim,
    "OpenCV": by_opencv,
}


def measure(wanted: torch.Tensor, given: torch.Tensor) -> float:
    return float((wanted - given).abs().max() / wanted.abs().max())


def judge(tool: str, title: str) -> str:
    """``folds``, ``leaves it``, ``right`` (it does not say what it folds), ``wrong (ERROR)``, ``raises NAME`` or so."""
    torch.manual_seed(0)
    model, inputs = CASES[title]()
    model.eval()
    with torch.no_grad():
        expected = [model(x) for x in (inputs, 2 * inputs)]
        before = count(model)
        try:
            folded, left = TOOLS[tool](copy.deepcopy(model), inputs)
            found = [folded(x) for x in (inputs, 2 * inputs)]
        except CannotRun:
            return "cannot run it"
        except Exception as error:
            return f"raises {type(error).__name__}"
    error = max(measure(a, b) for a, b in zip(expected, found, strict=True))
    if not error < WRONG:
        return f"wrong ({error:.1g})"
    return "right" if left is None else "folds" if left < before else "leaves it"


def main(arguments: list[str]) -> int:
    from tests.benchmarks.zoo_models import import_torchvision

    warnings.simplefilter("ignore")
    import_torchvision()
    found = {title: {tool: judge(tool, title) for tool in TOOLS} for title in CASES}
    if "--record" in arguments:
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    recorded = json.loads(RECORDED.read_text())
    differing = [
        f"{title}, {tool}: {recorded.get(title, {}).get(tool)!r} is recorded, {answer!r} is found"
        for title, answers in found.items()
        for tool, answer in answers.items()
        if recorded.get(title, {}).get(tool) != answer
    ]
    print("\n".join(differing) or f"{len(found)} networks, {len(TOOLS)} tools: as recorded")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
