"""The callbacks in ultralytics itself, where it is installed; tests/oracles runs them in any case."""

import csv

import pytest
import torch
from torch import nn

ultralytics = pytest.importorskip("ultralytics")

from PIL import Image  # noqa: E402

import bntool  # noqa: E402
from bntool.integrations.ultralytics import FreezeBatchNorm, WatchBatchNorm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for part in ("train", "val"):
        for number, name in enumerate(("dark", "light")):
            (folder / part / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (32, 32), (40 * index, 90 * number, 60)).save(folder / part / name / f"{index}.png")
    return folder


def train(data, folder, *callbacks, **options):
    """The trainer's model before and after real steps."""
    yolo = ultralytics.YOLO("yolo11n-cls.yaml")
    kept = {}
    yolo.add_callback("on_pretrain_routine_end", lambda trainer: kept.update(before=copy_state(trainer.model)))
    for callback in callbacks:
        callback.add_to(yolo)
    arguments = {"data": str(data), "imgsz": 32, "batch": 4, "device": "cpu", "workers": 0, "plots": False}
    arguments |= {"nbs": 4, "warmup_epochs": 0, "optimizer": "SGD", "lr0": 0.01}  # a step for each batch
    yolo.train(**arguments, epochs=2, project=str(folder), name="run", verbose=False, val=False, **options)
    return yolo.trainer, kept["before"]


def copy_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_a_freeze_holds_through_real_steps_and_the_model_is_given_back(data, tmp_path):
    trainer, before = train(data, tmp_path, FreezeBatchNorm(requires_grad=False))
    torch.save(before, tmp_path / "before.pt")
    torch.save(trainer.model.state_dict(), tmp_path / "after.pt")
    comparison = bntool.diff(tmp_path / "before.pt", tmp_path / "after.pt", expect="frozen")
    assert not comparison.violations
    assert all(change.value == "changed" for change in comparison.others.values())
    layers = [module for module in trainer.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert layers
    assert all(type(layer) is nn.BatchNorm2d and layer.weight.requires_grad for layer in layers)


def test_without_it_they_move(data, tmp_path):
    trainer, before = train(data, tmp_path)
    assert bntool.diff(before, trainer.model, expect="norm-eval").violations


def test_health_is_written_to_the_results(data, tmp_path):
    watch = WatchBatchNorm(every=3)
    trainer, _ = train(data, tmp_path, watch)
    with open(trainer.csv) as stream:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(stream)]
    assert [float(row["batchnorm/nonfinite"]) for row in rows] == [0.0, 0.0]
    assert watch.last.step == 6


def test_a_sick_layer_stops_it(data, tmp_path):
    class Spoil:
        def add_to(self, yolo):
            yolo.add_callback("on_train_batch_start", self.spoil)

        def spoil(self, trainer):
            with torch.no_grad():
                next(m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d)).running_var.fill_(-1.0)

    watch = WatchBatchNorm(every=3)
    train(data, tmp_path, Spoil(), watch)
    assert watch.last.is_sick
    assert watch.last.step == 3
