"""The callback in Lightning itself, where it is installed; tests/oracles runs it in any case."""

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning")

from bntool.integrations.lightning import FreezeBatchNorm  # noqa: E402

# what Lightning 2.6 warns of; any other warning is an error
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode"),  # the frozen one: that is what is wanted
]


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def training_step(self, batch, index):
        assert not self.model[1].training
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_statistics_stay_while_fitting_and_the_module_is_given_back():
    module = Module()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = lightning.Trainer(
        callbacks=[FreezeBatchNorm(requires_grad=False)],
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 3), batch_size=4))
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if not key.startswith("model.1.")}
    assert type(module) is Module
    assert type(module.model[1]) is nn.BatchNorm1d
    assert module.model[1].weight.requires_grad
