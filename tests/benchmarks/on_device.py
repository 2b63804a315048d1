"""``recalibrate`` and fold verification on a GPU, against update_bn and fvcore, with memory: under five minutes.

``make gpu`` runs it. Where torch sees no GPU it goes the same way on the CPU with small images, once: that shows that
it runs, and measures nothing of use. Wall time of interleaved rounds, the device synchronised before and after; memory
is the most that torch allocated beyond what the model and the batches take (of a CPU nothing is known).
"""

from __future__ import annotations

import copy
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bntool.folding.live import fold
from bntool.recalibration.live import recalibrate
from tests.benchmarks.recalibration import build_resnet50


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        batches, images, pixels: so many batches of so many square images.
        memory: for exact statistics in bounded memory.
        rounds: and one more before them, where there are several.
    """

    batches: int
    images: int
    pixels: int
    memory: str
    rounds: int


LARGE, SMALL = Size(8, 64, 224, "1GB", 3), Size(2, 4, 64, "300MB", 1)
Way = Callable[[nn.Module, list[torch.Tensor]], object]


def run() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = LARGE if device.type == "cuda" else SMALL
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: the CPU, with small images"
    print(
        f"{name}; torch {torch.__version__}; ResNet-50, {size.batches} batches of {size.images} of {size.pixels} pixels"
    )
    model = build_resnet50().to(device).eval()
    shape = (size.images, 3, size.pixels, size.pixels)
    batches = [torch.randn(shape, device=device) for _ in range(size.batches)]
    ways = _list_ways(size)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = dict.fromkeys(ways, 0)
    failed: dict[str, str] = {}
    warming = int(size.rounds > 1)
    for turn in range(size.rounds + warming):
        for way, work in ways.items():
            if way in failed:
                continue
            try:
                spent, peak = _measure(work, copy.deepcopy(model), batches, device)
            except Exception as error:  # a day with a device is short: the others go on
                failed[way] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                continue
            if turn >= warming:
                seconds[way].append(spent)
                peaks[way] = max(peaks[way], peak)
    ours = statistics.median(seconds["pooled"]) if seconds["pooled"] else float("nan")
    print(f"{'':28}{'best':>10}{'median':>10}{'of pooled':>11}{'images/s':>11}{'memory':>11}")
    for way, found in seconds.items():
        if way in failed:
            print(f"{way:28}failed: {failed[way]}")
            continue
        median, rate = statistics.median(found), size.batches * size.images / min(found)
        memory = f"{peaks[way] / 1e6:>8.0f} MB" if device.type == "cuda" else f"{'-':>11}"
        print(f"{way:28}{min(found):>8.3f} s{median:>8.3f} s{median / ours:>10.2f}x{rate:>11.0f}{memory}")
    _compare_statistics(model, batches)


def _list_ways(size: Size) -> dict[str, Way]:
    ways: dict[str, Way] = {
        "eval forward": _forward,
        "pooled": recalibrate,
        "pooled, some layers": lambda m, b: recalibrate(m, b, layers=["1"]),
        "pooled, bfloat16": lambda m, b: recalibrate(m, b, precision="bfloat16"),
        "pooled, model in float16": lambda m, b: recalibrate(m.half(), b),
        "pooled, channels last": lambda m, b: recalibrate(*_lay_out(m, b)),
        "eval forward, channels last": lambda m, b: _forward(*_lay_out(m, b)),
        "pooled, DDP of one rank": _recalibrate_replica,
        "exact": lambda m, b: recalibrate(m, b, method="exact"),
        f"exact in {size.memory}": lambda m, b: recalibrate(m, b, method="exact", memory=size.memory),
        "fold and verify": lambda m, b: fold(m, b[0][:2]),
        "torch update_bn": lambda m, b: update_bn(b, m),
    }
    try:
        from fvcore.nn.precise_bn import update_bn_stats
    except ImportError:
        print("fvcore is not installed: not compared")
    else:
        ways["fvcore update_bn_stats"] = lambda m, b: update_bn_stats(m.train(), b, len(b))
    return ways


def _forward(model: nn.Module, batches: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)


def _lay_out(model: nn.Module, batches: list[torch.Tensor]) -> tuple[nn.Module, list[torch.Tensor]]:
    layout = torch.channels_last
    return model.to(memory_format=layout), [batch.contiguous(memory_format=layout) for batch in batches]


def _recalibrate_replica(model: nn.Module, batches: list[torch.Tensor]) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    on_gpu = batches[0].device.type == "cuda"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("nccl" if on_gpu else "gloo", rank=0, world_size=1)
    try:
        recalibrate(DistributedDataParallel(model), batches)
    finally:
        distributed.destroy_process_group()


def _measure(work: Way, model: nn.Module, batches: list[torch.Tensor], device: torch.device) -> tuple[float, int]:
    """Wall seconds, and bytes allocated beyond those before."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    work(model, batches)
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    return time.perf_counter() - start, 0


def _compare_statistics(model: nn.Module, batches: list[torch.Tensor]) -> None:
    """How far variances of the device are from those of a CPU, and of bounded memory from those of all of it."""
    one, two, three = copy.deepcopy(model), copy.deepcopy(model).cpu(), copy.deepcopy(model)
    few = [batch[:4] for batch in batches[:2]]
    recalibrate(one, few)
    recalibrate(two, [batch.cpu() for batch in few])
    print(f"variances of the device against the CPU's: {_differ(one, two):.1e}")
    recalibrate(one, few, method="exact")
    recalibrate(three, few, method="exact", memory="400MB")
    print(f"exact in bounded memory against exact: {_differ(one, three):.1e}")


def _differ(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return max(float((a.cpu() / b.cpu() - 1).abs().max()) for (name, a), b in pairs if name.endswith("running_var"))
