"""One rank of two that have different numbers of batches, and a replica inside of the model."""

import sys

import torch
import torch.distributed as dist
from torch import nn

from bntool.recalibration.live import recalibrate
from tests.programs.leaving import leave_job

folder, method, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
inner = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
result = recalibrate(nn.Sequential(inner), [torch.randn(4, 3, 5, 5)][rank:], method=method)
assert result.batches == 1
assert inner.require_forward_param_sync
leave_job()
