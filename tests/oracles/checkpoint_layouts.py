"""Small checkpoints as training frameworks write them, and what the frameworks find in them.

Without an argument it holds tests/fixtures/layouts/expected.json against what the frameworks load from the recorded
files; with --record it writes the files and expected.json anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.places import FIXTURES

REQUIREMENTS = [
    "torch==2.13.0",
    "lightning==2.6.6",
    "timm==1.0.31",
    "mmengine==0.10.7",
    "fastai==2.8.12",
    "ultralytics==8.4.190",
]
FOLDER = FIXTURES / "layouts"


def ignore_missing_operators() -> None:
    """Wheels of torchvision that want CUDA cannot be imported beside a CPU torch otherwise; none of it is used here."""
    import torch

    register = torch.library.register_fake

    def skip(name: Any, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *arguments, **keywords)

    torch.library.register_fake = skip


def build() -> Any:
    """Conv, BatchNorm (eps and momentum of its own), ReLU, linear head: 200 elements."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.03),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def data() -> Any:
    import torch

    torch.manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(16, 1, 6, 6) + 1, torch.randint(0, 2, (16,)))


def record_lightning(folder: Path) -> None:
    import lightning
    import torch
    from torch import nn

    class Classifier(lightning.LightningModule):
        def __init__(self, rate: float, options: argparse.Namespace) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = build()

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.hparams["rate"])

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = Classifier(0.01, argparse.Namespace(width=4))
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=4))
    trainer.save_checkpoint(folder / "lightning.ckpt")


def record_timm(folder: Path) -> None:
    import torch
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = build()
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, after=lambda: ema.update(model))
    with tempfile.TemporaryDirectory() as place:
        args = argparse.Namespace(model="tiny", lr=0.1, opt="sgd")
        saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=place, recovery_dir=place)
        saver.save_checkpoint(3, metric=0.5)
        shutil.copy(Path(place) / "last.pth.tar", folder / "timm_ema.pth.tar")


def train(model: Any, optimizer: Any, after: Any = lambda: None) -> None:
    from torch import nn
    from torch.utils.data import DataLoader

    for batch, target in DataLoader(data(), batch_size=4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()
        after()


def record_mmengine(folder: Path) -> None:
    import torch
    from mmengine.hooks import EMAHook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch import nn

    class Classifier(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build()

        def forward(self, inputs: Any, labels: Any = None, mode: str = "tensor") -> Any:
            scores = self.backbone(inputs)
            return {"loss": nn.functional.cross_entropy(scores, labels)} if mode == "loss" else scores

    runner = Runner(
        model=Classifier(),
        work_dir="work",
        train_dataloader=torch.utils.data.DataLoader(data(), batch_size=4),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        custom_hooks=[EMAHook(momentum=0.5)],
        default_hooks={"logger": {"type": "LoggerHook", "interval": 1}},
        log_level="ERROR",
        experiment_name="tiny",
    )
    runner.train()
    shutil.copy("work/epoch_1.pth", folder / "mmengine_ema.pth")


def record_fastai(folder: Path) -> None:
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import Datasets
    from fastai.data.transforms import ItemGetter
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat

    items, whole = list(data()), list(range(16))
    sets = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=[whole, whole])
    loaders = sets.dataloaders(bs=4, num_workers=0)
    learner = Learner(loaders, build(), loss_func=CrossEntropyLossFlat(), path=folder, model_dir=".")
    learner.remove_cb(ProgressCallback)
    with learner.no_logging():
        learner.fit(1)
    learner.export("fastai_export.pkl")
    learner.save("fastai_model", with_opt=True)


def record_ultralytics(folder: Path) -> None:
    from ultralytics import YOLO

    config = Path("tiny-cls.yaml")
    config.write_text("nc: 2\nbackbone:\n - [-1, 1, Conv, [8, 3, 2]]\nhead:\n - [-1, 1, Classify, [nc]]\n")
    model = YOLO(str(config), task="classify", verbose=False)
    model.save(folder / "ultralytics.pt")


def record_distributed(folder: Path) -> None:
    """Two processes, tensors cut along both dimensions."""
    import torch

    target = folder / "distributed"
    shutil.rmtree(target, ignore_errors=True)
    torch.multiprocessing.spawn(save_distributed, args=("distributed",), nprocs=2)
    shutil.copytree("distributed", target)


def distributed_state() -> dict[str, Any]:
    import torch

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7}


def save_distributed(rank: int, target: str) -> None:
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29631")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    state = distributed_state()
    weights = state["model"]
    for name, dimension in (("0.weight", 0), ("1.running_mean", 0), ("1.running_var", 0), ("5.weight", 1)):
        weights[name] = distribute_tensor(weights[name], mesh, [Shard(dimension)])
    checkpoint.save(state, checkpoint_id=target)
    torch.distributed.destroy_process_group()


def load(path: Path) -> dict[str, Mapping[str, Any]]:
    """The state dicts of a recorded file, by key, as its framework loads them."""
    import torch

    if path.is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.TemporaryDirectory() as place:
            dcp_to_torch_save(path, Path(place) / "whole.pt")
            whole = torch.load(Path(place) / "whole.pt", weights_only=False)
        return {"model": whole["model"]}
    if path.name == "fastai_export.pkl":
        from fastai.learner import load_learner

        return {"model": load_learner(path).model.state_dict()}
    whole = torch.load(path, map_location="cpu", weights_only=False)
    if path.name == "ultralytics.pt":
        return {"model": whole["model"].state_dict()}
    return {key: whole[key] for key in ("state_dict", "state_dict_ema", "ema_state_dict", "model") if key in whole}


def describe(path: Path) -> dict[str, Any]:
    found = {}
    for key, tensors in load(path).items():
        found[key] = {
            name: [str(t.dtype).removeprefix("torch."), list(t.shape), digest(t)] for name, t in tensors.items()
        }
    return found


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def main() -> int:
    """Record, or compare."""

    warnings.simplefilter("ignore")
    ignore_missing_operators()
    makers = (record_lightning, record_timm, record_mmengine, record_fastai, record_ultralytics, record_distributed)
    if "--record" in sys.argv:
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)  # files name where they were made: let that be nowhere
            for make in makers:
                make(FOLDER)
            os.chdir(FOLDER)
    files = sorted(path for path in FOLDER.iterdir() if path.suffix != ".json")
    found = {path.name: describe(path) for path in files}
    recorded = FOLDER / "expected.json"
    if "--record" in sys.argv:
        recorded.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    wrong = [name for name in found if found[name] != json.loads(recorded.read_text()).get(name)]
    print(f"differ: {wrong}" if wrong else f"{len(found)} files hold what was recorded")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
