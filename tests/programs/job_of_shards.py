"""A job of one rank with a model whose parameters are sharded: refused by name."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from bntool.errors import RefusedError
from bntool.recalibration.live import recalibrate

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
model = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
with pytest.raises(RefusedError, match="parameters are sharded"):
    recalibrate(model, [torch.randn(4, 3, 5, 5)], method="exact")
dist.destroy_process_group()
