"""Small .pt2 files as torch.export wrote them before torch 2.8, and what torch finds in them.

Without an argument it holds tests/fixtures/exported/ against this torch, and lets it run what bntool wrote of the
file; with --record it writes the file of this torch and its answers anew. The scripts beside it do so with others.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.places import FIXTURES

REQUIREMENTS = ["torch==2.5.1", "numpy==1.26.4"]
FOLDER = FIXTURES / "exported"


def build() -> Any:
    """Conv, BatchNorm (eps and momentum of its own), ReLU, linear head, and a buffer that no state dict has."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, bias=False)
            self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
            self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
            self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)

        def forward(self, x: Any) -> Any:
            return self.head(self.bn(self.conv(x))) * self.scale

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net(torch.randn(8, 1, 6, 6) + 1)
    return net.eval()


def data() -> Any:
    import torch

    return torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6)


def record(path: Path) -> None:
    import torch

    options: dict[str, Any] = {}
    if not torch.__version__.startswith("2.1"):
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)  # bounded by infinity, which JSON has not
    program = torch.export.export(build(), (data(),), **options)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of the machine
    torch.export.save(program, path)


def describe(path: Path) -> dict[str, Any]:
    """The tensors of a file and what it computes, as this torch loads it."""
    import torch

    program = torch.export.load(path)
    tensors = {
        name: [str(t.dtype).removeprefix("torch."), list(t.shape), isinstance(t, torch.nn.Parameter), digest(t)]
        for name, t in program.state_dict.items()
    }
    with torch.no_grad():
        return {"tensors": tensors, "outputs": program.module()(data()).tolist()}


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def find_faults_of_rewriting(path: Path) -> list[str]:
    """What torch finds wrong in a file to which bntool gave other statistics."""
    import torch

    from bntool.checkpoints.application import apply_plan
    from bntool.checkpoints.formats import open_checkpoint
    from bntool.checkpoints.saving import save_checkpoint
    from bntool.plan import Operation, Plan, Record, SetTensor, Values

    mean, net, faults = (0.5, -1.0, 2.0, 0.25), build(), []
    net.bn.running_mean.copy_(torch.tensor(mean))
    for name, history in {"in_place.pt2": (), "recorded.pt2": (Record({"n": 1}),)}.items():
        with open_checkpoint(path) as checkpoint:
            mean_name = next(n for n in checkpoint.state_dict("").tensors if n.endswith("bn.running_mean"))
            steps = (SetTensor(mean_name, Values(mean, (4,))), *history)
            save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps)), Path(name))
        extra = {"bntool.json": ""} if history else {}
        program = torch.export.load(name, extra_files=extra)
        with torch.no_grad():
            if not torch.allclose(program.module()(data()), net(data()), atol=1e-6):
                faults.append(f"{path.name}: {name} computes something else")
        if extra and json.loads(extra["bntool.json"]) != {"": [{"n": 1}]}:
            faults.append(f"{path.name}: the record of {name} is not where torch finds extra files")
    return faults


def main() -> int:
    """Record, or compare."""
    import torch

    warnings.simplefilter("ignore")
    path, recorded = FOLDER / f"torch_{torch.__version__.split('+')[0]}.pt2", FOLDER / "expected.json"
    expected = json.loads(recorded.read_text()) if recorded.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        if "--record" in sys.argv:
            FOLDER.mkdir(exist_ok=True)
            record(path)
            expected[path.name] = describe(path)
            recorded.write_text(json.dumps(dict(sorted(expected.items())), indent=1) + "\n")
            return 0
        faults = [] if describe(path) == expected[path.name] else [f"{path.name} holds something else"]
        faults += find_faults_of_rewriting(path)
        os.chdir(FOLDER)
    print("\n".join(faults) or f"{path.name} holds what was recorded, and runs as bntool rewrites it")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
