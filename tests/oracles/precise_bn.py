"""What fvcore's update_bn_stats and torch's update_bn store; ``--record`` writes the fixture of the tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).parents[2]))

REQUIREMENTS = ["torch==2.13.0", "fvcore", "typer>=0.20,<0.29"]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "precise_bn.json"


def main() -> int:
    """Run both on every case and hold the fixture against them."""
    from fvcore.nn.precise_bn import update_bn_stats

    from tests.operations.calibration_network import CASES, Network, make_batches

    torch.set_num_threads(1)
    answers: dict[str, dict[str, dict[str, list[float]]]] = {"fvcore": {}, "update_bn": {}}
    for case, (sizes, _, dropout) in CASES.items():
        torch.manual_seed(0)
        model = Network(dropout).train()
        update_bn_stats(model, make_batches(case), len(sizes), progress=None)
        answers["fvcore"][case] = model.statistics()
        model = Network(dropout)
        update_bn(make_batches(case), model)
        answers["update_bn"][case] = model.statistics()
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
