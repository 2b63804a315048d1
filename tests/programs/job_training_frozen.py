"""One rank of two that train frozen models under DDP, and write what they have then."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bntool.errors import RefusedError
from bntool.freezing.live import freeze
from tests.fixtures.models.mmdet_resnet import detector
from tests.programs.leaving import leave_job

# DDP takes SyncBatchNorm on a GPU only; on a CPU a frozen one trains in a process group, because it asks nobody
CASES = ("norm_eval", "both", "converted, norm_eval", "converted, both", "norm_eval, then converted")


def average_gradients(model):
    """What DDP does."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    for case in CASES:
        torch.manual_seed(0)
        model = detector()
        model(torch.randn(8, 3, 32, 32))
        if rank == 0 and case == "norm_eval":
            torch.save(model.state_dict(), folder / "before.pt")
        if case.startswith("converted"):
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        freeze(model, requires_grad=False if "both" in case else None)
        if case.endswith("then converted"):
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        wrapped = model if "converted" in case else DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        for step in range(8):
            wrapped.train()
            generator = torch.Generator().manual_seed(100 * rank + step)
            images = torch.randn(4, 3, 32, 32, generator=generator) + rank
            optimizer.zero_grad()
            wrapped(images).square().mean().backward()
            if wrapped is model:
                average_gradients(model)
            optimizer.step()
        torch.save(model.state_dict(), folder / f"{case}-{rank}.pt")
    layer = torch.nn.SyncBatchNorm(2)
    synchronises = False
    try:
        layer(torch.randn(4, 2))
    except ValueError:  # unfrozen it wants to ask the other rank, which it can on a GPU only
        synchronises = True
    freeze(layer)
    layer.train()
    layer(torch.randn(4, 2))
    try:
        freeze(DistributedDataParallel(detector()), requires_grad=False)
        message = "not refused"
    except RefusedError as error:
        message = error.message
    if rank == 0:
        (folder / "refused.json").write_text(json.dumps({"message": message, "synchronises": synchronises}))
    policy = freeze(DistributedDataParallel(detector()))  # modes alone may change under DDP
    assert "backbone.bn1" in policy.layers
    leave_job()


if __name__ == "__main__":
    main()
