"""Code that ``bntool freeze --emit`` prints, run in the framework that it is for.

Run by ``make oracles`` in an environment of its own. Frameworks that are not installed are named and passed over.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import tempfile
import warnings

import torch
from torch import nn

from bntool.freezing.emission import emit_freeze
from bntool.freezing.live import freeze
from bntool.freezing.options import EmitTarget
from bntool.freezing.policy import FreezePolicy
from bntool.freezing.stages import find_frozen_stages
from tests.fixtures.models.mmdet_resnet import Detector, detector

REQUIREMENTS = [
    "torch==2.13.0",
    "torchvision==0.28.0",
    "mmdet==3.3.0",
    "mmcv-lite==2.1.0",
    "mmengine",
    "lightning",
    "timm",
    "accelerate",
]


def stand_in_for_vision_operators():
    """torchvision's binary may be for another build of torch: nothing here uses its operators, but it names two."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)
    except ImportError:
        pass


KEPT: list[object] = []


def batchnorms(model):
    return tuple(n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def make_policies(model):
    names = batchnorms(model)
    backbone = tuple(name for name in names if name.startswith("backbone."))
    stages = find_frozen_stages([name for name, _ in model.named_modules()], 1)
    return {
        "norm_eval": FreezePolicy(layers=names),
        "both, backbone": FreezePolicy(requires_grad=False, layers=backbone),
        "both, backbone, stage 1": FreezePolicy(requires_grad=False, layers=backbone, stages=stages),
    }


def apply(model, policy):
    """The same freeze by bntool in a live model: the side to compare with."""
    stages = policy.stages
    freeze(
        model,
        norm_eval=policy.norm_eval,
        requires_grad=policy.requires_grad,
        layers=list(policy.layers),
        frozen_stages=None if stages is None else stages.frozen_stages,
    )
    return model.train()


def facts(model):
    return (
        {name for name, p in model.named_parameters() if not p.requires_grad},
        {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.training},
    )


def emitted(policy, target):
    return emit_freeze(policy, target, batchnorms=batchnorms(detector()))


def run_python(policy):
    model = detector().train()
    namespace = {}
    exec(emitted(policy, EmitTarget.PYTHON), namespace)
    namespace["freeze"](model)
    return facts(model)


def run_accelerate(policy):
    from accelerate import Accelerator

    model = detector().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    namespace = {"model": model, "optimizer": optimizer, "accelerator": Accelerator(cpu=True)}
    exec(emitted(policy, EmitTarget.ACCELERATE), namespace)
    return facts(namespace["model"].train())


def run_lightning(policy):
    import lightning

    seen = {}

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = detector()

        def training_step(self, batch, index):
            seen["facts"] = facts(self.model)
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    options = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    code = emitted(policy, EmitTarget.LIGHTNING).replace(
        "lightning.Trainer(",
        f"lightning.Trainer(enable_progress_bar=False, enable_model_summary=False, **{options!r}, ",
    )
    namespace = {}
    exec(code, namespace)
    module = Module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    namespace["trainer"].fit(module, torch.utils.data.DataLoader(torch.randn(16, 3, 32, 32), batch_size=4))
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    kept = {f"model.{n}.running_mean" for n in policy.layers} & moved
    assert not kept, kept
    assert moved
    assert type(module) is Module, "given back as it was"
    assert all(p.requires_grad for p in module.parameters())
    return seen["facts"]


def run_mmengine(policy):
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    seen = {}

    class Model(BaseModel, Detector):
        def __init__(self):
            BaseModel.__init__(self)
            inner = detector()
            for name, child in inner.named_children():
                self.add_module(name, child)

        def forward(self, inputs, data_samples=None, mode="loss"):
            seen["facts"] = facts(self)
            return {"loss": Detector.forward(self, torch.stack(inputs)).square().mean()}

    namespace = {}
    exec(emitted(policy, EmitTarget.MMENGINE), namespace)
    for module in namespace["custom_imports"]["imports"]:
        importlib.import_module(module)
    model = Model()
    data = [{"inputs": torch.randn(3, 32, 32)} for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model=model,
            work_dir=folder,
            train_dataloader={
                "dataset": data,
                "batch_size": 4,
                "num_workers": 0,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
                "collate_fn": {"type": "pseudo_collate"},
            },
            train_cfg={"by_epoch": True, "max_epochs": 2},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            custom_hooks=namespace["custom_hooks"],
            default_hooks={"checkpoint": None, "logger": None},
            default_scope="mmengine",
            log_level="ERROR",
        )
        before = {k: v.clone() for k, v in model.state_dict().items()}
        runner.train()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not {f"{n}.running_mean" for n in policy.layers} & moved
    assert moved
    return seen["facts"]


def run_timm(policy):
    model = detector().train()
    namespace = {"model": model}
    exec(emitted(policy, EmitTarget.TIMM), namespace)
    model.train()
    without = {name for name, p in model.named_parameters() if not p.requires_grad}
    # what were parameters of a FrozenBatchNorm2d are buffers now: they do not train either
    swapped = {n for n, m in model.named_modules() if type(m).__name__ == "FrozenBatchNorm2d"}
    return without | {f"{n}.{leaf}" for n in swapped for leaf in ("weight", "bias")}, swapped


def run_mmdet(policy):
    from tests.oracles.mmdet_freezing import stand_in_for_compiled_operators

    stand_in_for_compiled_operators()
    from mmdet.models.backbones import ResNet

    namespace = {}
    exec(emitted(policy, EmitTarget.MMDET), namespace)
    options = namespace["model"]["backbone"]
    small = {"depth": 50, "base_channels": 2, "stem_channels": 2}
    theirs = ResNet(**small, **{"norm_cfg": {"type": "BN", "requires_grad": True}, **options})
    theirs.train()  # mmdet's returns nothing
    mine = ResNet(**small, norm_cfg={"type": "BN", "requires_grad": True}, norm_eval=False, frozen_stages=-1)
    apply_to_backbone(mine, policy)
    assert facts(theirs) == facts(mine), "mmdet and bntool freeze the same"


def apply_to_backbone(model, policy):
    stages = policy.stages
    freeze(
        model,
        norm_eval=policy.norm_eval,
        requires_grad=policy.requires_grad,
        frozen_stages=None if stages is None else stages.frozen_stages,
    )
    model.train()


def main() -> int:
    """Run every framework that is there with every policy that it can express."""
    warnings.simplefilter("ignore")
    stand_in_for_vision_operators()
    runners = {
        "python": run_python,
        "accelerate": run_accelerate,
        "lightning": run_lightning,
        "mmengine": run_mmengine,
        "timm": run_timm,
        "mmdet": run_mmdet,
    }
    failures = 0
    for name, run in runners.items():
        for title, policy in make_policies(detector()).items():
            if (name == "timm" and policy.requires_grad is None) or (name == "mmdet" and title == "norm_eval"):
                continue  # refused: its own means cannot express it
            expected = facts(apply(detector(), policy))
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    found = run(policy)
            except ImportError as error:
                print(f"{name}: passed over, {error}")
                break
            ok = found is None or found == expected
            failures += not ok
            print(f"{name}, {title}: {'the same layers and parameters' if ok else f'NOT the same: {found} {expected}'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
