"""One rank of a user's own job: recalibrates a model with its share of the batches and saves what it has then."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from bntool.recalibration.live import recalibrate
from tests.programs.leaving import leave_job
from tests.recalibration.calibration_network import Network, make_batches


def main() -> None:
    folder, method, count, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(Network())
    batches = make_batches("a small last batch of outliers")[:count]
    result = recalibrate(model, batches[rank::2], method=method)
    assert model.training
    assert dist.is_initialized()  # the user's job is the user's to end
    assert result.batches == count
    assert model.require_forward_param_sync  # as it was: the next forward of the job is its first
    torch.save(model.module.state_dict(), folder / f"rank{rank}.pt")
    leave_job()


if __name__ == "__main__":
    main()
