"""Deploy forms, held against what timm's reparameterize_model and ultralytics' fuse() make.

Needs an environment of its own. Each model has random statistics, 30 % of its scales negative. From the live model, and
of timm from a bare file too, the fold must have the keys and shapes of the library's own form, be loaded into it
strictly, be near its elements, and compute in float64 what the original computes.

    python -m tests.oracles.deploy_forms --speed

measures instead how much faster these forms are, original and form in turn on one core.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from torch import nn

import bntool
from bntool.errors import BntoolError
from bntool.folding.speed import measure_speed
from bntool.modules.finding import find_batchnorm_modules
from tests.benchmarks.zoo_models import randomise

REQUIREMENTS = ["torch==2.13.0", "torchvision==0.28.0", "timm==1.0.31", "ultralytics==8.4.190", "numpy"]
FORMS = (
    "repvgg_a0",
    "mobileone_s0",
    "fastvit_t8",
    "fastvit_sa12",
    "fastvit_mci0",
    "repghostnet_050",
    "ghostnetv3_050",
    "lcnetv2_small",
    "repvit_m0_9",
    "iformer_t",
    "levit_128s",
    "tiny_vit_5m_224",
    "efficientvit_m0",
    "shvit_s1",
)
LIVE_ONLY = ("nextvit_small",)  # its deploy form only folds forward, and no file says so
YOLO = ("yolov8n.yaml", "yolov9t.yaml", "yolo11n.yaml")
_SIZES = {"levit_128s": 224, "tiny_vit_5m_224": 224}
_USUAL_SIZE = 96


def make_model(name: str) -> nn.Module:
    if name in YOLO:
        from ultralytics.nn.tasks import DetectionModel

        model = DetectionModel(name, nc=3, verbose=False)
    else:
        model = timm.create_model(name)
    randomise(model, 0, negative=0.3)
    for module in model.modules():  # 1e-5 at the beginning, which would hide what it scales
        gamma = getattr(module, "gamma", None)
        if isinstance(gamma, nn.Parameter):
            nn.init.uniform_(gamma, -1, 1)
    return model.eval()


def make_own_form(model: nn.Module) -> nn.Module:
    """What the library makes of a copy."""
    if type(model).__name__ == "DetectionModel":
        return copy.deepcopy(model).fuse(verbose=False)
    return timm.utils.reparameterize_model(model)


def make_image(name: str, batch: int, dtype: torch.dtype) -> torch.Tensor:
    size = _SIZES.get(name, _USUAL_SIZE)
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def list_shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def compare(name: str, model: nn.Module, form: nn.Module, own: dict[str, torch.Tensor]) -> tuple[float, float]:
    """How far outputs are from the original's in float64, and elements from the library's: of the largest of each."""
    state = form.state_dict()
    off = [
        float((state[key] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12))
        for key, tensor in own.items()
        if tensor.is_floating_point()
    ]
    image = make_image(name, 2, torch.float64)
    with torch.no_grad():
        pairs = list(zip(*(_flatten(net.double()(image)) for net in (model, form)), strict=True))
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs), max(off)


def _flatten(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for part in parts for tensor in _flatten(part)]


def check(name: str) -> Iterator[str]:
    """What is wrong with the deploy form of a model; nothing where all is well."""
    model = make_model(name)
    own = make_own_form(model).state_dict()
    result = bntool.fold(model, make_image(name, 2, torch.float32), layout="deploy")
    if list_shapes(result.model.state_dict()) != list_shapes(own):
        yield "other keys or shapes than the library's"
        return
    assert result.report is not None
    error, off = compare(name, copy.deepcopy(model), result.model, own)
    total, stay = len(find_batchnorm_modules(model)), len(result.plan.skips)
    norms = f"{len(result.plan.folds)} of {total} BatchNorms, {stay} stay"
    print(
        f"{name}: {norms}; in float64 {result.report.exact:.1e}; as stored {error:.1e}; off the library's {off:.1e}",
        flush=True,
    )
    if result.report.exact > 1e-12 or error > 1e-6 or off > 1e-5:
        yield "it computes something else"
    if name not in FORMS:
        return
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "bare.pth", Path(folder) / "deploy.pth"
        torch.save(model.state_dict(), path)
        bntool.fold_checkpoint(path, output, layout="deploy", architecture=f"timm:{name}")
        form = make_own_form(make_model(name))
        form.load_state_dict(torch.load(output))
    error, off = compare(name, model, form, own)
    print(f"{name}: from a bare file as stored {error:.1e}; off the library's {off:.1e}", flush=True)
    if error > 1e-6 or off > 1e-5:
        yield "the bare file computes something else"


def measure(name: str) -> None:
    model, image = make_model(name), torch.randn(1, 3, 224, 224)
    form = bntool.fold(model, image, layout="deploy").model
    folded = bntool.fold(model, image).model
    texts = []
    for label, other in (("deploy", form), ("folded", folded)):
        cpu = measure_speed(model, other, image).cpu
        texts.append(f"{label} {cpu.ratio:.2f} ({cpu.low:.2f} to {cpu.high:.2f})")
    print(f"{name}: {'; '.join(texts)} times as fast", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    failed = 0
    for name in options.names or [*FORMS, *LIVE_ONLY, *YOLO]:
        if options.speed:
            measure(name)
            continue
        try:
            problems = list(check(name))
        except BntoolError as error:
            problems = [str(error)]
        failed += bool(problems)
        for problem in problems:
            print(f"{name}: WRONG: {problem}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
