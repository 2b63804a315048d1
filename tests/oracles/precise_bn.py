"""What fvcore's update_bn_stats, torch's update_bn and mmpretrain's PreciseBNHook store.

``--record`` writes the fixture of the tests.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from tests.places import FIXTURES

REQUIREMENTS = [
    "torch==2.13.0", "fvcore", "mmpretrain==1.2.0", "mmcv-lite==2.1.0", "mmengine==0.10.7", "setuptools",
    "typer>=0.26,<0.29",
]  # fmt: skip
FIXTURE = FIXTURES / "precise_bn.json"


@functools.cache
def load_hook() -> types.ModuleType:
    """The module of mmpretrain's hook; alone, for the package around it asks for torchvision."""
    import mmpretrain

    path = Path(mmpretrain.__file__).parent / "engine" / "hooks" / "precise_bn_hook.py"
    specification = importlib.util.spec_from_file_location("precise_bn_hook", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run_hook(model: nn.Module, batches: list[torch.Tensor], *, samples: int = 8192) -> nn.Module:
    """Let the hook update a model in train mode; 8192 samples is what it asks for if nobody says otherwise."""
    from mmengine.model import BaseModel

    class Wrapped(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.wrapped(inputs)

    loader = DataLoader([{"inputs": image} for image in torch.cat(batches)], batch_size=len(batches[0]))
    assert [len(batch["inputs"]) for batch in loader] == [len(batch) for batch in batches]
    hook = load_hook()
    with mock.patch.object(hook, "ProgressBar"):
        hook.update_bn_stats(Wrapped().train(), loader, samples, logger="silent")
    return model


def ask_mmpretrain() -> dict[str, dict[str, list[float]]]:
    """What the hook stores in every case, and where it is asked for fewer samples than there are."""
    from tests.recalibration.calibration_network import CASES, DIGITS, build_model, make_batches, read_statistics

    answers = {}
    for case in (*CASES, *DIGITS):
        torch.manual_seed(0)
        answers[case] = read_statistics(run_hook(build_model(case), make_batches(case)))
    outliers = "a small last batch of outliers"
    # 26 are what there is; 7 are fewer than one batch
    for samples in (26, 7):
        model = run_hook(build_model(outliers), make_batches(outliers), samples=samples)
        answers[f"{outliers}, {samples} samples"] = read_statistics(model)
    return answers


def main() -> int:
    """Run all on every case and hold the fixture against them."""
    from fvcore.nn.precise_bn import update_bn_stats

    from tests.recalibration.calibration_network import CASES, Network, make_batches

    answers: dict[str, dict[str, dict[str, list[float]]]] = {"fvcore": {}, "update_bn": {}}
    for case, (sizes, _, dropout) in CASES.items():
        torch.manual_seed(0)
        model = Network(dropout).train()
        update_bn_stats(model, make_batches(case), len(sizes), progress=None)
        answers["fvcore"][case] = model.statistics()
        model = Network(dropout)
        update_bn(make_batches(case), model)
        answers["update_bn"][case] = model.statistics()
    answers["mmpretrain"] = ask_mmpretrain()
    if "--record" in sys.argv:
        FIXTURE.write_text(json.dumps(answers, indent=1) + "\n")
    recorded = json.loads(FIXTURE.read_text())
    worst = 0.0
    for project, cases in answers.items():
        for case, statistics in cases.items():
            if case == "mean 1e3":
                continue  # noise of float32 is what this case is about
            for name, values in statistics.items():
                old = torch.tensor(recorded[project][case][name])
                worst = max(worst, float((torch.tensor(values) - old).abs().max()))
    print(f"largest difference to what is recorded: {worst:.1e}")
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
