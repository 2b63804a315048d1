"""The callback in Lightning itself, where it is installed; tests/oracles runs it in any case."""

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning")

import bntool  # noqa: E402
from bntool.integrations.lightning import FreezeBatchNorm, WatchBatchNorm  # noqa: E402

# what Lightning 2.6 warns of; any other warning is an error
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),  # on machines of a cluster
    pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode"),  # the frozen one: that is what is wanted
]


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def training_step(self, batch, index):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Frozen(Net):
    def training_step(self, batch, index):
        assert not self.model[1].training
        return super().training_step(batch, index)


class Log(lightning.pytorch.loggers.logger.DummyLogger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))


def fit(module, data, *callbacks, logger=False):
    trainer = lightning.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        max_epochs=2,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return trainer


def test_statistics_stay_while_fitting_and_the_module_is_given_back(tmp_path):
    module = Frozen()
    torch.save(module.state_dict(), tmp_path / "before.pt")
    fit(module, torch.randn(16, 3), FreezeBatchNorm(requires_grad=False))
    torch.save(module.state_dict(), tmp_path / "after.pt")
    comparison = bntool.diff(tmp_path / "before.pt", tmp_path / "after.pt", expect="frozen")
    assert not comparison.violations
    assert all(change.value == "changed" for change in comparison.others.values())
    assert type(module) is Frozen
    assert type(module.model[1]) is nn.BatchNorm1d
    assert module.model[1].weight.requires_grad


def test_health_is_given_to_the_loggers():
    log = Log()
    fit(Net(), torch.randn(64, 3), WatchBatchNorm(every=10), logger=log)
    assert [step for step, metrics in log.metrics if "batchnorm/sick" in metrics] == [10, 20, 30]


def test_a_sick_layer_stops_it():
    data = torch.randn(64, 3)
    data[20:] = torch.inf
    watch = WatchBatchNorm(every=10)
    with pytest.warns(UserWarning, match="1 layer sick: model.1: NaN"):
        assert fit(Net(), data, watch).global_step == 10
    assert watch.last.is_sick
