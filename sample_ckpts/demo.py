"""The whole story on the sample checkpoints, as ``make demo`` runs it.

Inspect a checkpoint whose statistics come from another domain, recalibrate it on the right data, freeze it, fold it,
inspect it again, and see that the folded model answers as the recalibrated one does. Then train on for some epochs with
a damaged batch in one of them, and find that epoch, in a table and as a page for a browser.
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
EPOCHS, BROKEN_EPOCH = 8, 5
PAGE = "demo_out/epochs.html"


def tell(sentence: str) -> None:
    print(f"\n\x1b[1m# {sentence}\x1b[0m" if sys.stdout.isatty() else f"\n# {sentence}", flush=True)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for sentence, arguments in STORY:
        tell(sentence)
        run(arguments)
    compare_outputs()
    tell(f"{EPOCHS} more epochs of training, of which one read a damaged batch. The loss looked well again. Which one?")
    paths = train_epochs()
    run(("inspect", *(str(path.relative_to(HERE.parent)) for path in paths), "--html", PAGE, "--force"))
    tell(f"{PAGE} shows it in a browser: layers by epochs, and the epoch that broke channel by channel")
    tell("To go on by yourself")
    activate = os.path.relpath(Path(sys.prefix) / "bin" / "activate")
    print(f"source {shlex.quote(activate)}\nbntool inspect demo_out/folded.pt")


def run(arguments: tuple[str, ...]) -> None:
    print("$ bntool " + shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "bntool", *arguments], check=True, cwd=HERE.parent)


def train_epochs() -> list[Path]:
    """Train the recalibrated network on and save each epoch; one batch of one epoch is damaged."""
    import numpy as np
    import torch
    from digits_net import build

    torch.manual_seed(0)
    train = np.load(HERE / "digits_train.npz")
    images, labels = torch.from_numpy(train["images"]), torch.from_numpy(train["labels"])
    model = build().train()
    model.load_state_dict(torch.load(OUT / "recalibrated.pt", weights_only=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    paths = []
    for epoch in range(EPOCHS):
        for number, index in enumerate(torch.randperm(len(labels)).split(64)):
            batch = images[index]
            if epoch == BROKEN_EPOCH and number == 20:
                batch = batch.where(batch < 1, torch.nan)
            loss = torch.nn.functional.cross_entropy(model(batch), labels[index])
            if loss.isfinite():  # as with mixed precision; the statistics have moved by then
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        paths.append(OUT / f"epoch_{epoch}.pt")
        torch.save({"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, paths[-1])
    return paths


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


if __name__ == "__main__":
    main()
