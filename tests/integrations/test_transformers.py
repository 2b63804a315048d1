"""The callbacks in transformers itself, where it is installed; tests/oracles runs them in any case."""

import math

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import bntool  # noqa: E402
from bntool.integrations.transformers import FreezeBatchNorm, WatchBatchNorm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, inputs, labels=None):
        outputs = self.layers(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def make_data(*, spoiled=False):
    inputs = torch.randn(64, 3)
    if spoiled:
        inputs[20:] = math.inf
    return [{"inputs": row, "labels": torch.zeros(1)} for row in inputs]


def make_trainer(folder, model, *callbacks, data=None):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data or make_data(), callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def test_a_freeze_holds_through_real_steps_and_the_model_is_given_back(tmp_path):
    model = Net()
    torch.save(model.state_dict(), tmp_path / "before.pt")
    make_trainer(tmp_path, model, FreezeBatchNorm(requires_grad=False)).train()
    torch.save(model.state_dict(), tmp_path / "after.pt")
    comparison = bntool.diff(tmp_path / "before.pt", tmp_path / "after.pt", expect="frozen")
    assert not comparison.violations
    assert not comparison.identical
    assert type(model.layers[1]) is nn.BatchNorm1d
    assert model.layers[1].weight.requires_grad


def test_health_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, Net())
    trainer.add_callback(WatchBatchNorm(trainer.log, every=10))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "batchnorm/sick" in entry]
    assert [entry["step"] for entry in logged] == [10, 20, 30]
    assert trainer.state.global_step == 32


def test_a_sick_layer_stops_it(tmp_path):
    watch = WatchBatchNorm(every=10)
    trainer = make_trainer(tmp_path, Net(), watch, data=make_data(spoiled=True))
    trainer.train()
    assert trainer.state.global_step == 10
    assert watch.last.is_sick
    assert trainer.state.log_history[0]["batchnorm/sick"] == 1
