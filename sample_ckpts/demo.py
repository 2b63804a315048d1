"""The whole story on the sample checkpoints, as ``make demo`` runs it.

Inspect a checkpoint whose statistics come from another domain, recalibrate it on the right data, freeze it, fold it,
inspect it again, and see that the folded model answers as the recalibrated one does.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent / "demo_out"
MODEL = ("--model", "sample_ckpts/digits_net.py:build")

STORY = (
    ("What is in this file, and what is wrong with it?", ("inspect", "sample_ckpts/drifted.pt")),
    (
        "Its statistics rest on one batch. How far are they from those of the training data?",
        (
            *("recalibrate", "sample_ckpts/drifted.pt", *MODEL, "--data", "sample_ckpts/digits_train.npz"),
            *("--eval-data", "sample_ckpts/digits_test.npz", "-o", "demo_out/recalibrated.pt", "--force"),
        ),
    ),
    (
        "For fine-tuning, record that the statistics shall stay.",
        ("freeze", "demo_out/recalibrated.pt", "-o", "demo_out/frozen.pt", "--force"),
    ),
    (
        "For deployment, fold every BatchNorm into the layer before it.",
        ("fold", "demo_out/recalibrated.pt", *MODEL, "-o", "demo_out/folded.pt", "--force"),
    ),
    ("What does the folded file hold?", ("inspect", "demo_out/folded.pt")),
    ("And what changed on the way?", ("diff", "sample_ckpts/drifted.pt", "demo_out/recalibrated.pt")),
)


def tell(sentence: str) -> None:
    print(f"\n\x1b[1m# {sentence}\x1b[0m" if sys.stdout.isatty() else f"\n# {sentence}", flush=True)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for sentence, arguments in STORY:
        tell(sentence)
        print("$ bntool " + shlex.join(arguments), flush=True)
        subprocess.run([sys.executable, "-m", "bntool", *arguments], check=True, cwd=HERE.parent)
    compare_outputs()


def compare_outputs() -> None:
    """The folded network, loaded into the unmodified class, against the recalibrated one, on the test digits."""
    import numpy as np
    import torch

    import bntool

    sys.path.insert(0, str(HERE))
    from digits_net import build

    tell("Do the folded and the recalibrated model agree?")
    test = np.load(HERE / "digits_test.npz")
    images, labels = torch.from_numpy(test["images"]), torch.from_numpy(test["labels"])
    recalibrated = build()
    recalibrated.load_state_dict(torch.load(OUT / "recalibrated.pt", weights_only=True))
    folded = bntool.load_folded(build(), OUT / "folded.pt")
    with torch.no_grad():
        before, after = recalibrated.eval()(images), folded.eval()(images)
    accuracy = [(answer.argmax(1) == labels).double().mean().item() for answer in (before, after)]
    difference = (before - after).abs().max().item() / before.abs().max().item()
    print(f"accuracy {accuracy[0]:.2%} and {accuracy[1]:.2%}, largest relative difference of outputs {difference:.1e}")
    if difference > 1e-5 or accuracy[0] != accuracy[1] or accuracy[0] < 0.97:
        raise SystemExit("the demo did not end as it should")
    tell("To go on by yourself")
    activate = os.path.relpath(Path(sys.prefix) / "bin" / "activate")
    print(f"source {shlex.quote(activate)}\nbntool inspect demo_out/folded.pt")


if __name__ == "__main__":
    main()
