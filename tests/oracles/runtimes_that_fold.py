"""Which BatchNorms torch.onnx.export and ONNX Runtime fold by themselves; recorded for docs/folding.md.

Each network is exported without optimisation, so that ONNX Runtime sees every BatchNormalization, and as
``torch.onnx.export`` does by default. ONNX Runtime writes what it would run (``optimized_model_filepath``), and the
BatchNormalization nodes are counted. Without an argument the recorded counts are held against the packages; with
--record they are written.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tests.places import INTEROP

REQUIREMENTS = ["torch==2.13.0", "onnx==1.23.2", "onnxruntime==1.31.1", "onnxscript==0.7.2", "numpy"]
RECORDED = INTEROP / "runtimes_that_fold.json"


def conv(x, m):
    return m.bn(m.conv(x))


def depthwise(x, m):
    return m.bn(m.depthwise(x))


def transposed(x, m):
    return m.bn(m.transposed(x))


def transposed_groups(x, m):
    return m.bn(m.transposed_groups(x))


def linear(x, m):
    return m.bn1d(m.linear(x.flatten(1)))


def concatenation(x, m):
    return m.bn8(torch.cat([m.conv(x), m.other(x)], 1))


def addition(x, m):
    return m.bn(m.conv(x) + m.other(x))


def split(x, m):
    return m.bn(m.wide(x).chunk(2, 1)[0])


def average(x, m):
    return m.bn(F.avg_pool2d(m.conv(x), 2))


def into_the_next(x, m):
    return m.unpadded(m.bn(F.relu(x)))


def into_the_head(x, m):
    return m.head(m.bn(F.relu(x)).mean((2, 3)))


def norm_on_norm(x, m):
    return m.bn2(m.bn(F.relu(x)))


def activation_between(x, m):
    return m.bn(F.relu(m.conv(x)))


def shared_output(x, m):
    y = m.conv(x)
    return m.bn(y) + y


CASES = (conv, depthwise, transposed, transposed_groups, linear, concatenation, addition, split, average, into_the_next,
         into_the_head, norm_on_norm, activation_between, shared_output)  # fmt: skip


class Case(nn.Module):
    def __init__(self, compute) -> None:
        super().__init__()
        modules = {
            "conv": nn.Conv2d(4, 4, 3, padding=1),
            "other": nn.Conv2d(4, 4, 3, padding=1),
            "wide": nn.Conv2d(4, 8, 3, padding=1),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "transposed_groups": nn.ConvTranspose2d(4, 4, 3, groups=2),
            "unpadded": nn.Conv2d(4, 5, 3),
            "linear": nn.Linear(4 * 36, 4),
            "head": nn.Linear(4, 3),
            "bn": nn.BatchNorm2d(4),
            "bn2": nn.BatchNorm2d(4),
            "bn8": nn.BatchNorm2d(8),
            "bn1d": nn.BatchNorm1d(4),
        }
        for name in compute.__code__.co_names:
            if name in modules:
                self.add_module(name, modules[name])
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x, self)


def count(path: Path) -> int:
    import onnx

    return sum(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)


def run_optimiser(path: Path, model: nn.Module, x: torch.Tensor) -> int:
    """How many are left of them when ONNX Runtime runs the file, and that it runs it right."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # the level above changes layouts for the CPU at hand, and there makes what is left into depthwise convolutions
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5 * float(expected.abs().max())), "wrong outputs"
    return count(Path(options.optimized_model_filepath))


def judge(compute, folder: Path) -> dict[str, int]:
    from bntool import fold
    from tests.folding.folding_networks import randomise

    model = randomise(Case(compute))
    x = torch.randn(2, 4, 6, 6)
    found = {"model": sum(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in model.modules())}
    torch.onnx.export(model, (x,), folder / "plain.onnx", dynamo=True, optimize=False, verbose=False)
    assert count(folder / "plain.onnx") == found["model"]
    found["onnxruntime"] = run_optimiser(folder / "plain.onnx", model, x)
    torch.onnx.export(model, (x,), folder / "default.onnx", dynamo=True, verbose=False)
    found["torch.onnx"] = count(folder / "default.onnx")
    torch.onnx.export(model, (x,), folder / "script.onnx", dynamo=False)
    found["torch.onnx, dynamo=False"] = count(folder / "script.onnx")
    found["torch.onnx, then onnxruntime"] = run_optimiser(folder / "default.onnx", model, x)
    folded = fold(model, x)
    assert folded.report is None or folded.report.exact < 1e-12
    found["bntool"] = len(folded.plan.skips)
    return found


def main() -> int:
    """Count for every case; hold the counts against the recorded ones, or record them."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    counts = {}
    for compute in CASES:
        with tempfile.TemporaryDirectory() as folder:
            counts[compute.__name__] = judge(compute, Path(folder))
        print(compute.__name__, counts[compute.__name__])
    if "--record" in sys.argv:
        versions = {requirement.partition("==")[0]: requirement.partition("==")[2] for requirement in REQUIREMENTS[:4]}
        RECORDED.write_text(json.dumps({"versions": versions, "batchnorms left": counts}, indent=1) + "\n")
        return 0
    same = json.loads(RECORDED.read_text())["batchnorms left"] == counts
    print(f"{len(counts)} networks: {'as recorded' if same else 'NOT as recorded'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
