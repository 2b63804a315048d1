"""The hook in MMEngine itself, where it is installed; tests/oracles runs it in any case."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.model import BaseModel
from mmengine.runner import Runner

import bntool.integrations.mmengine  # noqa: F401 registers the hook


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, inputs, data_samples=None, mode="loss"):
        return {"loss": self.layers(torch.stack(inputs)).square().mean()}


def test_statistics_stay_over_epochs(tmp_path):
    model = Model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader={
            "dataset": [{"inputs": torch.randn(3)} for _ in range(8)],
            "batch_size": 4,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}},
        custom_hooks=[{"type": "FreezeBatchNormHook", "requires_grad": False}],
        default_hooks={"checkpoint": None, "logger": None},
        default_scope="mmengine",
        log_level="ERROR",
    )
    runner.train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if not key.startswith("layers.1.")}
