"""Which command lines are run: every command over every file there is, with each of its options somewhere."""

from __future__ import annotations

import itertools
from pathlib import Path

ENDINGS = {
    ".pt", ".pth", ".th", ".tar", ".safetensors", ".pt2", ".ckpt", ".pkl", ".keras", ".h5", ".onnx", ".caffemodel",
    ".index", ".metadata", ".msgpack", ".npz",
}  # fmt: skip
DIGITS = ["--model", "samples/digits_net.py:build"]
TRAIN, TEST = "samples/digits_train.npz", "samples/digits_test.npz"


def list_command_lines(inputs: Path) -> dict[str, list[str]]:
    """The arguments by the name of the run; outputs are written to ``out/`` under that name."""
    files = [
        str(path.relative_to(inputs))
        for path in sorted(inputs.rglob("*"))
        if path.is_file() and (path.suffix in ENDINGS or path.name == ".metadata")
    ]
    lines: dict[str, list[str]] = {}

    def add(*arguments: str, suffix: str = "") -> None:
        name = f"{len(lines):04} {' '.join(arguments)}"
        lines[name] = [*arguments, *(["-o", f"out/{len(lines):04}{suffix}"] if suffix else [])]

    for command in ([], *[[name] for name in ("inspect", "recalibrate", "freeze", "fold", "diff", "convert")]):
        add(*command, "--help")
    for file in files:
        _add_for_file(add, file)
    for options in (["--json"], ["--all"], ["--stats"], ["--verify-crc", "--json"], ["--fail-on", "warning"]):
        add("inspect", *options, "samples/digits_module.pt")
        add("inspect", *options, "samples/dead_channels.pt", "samples/missing.pt", "samples/digits_training.pt")
    samples = [file for file in files if file.startswith("samples/digits") and not file.endswith(".npz")]
    for a, b in itertools.product(samples, [*samples, "samples/drifted.pt", "samples/broken_nan_variance.pt"]):
        if a <= b:
            add("diff", a, b, *(["--json"] if len(lines) % 2 else ["--all"]))
    for expect in ("frozen", "norm-eval", "stats-only", "identical"):
        add("diff", "samples/digits.pt", "samples/drifted.pt", "--expect", expect)
    _add_live(add)
    _add_usage_errors(add)
    return lines


def _add_for_file(add, file: str) -> None:
    suffix = Path(file).suffix or ".pt"
    add("inspect", file)
    add("inspect", file, "--json", "--all")
    if suffix == ".npz":
        return
    prototxt = ["--prototxt", file.replace(".caffemodel", ".prototxt")] if suffix == ".caffemodel" else []
    if any(part in Path(file).name for part in (".folded.", ".same-keys.", "_folded.")):  # what other tests hold
        return
    add("convert", file, "--to", "torch" if suffix == ".safetensors" else "safetensors", suffix=".converted")
    add("convert", file, "--to", "frozen-batchnorm", "--eps", "1e-5", "--json", suffix=suffix)
    add("freeze", file, "--no-requires-grad", "--layers", "*1*", *prototxt, suffix=suffix)
    add("freeze", file, "--as", "constant", "--json", *prototxt, suffix=suffix)
    add("fold", file, *prototxt, suffix=suffix)
    add("fold", file, "--layout", "same-keys", "--json", *prototxt, suffix=suffix)


def _add_live(add) -> None:
    for checkpoint in ("digits.pt", "drifted.pt", "broken_never_updated.pt", "dead_channels.pt", "digits.safetensors"):
        path, suffix = f"samples/{checkpoint}", Path(checkpoint).suffix
        add("fold", path, *DIGITS, suffix=suffix)
        add("fold", path, *DIGITS, "--layout", "same-keys", "--json", "--data", TEST, suffix=suffix)
        for method in ("pooled", "exact", "paper"):
            data = ["--data", TRAIN, "--eval-data", TEST, "--samples", "300"]
            add("recalibrate", path, *DIGITS, *data, "--method", method, suffix=suffix)
        add(
            "recalibrate",
            path,
            *DIGITS,
            "--data",
            TEST,
            "--prior",
            "100",
            "--json",
            "--batch-size",
            "50",
            suffix=suffix,
        )
        add("recalibrate", path, *DIGITS, "--data", TEST, "--dry-run", "--layers", "layer1*")
    path = "samples/digits.pt"
    for emit in ("python", "mmdet", "mmengine", "lightning", "timm", "accelerate"):
        add("freeze", path, "--emit", emit, "--frozen-stages", "1")
    pairs = ["--pair", "conv1=bn1", "--pair", "layer1.0.conv1=layer1.0.bn1"]
    add("fold", path, *pairs, "--eps", "1e-5", suffix=".pt")
    add("fold", path, *pairs, "--eps", "1e-5", "--layout", "same-keys", suffix=".pt")
    add("fold", path, "--pair", "conv1=nothing", "--eps", "1e-5", suffix=".pt")
    add("fold", path, *DIGITS, "--input-shape", "2,1,8,8", "--layers", "layer2.*", "--strict", suffix=".pt")
    add("fold", "samples/digits_training.pt", *DIGITS, "--state-dict", "ema_state_dict", suffix=".pt")
    add("recalibrate", "samples/digits_training.pt", *DIGITS, "--data", TRAIN, "--keep-if-better", suffix=".pt")
    add("recalibrate", path, *DIGITS, "--data", TRAIN, "--metric", "top5", "--precision", "bfloat16", suffix=".pt")
    add("recalibrate", "fixtures/torch_tiny.pth", *DIGITS, "--data", TRAIN, suffix=".pt")


def _add_usage_errors(add) -> None:
    for command in ("recalibrate", "freeze", "fold", "convert"):
        add(command, "samples/digits.pt")
        add(command, "samples/missing.pt", "--json", suffix=".pt")
        add(command, "samples/digits.pt", "--layers", "nothing*", suffix=".pt")
    add("inspect")
    add("inspect", "samples/digits.pt", "--layers", "nothing*")
    add("inspect", "samples/digits.pt", "--state-dict", "nothing", "--json")
    add("diff", "samples/digits.pt")
    add("convert", "samples/digits.pt", "--to", "nothing", suffix=".pt")
    add("recalibrate", "samples/digits.pt", "--model", "nothing:build", "--data", TRAIN, suffix=".pt")
    add("recalibrate", "samples/digits.pt", *DIGITS, "--data", "nothing.npz", suffix=".pt")
    add("recalibrate", "samples/digits.pt", *DIGITS, "--data", TRAIN, "--batch-size", "0", suffix=".pt")
