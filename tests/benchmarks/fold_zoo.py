"""Fold every architecture of torchvision and timm, with random statistics, and judge the result in float64.

    python -m tests.benchmarks.fold_zoo --sample 40
    python -m tests.benchmarks.fold_zoo --names torchvision:resnet18 densenet* --verbose

Needs timm and torchvision beside what the tests need. Prints one line for each model and the totals: how many BatchNorm
layers are folded, how many are skipped for which reason, and how many models are wrong. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from bntool.errors import BntoolError
from bntool.graphs.calling import call
from bntool.graphs.inputs import find_input
from bntool.graphs.traced import trace
from bntool.layers.application import apply_plan, read_state
from bntool.layers.modules import find_batchnorm_modules
from bntool.operations.folding import plan_fold
from bntool.operations.verification import measure_rounding

SIZES = (64, 96, 128, 224, 256, 299, 384, 512)
LARGEST = 60_000_000  # parameters
DETECTORS = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "ssd", "fcos", "deeplab", "fcn", "lraspp")
PATIENCE = 90  # seconds for a model
WRONG = 1e-9  # relative error in float64 beyond which it is held against the model's own amplification of rounding
Factory = Callable[[], nn.Module]


def import_torchvision() -> None:
    """Import torchvision also where its compiled operations do not fit the installed torch."""
    original = torch.library.register_fake

    def skip_torchvision(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return original(op, *args, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = original


def architectures() -> Iterator[tuple[str, Factory]]:
    import_torchvision()
    import timm
    import torchvision

    for name in torchvision.models.list_models():
        yield f"torchvision:{name}", lambda name=name: _torchvision_model(name)
    for name in timm.list_models():
        yield f"timm:{name}", lambda name=name: timm.create_model(name, pretrained=False)


def _torchvision_model(name: str) -> nn.Module:
    import torchvision

    options = {"weights": None}
    if name.startswith(DETECTORS):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, **options)


def randomise(model: nn.Module, seed: int) -> None:
    """Statistics, scales and shifts of every BatchNorm: of both signs, some tiny, none harmless."""
    generator = torch.Generator().manual_seed(seed)
    for module in find_batchnorm_modules(model).values():
        tensors = {**module._parameters, **module._buffers}
        if tensors.get("running_var") is None:
            continue
        size = tensors["running_var"].shape
        sign = torch.where(torch.rand(size, generator=generator) < 0.2, -1.0, 1.0)
        weight = (0.5 + torch.rand(size, generator=generator)) * sign
        weight[torch.rand(size, generator=generator) < 0.05] = 1e-6
        with torch.no_grad():
            tensors["running_mean"].copy_(torch.randn(size, generator=generator) * 0.3)
            tensors["running_var"].copy_(0.5 + torch.rand(size, generator=generator))
            if tensors.get("weight") is not None:
                tensors["weight"].copy_(weight)
            if tensors.get("bias") is not None:
                tensors["bias"].copy_(torch.randn(size, generator=generator) * 0.3)


def find_zoo_input(model: nn.Module):
    with torch.no_grad():
        for size in SIZES:
            inputs = torch.randn(2, 3, size, size, dtype=torch.float64)
            try:
                call(model, inputs)
            except BntoolError:
                continue
            return inputs
    return find_input(model)


def judge(make: Factory, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    try:
        with torch.device("meta"):
            probe = make()
    except (NotImplementedError, ValueError):  # it looks at elements while it is built
        probe = make()
    if sum(p.numel() for p in probe.parameters()) > LARGEST:
        return {"status": "too large"}
    if not find_batchnorm_modules(probe):
        return {"status": "no BatchNorm"}
    model = make().double().eval()
    randomise(model, seed)
    total = len(find_batchnorm_modules(model))
    inputs = find_zoo_input(model)
    started = time.perf_counter()
    graph = trace(model, inputs)
    traced = time.perf_counter() - started
    plan = plan_fold(read_state(model), graph)
    folded = copy.deepcopy(model)
    apply_plan(folded, plan)
    others = [inputs, torch.randn_like(inputs)]
    error = 0.0
    with torch.no_grad():
        for one in others:
            for a, b in zip(_flat(model(one)), _flat(folded(one)), strict=True):
                error = max(error, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    reasons = Counter(skip.reason.value for skip in plan.skips)
    levels = Counter(fold.level.value + ("/stays" if fold.stays else "") for fold in plan.folds)
    wrong = not error < WRONG and not error < min(16 * measure_rounding(model, others), 1e-2)
    return {
        "status": "wrong" if wrong else "ok",
        "total": total,
        "folded": len(plan.folds),
        "levels": dict(levels),
        "reasons": dict(reasons),
        "skips": [f"{s.layer}: {s.reason.value}: {s.detail}" for s in plan.skips],
        "error": error,
        "traced": traced,
    }


def _flat(output) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_flatten

    return [t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]


class GaveUp(BaseException):
    """Not an Exception: models catch those."""


def _give_up(*_: object) -> None:
    raise GaveUp(f"took longer than {PATIENCE} seconds")


def run() -> None:
    """A sample of 40, where the packages are installed."""
    if not (importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision")):
        print("fold_zoo needs timm and torchvision")
        return
    main(["--sample", "40"])


def main(arguments: Sequence[str] | None = None) -> None:  # noqa: C901 a script
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many models, drawn by chance")
    parser.add_argument("--names", nargs="*", help="only these models; with * at the end all that contain the rest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every skip")
    parser.add_argument("--json", help="write all results to this file")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _give_up)
    torch.set_num_threads(1)
    models = dict(architectures())
    if options.names:
        wanted = options.names
        models = {
            n: make for n, make in models.items() if n in wanted or any(p[-1:] == "*" and p[:-1] in n for p in wanted)
        }
    names = list(models)
    if options.sample:
        names = random.Random(options.seed).sample(names, min(options.sample, len(names)))
    results, totals, reasons, levels = {}, Counter(), Counter(), Counter()
    for name in names:
        signal.alarm(PATIENCE)
        try:
            result = judge(models[name], options.seed)
        except (Exception, GaveUp) as error:
            result = {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        finally:
            signal.alarm(0)
        results[name] = result
        totals[result["status"]] += 1
        if "total" in result:
            totals["BatchNorms"] += result["total"]
            totals["folded"] += result["folded"]
            reasons.update(result["reasons"])
            levels.update(result["levels"])
        if result["status"] != "no BatchNorm":
            counts = f"{result.get('folded', '')}/{result.get('total', '')}"
            facts = f"{result.get('error', '')} {result.get('reasons', '')}"
            print(f"{name:50} {result['status']:10} {counts:10} {facts}", flush=True)
        if options.verbose:
            for skip in result.get("skips", ()):
                print("    " + skip)
    print(dict(totals))
    if totals["BatchNorms"]:
        print(f"folded {totals['folded'] / totals['BatchNorms']:.2%}; by level {dict(levels)}; skipped {dict(reasons)}")
    if options.json:
        with open(options.json, "w") as stream:
            json.dump(results, stream, indent=1)


if __name__ == "__main__":
    main()
