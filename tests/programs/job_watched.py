"""One rank of two that train under DDP and watch; a layer of the second becomes sick. Writes when each stopped."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bntool.integrations.watching import WatchingHook
from tests.programs.leaving import leave_job


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = DistributedDataParallel(net, broadcast_buffers=False)  # so that each rank has statistics of its own
    watch = WatchingHook(every=5)
    for step in range(1, 30):
        model(torch.randn(8, 3)).square().mean().backward()
        if rank == 1 and step == 7:
            net[1].running_var.fill_(-1.0)
        look = watch.watch(model, step)
        if watch.must_stop(look):
            break
    verdict = watch.last.summary.verdict
    (folder / f"{rank}.txt").write_text(f"{step} {verdict.health.value} {watch.last.is_sick}")
    leave_job()


if __name__ == "__main__":
    main()
