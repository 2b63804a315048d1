"""One rank of the DDP test: python distributed_worker.py RANK FOLDER."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bntool.errors import RefusedError
from bntool.layers.freezing import freeze
from tests.fixtures.models.mmdet_resnet import detector


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    for case in ("norm_eval", "both"):
        torch.manual_seed(0)
        model = detector()
        model(torch.randn(8, 3, 32, 32))
        if rank == 0 and case == "norm_eval":
            torch.save(model.state_dict(), folder / "before.pt")
        freeze(model, requires_grad=None if case == "norm_eval" else False)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        for step in range(20):
            wrapped.train()
            generator = torch.Generator().manual_seed(100 * rank + step)
            images = torch.randn(4, 3, 32, 32, generator=generator) + rank
            optimizer.zero_grad()
            wrapped(images).square().mean().backward()
            optimizer.step()
        torch.save(wrapped.module.state_dict(), folder / f"{case}-{rank}.pt")
    try:
        freeze(DistributedDataParallel(detector()), requires_grad=False)
        message = "not refused"
    except RefusedError as error:
        message = error.message
    if rank == 0:
        (folder / "refused.json").write_text(json.dumps({"message": message}))
    policy = freeze(DistributedDataParallel(detector()))  # modes alone may change under DDP
    assert "backbone.bn1" in policy.layers
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
