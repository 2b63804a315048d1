"""The choice of the file that holds the weights in a hub repository, by the names that libraries look for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bntool.checkpoints.files import quote
from bntool.representation import list_first

CONFIG = "config.json"
# in the order in which transformers, timm and diffusers look for them
_KNOWN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
)
_ENDINGS = (".safetensors", ".pt", ".pth", ".pt2", ".ckpt", ".bin", ".keras", ".h5", ".onnx", ".caffemodel", ".tar")
_RARER_ENDINGS = (".nemo", ".pkl", ".pdparams", ".msgpack", ".hdf5", ".npz", ".params", ".weights", ".mar")
_OF_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
_LISTED = 6


class ChosenFile(NamedTuple):
    """The file that stands for a repository.

    Attributes:
        name: its name.
        reason: which one it is and why, a sentence.
    """

    name: str
    reason: str


def choose_file(names: Sequence[str]) -> ChosenFile | None:
    """Return the weights among the names of the files at the top of a repository; None where none, or several, may be
    them.
    """
    found = [name for name in _KNOWN if name in names]
    if found:
        name, *others = found
        before = f", which libraries load before {' and '.join(map(quote, others))}" if others else ""
        return ChosenFile(name, f"{quote(name)} of it is read{before or ', the weights by the name of it'}")
    likely = list_likely(names)
    return (
        ChosenFile(likely[0], f"{quote(likely[0])} of it is read, the only weights in it") if len(likely) == 1 else None
    )


def list_likely(names: Sequence[str]) -> list[str]:
    """Return the names that look like those of checkpoints; rarer endings count where there are no others."""
    top = sorted(name for name in names if "/" not in name and name not in _OF_TRAINING)
    return next(
        (found for endings in (_ENDINGS, _RARER_ENDINGS) if (found := [n for n in top if n.endswith(endings)])), []
    )


def describe_choice(names: Sequence[str]) -> str:
    """Describe what there is to choose from, where no file was chosen."""
    likely = list_likely(names)
    if not likely:
        return "it holds nothing that is named like a checkpoint"
    return f"it holds several checkpoints: {list_first(list(map(quote, likely)), _LISTED)}; name one of them"
