"""The hook in MMEngine itself, where it is installed; tests/oracles runs it in any case."""

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

import bntool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, for which its own optimizers are too old
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    import bntool.integrations.mmengine  # registers the hooks

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, inputs, data_samples=None, mode="loss"):
        return {"loss": self.layers(torch.stack(inputs)).square().mean()}


def train(folder, model, data, *hooks):
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader={
            "dataset": [{"inputs": row} for row in data],
            "batch_size": 4,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}},
        custom_hooks=list(hooks),
        default_hooks={"checkpoint": None, "logger": None},
        default_scope="mmengine",
        experiment_name=f"{folder.name}-{len(hooks)}",
        log_level="CRITICAL",
    )
    runner.train()
    return runner


def test_statistics_stay_over_epochs(tmp_path):
    model = Model()
    torch.save(model.state_dict(), tmp_path / "before.pt")
    train(tmp_path, model, torch.randn(8, 3), {"type": "FreezeBatchNormHook", "requires_grad": False})
    torch.save(model.state_dict(), tmp_path / "after.pt")
    comparison = bntool.diff(tmp_path / "before.pt", tmp_path / "after.pt", expect="frozen")
    assert not comparison.violations
    assert all(change.value == "changed" for change in comparison.others.values())


def test_health_is_given_to_the_message_hub(tmp_path):
    runner = train(tmp_path, Model(), torch.randn(64, 3), {"type": "WatchBatchNormHook", "every": 10})
    scalars = runner.message_hub.log_scalars
    assert len(scalars["train/batchnorm/sick"].data[0]) == 3
    assert runner.iter == 32


def test_a_sick_layer_stops_it(tmp_path):
    data = torch.randn(64, 3)
    data[20:] = torch.inf
    runner = train(tmp_path, Model(), data, {"type": "WatchBatchNormHook", "every": 10})
    assert runner.iter < 20
