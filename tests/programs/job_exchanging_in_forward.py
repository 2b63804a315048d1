"""One rank of two whose forwards sum something over the ranks, by ``in place`` or functional collectives."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as functional

from bntool.errors import RefusedError
from bntool.recalibration.live import recalibrate

folder, way, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)


class Summing(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = x.clone()
        if way == "in place":
            dist.all_reduce(x)
            return self.norm(x)
        return self.norm(functional.all_reduce(x, "sum", dist.group.WORLD) + 0)


torch.manual_seed(0)
batches, model = [torch.randn(4, 3, 5, 5) for _ in range(4)], Summing()
recalibrate(model, batches[rank::2])
sums = torch.cat([batches[0] + batches[1], batches[2] + batches[3]])
torch.testing.assert_close(model.norm.running_mean, sums.mean((0, 2, 3)))
with pytest.raises(RefusedError, match="exchanges something with the other ranks"):
    recalibrate(model, batches[rank::2], method="exact")
with pytest.raises(RefusedError, match="SyncBatchNorm of half precision"):
    recalibrate(nn.SyncBatchNorm(3).half(), [x.half() for x in batches])
dist.barrier()
os._exit(0)  # gloo itself may abort when a process ends in order (one time in twenty)
