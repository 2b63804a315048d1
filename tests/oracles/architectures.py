"""The catalogue of architectures, held against torchvision and timm.

Needs an environment of its own. Without an argument: what the shipped catalogue says of a sample of architectures is
what their traces say now; the names, shapes and decisions recorded in tests/fixtures/architectures.json.gz hold
(--record writes them); and bare files of real models with random statistics, folded by the catalogue alone and loaded
back, compute in float64 what the originals compute.

    python -m tests.oracles.architectures --all --results zoo.jsonl --minutes 60

folds every architecture of the catalogue of reasonable size; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import BntoolError
from bntool.folding.loading import load_folded
from bntool.folding.options import FoldOptions
from bntool.folding.planning import plan_fold
from bntool.folding.state_dict import fold_state_dict
from bntool.graphs.architectures.catalogue import load_catalogue
from bntool.graphs.architectures.recognition import recognise
from bntool.modules.finding import find_batchnorm_modules
from catalogue.observing import Observation, add_stand_ins, build_on_meta, observe, trace_model
from tests.benchmarks.fold_zoo import Judgement
from tests.benchmarks.zoo_models import find_zoo_input, list_architectures, order_architectures, randomise
from tests.graphs.architectures.drawn_tensors import draw_state_dict
from tests.places import FIXTURES

REQUIREMENTS = ["torch==2.13.0", "torchvision==0.28.0", "timm==1.0.31", "numpy"]
RECORDED = FIXTURES / "architectures.json.gz"
# recorded for the suite: of each kind of decision some
SAMPLE = (
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:inception_v3",
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:fasterrcnn_resnet50_fpn",
    "timm:resnetv2_50d",
    "timm:tf_efficientnet_b0",
    "timm:efficientnet_b0",
    "timm:dpn68b",
    "timm:repvgg_a0",
    "timm:levit_128s",
    "timm:ghostnet_100",
    "timm:efficientnet_cc_b0_4e",
    "timm:botnet26t_256",
    "timm:convmixer_768_32",
)
FOLDED = (
    *(f"torchvision:{name}" for name in ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small")),
    *(f"torchvision:{name}" for name in ("efficientnet_b0", "efficientnet_v2_s", "densenet121", "inception_v3")),
    *(f"torchvision:{name}" for name in ("googlenet", "regnet_y_400mf", "shufflenet_v2_x1_0", "mnasnet0_5")),
    *(f"torchvision:{name}" for name in ("vgg11_bn", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")),
    *(f"torchvision:{name}" for name in ("fcn_resnet50", "ssdlite320_mobilenet_v3_large", "r3d_18", "s3d")),
    *(f"timm:{name}" for name in ("resnet26d", "resnext50_32x4d", "seresnet33ts", "res2net50_26w_4s")),
    *(f"timm:{name}" for name in ("tf_efficientnet_b0", "tf_mobilenetv3_small_100", "hrnet_w18_small", "dpn68b")),
    *(f"timm:{name}" for name in ("repvgg_a0", "ghostnet_100", "ghostnetv2_100", "levit_128s", "dla34")),
    *(f"timm:{name}" for name in ("cspresnet50", "darknet53", "mobilenetv4_conv_small", "fastvit_t8", "repvit_m0_9")),
    *(f"timm:{name}" for name in ("efficientformerv2_s0", "selecsls42b", "rexnet_100", "vovnet39a", "skresnet18")),
    *(f"timm:{name}" for name in ("xcit_nano_12_p16_224", "convmixer_768_32", "regnetz_b16", "nf_regnet_b0")),
)
LARGEST = 90_000_000  # parameters of a model that is folded


def record(names: tuple[str, ...]) -> list[dict]:
    """Names and shapes of each architecture, its eps, and what its trace decides."""
    models = list_architectures()
    recorded = []
    for name in names:
        model = build_on_meta(models[name])
        graph, problem = trace_model(models[name], model)
        assert graph is not None, problem
        seen = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        plan = plan_fold(draw_state_dict(seen), graph)
        recorded.append(
            {
                "name": name,
                "shapes": [[key, list(shape)] for key, shape in seen.items()],
                "eps": {layer: module.eps for layer, module in find_batchnorm_modules(model).items()},
                "folds": [[fold.layer, list(fold.into), fold.level.value] for fold in plan.folds],
                "skips": [[skip.layer, skip.reason.value] for skip in plan.skips],
            }
        )
    return recorded


def check_catalogue(seen: Observation) -> str:
    """What the shipped catalogue says otherwise than the trace; "" for nothing."""
    if seen.verdict is None or seen.verdict.problem:
        return seen.problem or (seen.verdict.problem if seen.verdict else "no BatchNorm")
    (found,) = recognise(draw_state_dict(seen.shapes), name=seen.name)
    texts = [load_catalogue().structure(number) for number in found.structures]
    if texts != [seen.structure]:
        return "the catalogue holds another structure: run make catalogue"
    if not found.choices and found.eps != {layer: seen.eps[layer] for layer in found.layers}:
        return "the catalogue holds another eps: run make catalogue"
    return "" if found.whole else "it is recognised in part only"


def fold_bare(name: str, make, *, seed: int = 0) -> dict:
    """Fold the bare file of a model with random statistics by the catalogue alone, load it back, compare outputs."""
    probe = build_on_meta(make)
    if not find_batchnorm_modules(probe):
        return {"status": "no BatchNorm"}
    if sum(parameter.numel() for parameter in probe.parameters()) > LARGEST:
        return {"status": "too large"}
    torch.manual_seed(seed)
    model = make().double().eval()
    randomise(model, seed)
    inputs = find_zoo_input(model)
    judgement = Judgement(model, inputs)
    if not judgement.can_tell:
        return {"status": "blind"}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "bare.pth", Path(folder) / "folded.pth"
        torch.save(dict(model.state_dict()), path)
        with open_checkpoint(path) as checkpoint:
            state_dict = checkpoint.state_dicts[0]
            found = recognise(state_dict)
            whole = len(found) == 1 and found[0].whole and name in found[0].names
            ambiguous = bool(found and (found[0].choices or len(found[0].structures) > 1))
            assumed, options = name if ambiguous else None, FoldOptions(eps=_eps(model, found))
            result = fold_state_dict(checkpoint, state_dict, options, architecture=assumed, tolerance=1e-5)
            facts = {"recognised": whole, "ambiguous": ambiguous, "total": len(find_batchnorm_modules(model))}
            facts |= {"folded": len(result.plan.folds), "skipped": len(result.plan.skips)}
            if result.checkpoint is None:
                return {"status": "nothing to fold", **facts}
            save_checkpoint(result.checkpoint, out)
        folded = load_folded(copy.deepcopy(model), out).eval()
        verdict = judgement.of(folded)
    return {"status": verdict["verdict"], "error": verdict["error"], **facts}


def _eps(model: nn.Module, found) -> float | None:
    """What has to be given where even the name leaves a choice: the eps of the model."""
    if found and len(set(found[0].choices.values())) == 1 and len(found[0].choices) > 1:
        return next(iter(find_batchnorm_modules(model).values())).eps
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write what the suite holds the catalogue against")
    parser.add_argument("--all", action="store_true", help="fold every architecture, families first")
    parser.add_argument("--names", nargs="*", help="fold only these")
    parser.add_argument("--results", type=Path, help="a line for each model; those that are in it are not folded again")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    models = list_architectures()
    add_stand_ins()
    failed = 0
    if not options.all and not options.names:
        now = record(SAMPLE)
        if options.record:
            with gzip.GzipFile(RECORDED, "wb", mtime=0) as stream:
                stream.write(json.dumps(now, separators=(",", ":")).encode())
        failed += json.loads(gzip.decompress(RECORDED.read_bytes())) != json.loads(json.dumps(now))
        print("recorded decisions", "differ" if failed else "hold")
        for name in SAMPLE:
            problem = check_catalogue(observe(name, models[name]))
            failed += bool(problem)
            print(f"{name:48} {problem or 'as in the catalogue'}", flush=True)
    names = order_architectures(models, seed=0) if options.all else options.names or list(FOLDED)
    done = {}
    if options.results is not None and options.results.exists():
        done = {one["name"]: one for one in map(json.loads, options.results.read_text().splitlines())}
    deadline = time.monotonic() + 60 * options.minutes
    for name in names:
        if name in done or time.monotonic() > deadline:
            continue
        try:
            result = fold_bare(name, models[name])
        except (BntoolError, RuntimeError, AssertionError, ValueError, TypeError) as error:
            result = {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        done[name] = {"name": name, **result}
        print(f"{name:48} {result}", flush=True)
        if options.results is not None:
            with options.results.open("a") as stream:
                stream.write(json.dumps(done[name]) + "\n")
    chosen = [done[name] for name in names if name in done]
    totals = Counter(one["status"] for one in chosen)
    sums = {key: sum(one.get(key, 0) for one in chosen) for key in ("recognised", "ambiguous", "total", "folded")}
    print(dict(totals), sums)
    return 1 if failed or totals["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
