"""Fold every architecture of torchvision and timm, with random statistics, and judge the result in float64.

    python -m tests.benchmarks.fold_zoo --sample 40
    python -m tests.benchmarks.fold_zoo --names torchvision:resnet18 densenet* --verbose
    python -m tests.benchmarks.fold_zoo --results zoo.jsonl --minutes 30     (again and again: goes on where it stopped)
    python -m tests.benchmarks.fold_zoo --results zoo.jsonl --summary tests/fixtures/interop/fold_zoo.json
    python -m tests.benchmarks.fold_zoo --families mixed.jsonl positive.jsonl --summary families.json
    python -m tests.benchmarks.fold_zoo --results large.jsonl --onto tests/fixtures/interop/fold_zoo.json --summary ...
    python -m tests.benchmarks.fold_zoo --families large/*.jsonl --onto families.json --summary families.json

Needs timm and torchvision beside what the tests need. torch.fx and, where it is installed, mmcv fold the same models
in the same run. Prints one line for each model and the totals: how many BatchNorm layers each tool folds, how many
models it gets wrong, and why bntool skips what it skips. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bntool.folding.planning import plan_fold
from bntool.graphs.traced.tracing import trace
from bntool.modules.application import apply_plan, read_state
from bntool.modules.finding import find_batchnorm_modules
from bntool.verification.outputs import measure_rounding
from tests.benchmarks.zoo_models import (
    Factory,
    find_family,
    find_zoo_input,
    list_architectures,
    order_architectures,
    randomise,
)

LARGEST = 60_000_000  # parameters
PATIENCE = 90  # seconds of CPU time for a model
WRONG = 1e-9  # relative error in float64 beyond which it is held against the model's own amplification of rounding
CHAOS = 1e-2  # however much the model amplifies rounding, and drawn calmer it still does

Fold = Callable[[nn.Module, Any], tuple[nn.Module, dict[str, Any]]]


class GaveUp(BaseException):
    """Not an Exception: models catch those."""


def judge(make: Factory, *, seed: int, largest: int, negative: float, with_peers: bool) -> dict[str, Any]:
    """Fold one architecture with every tool; what each folded, and whether outputs stayed.

    Args:
        negative: share of the scales that are.
        with_peers: whether torch.fx and mmcv fold it, too.
    """
    torch.manual_seed(seed)
    try:
        with torch.device("meta"):
            probe = make()
    except (NotImplementedError, ValueError, RuntimeError):  # it looks at elements while it is built
        probe = make()
    if not find_batchnorm_modules(probe):
        return {"status": "no BatchNorm"}
    parameters = sum(p.numel() for p in probe.parameters())
    if parameters > largest:
        return {"status": "too large", "parameters": parameters}
    model = make().double().eval()
    randomise(model, seed, negative=negative)
    inputs = find_zoo_input(model)
    for calmer in range(4):
        if calmer:
            _calm(model)
        judgement = Judgement(model, inputs)
        if not judgement.can_tell:
            return {"status": "blind", "why": "the original's outputs are not finite, or the same for all inputs"}
        bntool = _fold_and_judge(_fold_with_bntool, model, judgement)
        # how much the model amplifies rounding is measured, in two more forwards, only where it decides
        if bntool.get("error", 0.0) < WRONG or 16 * judgement.rounding <= WRONG:
            break
    peers = {tool: _fold_and_judge(fold, model, judgement) for tool, fold in (_peers() if with_peers else {}).items()}
    return {"status": "judged", "total": len(find_batchnorm_modules(model)), "bntool": bntool, **peers}


def _fold_and_judge(fold: Fold, model: nn.Module, judgement: Judgement) -> dict[str, Any]:
    try:
        folded, facts = fold(copy.deepcopy(model), judgement.inputs)
        return {**judgement.of(folded), **facts}
    except Exception as error:
        return {"verdict": "fails", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}


def _calm(model: nn.Module) -> None:
    """Smaller BatchNorm weights: with those drawn the last digit of an input changes more than an error may be."""
    for norm in find_batchnorm_modules(model).values():
        if norm.weight is not None:
            norm.weight.data.mul_(0.3)


class Judgement:
    """What a folded copy of one model is held against: the outputs, or those of its parts where they tell nothing.

    A detector with random weights finds no boxes, whatever its backbone computes.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        for self.inside in (False, True):
            self.expected, self.reached = _run(model, inputs, inside=self.inside)
            self.can_tell = _can_tell(self.expected)
            if self.can_tell:
                break

    def of(self, folded: nn.Module) -> dict[str, Any]:
        """How many BatchNorms no longer run, the error of the outputs, and whether that is more than rounding."""
        found, running = _run(folded, self.inputs, inside=self.inside)
        error = 0.0
        for a, b in zip(self.expected, found, strict=True):
            difference = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
            error = math.inf if math.isnan(difference) else max(error, difference)
        right = error < WRONG or (error < CHAOS and error < 16 * self.rounding)
        return {
            "verdict": "ok" if right else "wrong",
            "folded": len(self.reached - running),
            "error": float(f"{error:.2g}"),
        }

    @cached_property
    def rounding(self) -> float:
        return measure_rounding(self.model, [self.inputs])


class _Watch(TorchDispatchMode):
    """Collects the running_mean of every batch_norm that runs: random numbers, so that they name the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "batch_norm" in str(function) and isinstance(args[3], torch.Tensor):
            self.seen.add(args[3].numpy().tobytes())
        return function(*args, **(kwargs or {}))


def _run(model: nn.Module, inputs: Any, *, inside: bool) -> tuple[list[torch.Tensor], set[bytes]]:
    """The floating tensors that a model gives, and which BatchNorms ran; with ``inside`` also what children give."""
    found: list[Any] = []
    hooks = [child.register_forward_hook(lambda *call: found.append(call[2])) for child in model.children() if inside]
    try:
        with torch.no_grad(), _Watch() as watch:
            found.append(model(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    tensors = [leaf for leaf in tree_flatten(found)[0] if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()], watch.seen


def _can_tell(outputs: list[torch.Tensor]) -> bool:
    """Whether they are finite and not the same for both images of the batch."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
        return False
    return any(len(tensor) == 2 and not torch.equal(tensor[0], tensor[1]) for tensor in outputs)


def _fold_with_bntool(model: nn.Module, inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    plan = plan_fold(read_state(model), trace(model, inputs))
    apply_plan(model, plan)
    return (
        model,
        {
            "folded": len(plan.folds),  # also those that stay to add their shift
            "levels": dict(Counter(fold.level.value + ("/stays" if fold.stays else "") for fold in plan.folds)),
            "reasons": dict(Counter(skip.reason.value for skip in plan.skips)),
            "skips": [f"{s.layer}: {s.reason.value}: {s.detail}"[:300] for s in plan.skips],
        },
    )


def _peers() -> dict[str, Fold]:
    from torch.fx.experimental.optimization import fuse

    tools: dict[str, Fold] = {"torch.fx": lambda model, _: (fuse(model, inplace=True), {})}
    if importlib.util.find_spec("mmcv"):
        from mmcv.cnn.utils.fuse_conv_bn import fuse_conv_bn

        tools["mmcv"] = lambda model, _: (fuse_conv_bn(model), {})
    return tools


def _give_up(*_: object) -> None:
    raise GaveUp("took more CPU time than --patience")


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Totals of a run: of each tool, of each level and reason, and the models that are not judged."""
    judged = {name: r for name, r in results.items() if r["status"] == "judged"}
    tools: dict[str, Counter[str]] = {}
    levels: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for result in judged.values():
        for tool in ("bntool", "torch.fx", "mmcv"):
            facts = result.get(tool)
            if facts is not None:
                counts = tools.setdefault(tool, Counter(models=0, fails=0, wrong=0, folded=0, folded_right=0))
                counts["models"] += 1
                counts["fails"] += facts["verdict"] == "fails"
                counts["wrong"] += facts["verdict"] == "wrong"
                counts["folded"] += facts.get("folded", 0)
                counts["folded_right"] += facts.get("folded", 0) * (facts["verdict"] == "ok")
        levels.update(result["bntool"].get("levels", {}))
        reasons.update(result["bntool"].get("reasons", {}))
    others: dict[str, list[str]] = {}
    for name, result in results.items():
        if result["status"] not in ("judged", "no BatchNorm"):
            others.setdefault(result["status"], []).append(name)
    return {
        "architectures": len(results),
        "without_batchnorm": sum(r["status"] == "no BatchNorm" for r in results.values()),
        "models": len(judged),
        "batchnorms": sum(r["total"] for r in judged.values()),
        "tools": {tool: dict(counts) for tool, counts in tools.items()},
        "levels": dict(levels.most_common()),
        "reasons": dict(reasons.most_common()),
        "not_judged": {status: sorted(names) for status, names in others.items()},
    }


def count_families(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By family its architectures and BatchNorms, and of each run what was folded and how many models are wrong.

    Args:
        runs: results by the name of the run; what is not judged in all of them is left out.
    """
    names = set.intersection(
        *({name for name, result in results.items() if result["status"] == "judged"} for results in runs.values())
    )
    families: dict[str, dict[str, Any]] = {}
    for name in sorted(names, key=lambda name: (find_family(name), name)):
        facts = families.setdefault(find_family(name), {"architectures": [], "batchnorms": 0, "runs": {}})
        facts["architectures"].append(name)
        facts["batchnorms"] += next(iter(runs.values()))[name]["total"]
        for run, results in runs.items():
            counts = facts["runs"].setdefault(run, {})
            for tool in ("bntool", "torch.fx", "mmcv"):
                if tool in results[name]:
                    facts_of_tool = results[name][tool]
                    found = counts.setdefault(tool, {"folded": 0, "folded_right": 0, "wrong": 0, "fails": 0})
                    found["folded"] += facts_of_tool.get("folded", 0)
                    found["folded_right"] += facts_of_tool.get("folded", 0) * (facts_of_tool["verdict"] == "ok")
                    for verdict in ("wrong", "fails"):
                        found[verdict] += facts_of_tool["verdict"] == verdict
    return families


def add_families(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of families of an earlier run with those of architectures that it did not judge."""
    together: dict[str, Any] = {}
    for family in sorted({*earlier, *new}):
        parts = [counts[family] for counts in (earlier, new) if family in counts]
        names = [name for part in parts for name in part["architectures"]]
        if len(set(names)) < len(names):
            raise ValueError(f"judged in the earlier run, too: {sorted({n for n in names if names.count(n) > 1})}")
        runs: dict[str, dict[str, Counter[str]]] = {}
        for part in parts:
            for run, tools in part["runs"].items():
                for tool, counts in tools.items():
                    runs.setdefault(run, {}).setdefault(tool, Counter(dict.fromkeys(counts, 0))).update(counts)
        batchnorms = sum(part["batchnorms"] for part in parts)
        together[family] = {"architectures": sorted(names), "batchnorms": batchnorms, "runs": runs}
    return together


def add_summary(earlier: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The totals of an earlier run with those of models that it did not judge."""
    new = summarise(results)
    left = {name: status for status, names in earlier["not_judged"].items() for name in names}
    if strangers := results.keys() - left.keys():
        raise ValueError(f"judged in the earlier run, too: {sorted(strangers)}")
    left |= {name: status for status, names in new["not_judged"].items() for name in names}
    judged = {name for name, result in results.items() if result["status"] == "judged"}
    counts = {key: Counter(earlier[key]) + Counter(new[key]) for key in ("levels", "reasons")}
    return {
        **earlier,
        **{key: earlier[key] + new[key] for key in ("models", "batchnorms")},
        "tools": {
            tool: {key: value + new["tools"].get(tool, {}).get(key, 0) for key, value in facts.items()}
            for tool, facts in earlier["tools"].items()
        },
        **{key: dict(counter.most_common()) for key, counter in counts.items()},
        "not_judged": {
            status: sorted(name for name, why in left.items() if why == status and name not in judged)
            for status in dict.fromkeys(left.values())
        },
    }


def _print_result(name: str, result: Mapping[str, Any], *, verbose: bool) -> None:
    if result["status"] == "no BatchNorm":
        return
    if result["status"] != "judged":
        print(f"{name:45} {result['status']} {result.get('why', '')}", flush=True)
        return
    tools = [(t, result[t]) for t in ("bntool", "torch.fx", "mmcv") if t in result]
    cells = [f"{tool} {facts.get('folded', '-'):>3} {facts['verdict']:5}" for tool, facts in tools]
    print(f"{name:45} {result['total']:4}  " + "  ".join(cells), result["bntool"].get("reasons", ""), flush=True)
    if verbose:
        for skip in result["bntool"].get("skips", ()):
            print("    " + skip)


def run() -> None:
    """A sample of 40, where the packages are installed."""
    if not (importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision")):
        print("fold_zoo needs timm and torchvision")
        return
    main(["--sample", "40"])


def _read_results(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None or not path.exists():
        return {}
    return {entry.pop("name"): entry for entry in map(json.loads, path.read_text().splitlines())}


def _run_models(names: Iterable[str], options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    models = list_architectures()
    deadline = time.monotonic() + 60 * options.minutes
    for name in names:
        if name in results or time.monotonic() > deadline:
            continue
        signal.setitimer(signal.ITIMER_PROF, options.patience)
        started = time.process_time()
        try:
            result = judge(
                models[name],
                seed=options.seed,
                largest=options.largest,
                negative=options.negative,
                with_peers=not options.alone,
            )
        except (Exception, GaveUp) as error:
            result = {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        result["seconds"] = round(time.process_time() - started, 1)
        results[name] = result
        _print_result(name, result, verbose=options.verbose)
        if options.results:
            with options.results.open("a") as stream:
                stream.write(json.dumps({"name": name, **result}) + "\n")


def _choose(options: argparse.Namespace) -> list[str]:
    names = order_architectures(list_architectures(), seed=options.seed)
    if options.names:
        wanted = options.names
        names = [n for n in names if n in wanted or any(p[-1:] == "*" and p[:-1] in n for p in wanted)]
    if options.sample:
        names = random.Random(options.seed).sample(names, min(options.sample, len(names)))
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many architectures, drawn by chance")
    parser.add_argument("--names", nargs="*", help="only these; with * at the end all that contain the rest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=LARGEST, help="parameters of the largest model to judge")
    parser.add_argument("--negative", type=float, default=0.2, help="share of the scales that are negative")
    parser.add_argument("--alone", action="store_true", help="fold with bntool alone, which takes half the time")
    parser.add_argument("--verbose", action="store_true", help="print every skip")
    parser.add_argument("--results", type=Path, help="append each result to this file, and leave out what is in it")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds of CPU time for a model")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no model later than this")
    parser.add_argument("--summary", type=Path, help="write the totals to this file; judge nothing")
    parser.add_argument("--families", type=Path, nargs="+", help="put these files of results together by family")
    parser.add_argument("--onto", type=Path, help="add the totals of this file, whose run left out what is judged here")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _give_up)
    if options.families is not None:
        families = count_families({path.stem: _read_results(path) for path in options.families})
        if options.onto is not None:
            families = add_families(json.loads(options.onto.read_text()), families)
        text = json.dumps(families, indent=2)
        print(text)
        if options.summary is not None:
            options.summary.write_text(text + "\n")
        return
    results = _read_results(options.results)
    if options.summary is None:
        _run_models(_choose(options), options, results)
    summary = summarise(results) if options.onto is None else add_summary(json.loads(options.onto.read_text()), results)
    text = json.dumps(summary, indent=2)
    print(text)
    if options.summary is not None:
        options.summary.write_text(text + "\n")


if __name__ == "__main__":
    main()
