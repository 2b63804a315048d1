"""FreezeBatchNormHook in an MMEngine run on two ranks: which tensors change, and what DDP does not allow.

MMEngine's launcher asks for a GPU by index; on a CPU that one call is left out, and the rest is MMEngine's own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.places import ROOT

REQUIREMENTS = ["torch==2.13.0", "mmengine==0.10.7", "numpy"]
FROZEN = ("layers.1.running_mean", "layers.1.running_var", "layers.1.num_batches_tracked")


def train(folder: Path, *, requires_grad: bool | None) -> None:
    """One rank: train two epochs and leave the names of the tensors that changed, or the refusal."""
    import torch
    import torch.distributed as dist
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch import nn

    from bntool.errors import RefusedError

    importlib.import_module("bntool.integrations.mmengine")  # registers the hook

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

        def forward(self, inputs, data_samples=None, mode="loss"):
            return {"loss": self.layers(torch.stack(inputs)).square().mean()}

    torch.cuda.set_device = lambda device: None
    torch.manual_seed(0)
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = Runner(
        model=model,
        work_dir=str(folder / "work"),
        train_dataloader={
            "dataset": [{"inputs": torch.randn(3)} for _ in range(16)],
            "batch_size": 4,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}},
        custom_hooks=[{"type": "FreezeBatchNormHook", "requires_grad": requires_grad}],
        default_hooks={"checkpoint": None, "logger": None},
        default_scope="mmengine",
        log_level="ERROR",
        launcher="pytorch",
        env_cfg={"dist_cfg": {"backend": "gloo"}},
        cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None}},
    )
    try:
        runner.train()
        after = runner.model.module.state_dict()
        result = {
            "wrapper": type(runner.model).__name__,
            "kept": [name for name in after if torch.equal(after[name], before[name])],
        }
    except RefusedError as error:
        result = {"refused": error.message}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.barrier()  # a rank that ends while the other still talks to it takes that one down
    dist.destroy_process_group()


def launch(*, requires_grad: str) -> list[dict[str, object]]:
    """What each of two ranks says."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*launcher, __file__, folder, requires_grad], check=True, env=environment)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


def main() -> int:
    """Train twice and hold the answers against what the hook promises."""
    kept = launch(requires_grad="")
    print(f"norm_eval under DDP: {kept}")
    refused = launch(requires_grad="no")
    print(f"requires_grad=False under DDP: {refused}")
    right = all(r == {"wrapper": "MMDistributedDataParallel", "kept": list(FROZEN)} for r in kept)
    return 0 if right and all("freeze first" in str(r.get("refused")) for r in refused) else 1


if __name__ == "__main__":
    if "RANK" in os.environ:
        train(Path(sys.argv[1]), requires_grad=False if sys.argv[2] else None)
    else:
        sys.exit(main())
