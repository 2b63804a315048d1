"""The choices of folding, apart from the code that folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Layout(Enum):
    """The layout of a folded state dict."""

    FOLDED = "folded"  # the BatchNorms are gone, their producers have biases
    DEPLOY = "deploy"  # parallel branches are one convolution, as the model's own code has it for inference
    SAME_KEYS = "same-keys"  # producers take the scales; BatchNorms stay and only add their shifts


class ProgramKind(Enum):
    """The form of a written program, by the suffix of its file."""

    PT2 = ".pt2"  # torch.export, run by torch
    ONNX = ".onnx"  # run by ONNX Runtime and others


@dataclass(frozen=True)
class FoldOptions:
    """What is asked of a fold, of a file or a live model.

    Attributes:
        layers: globs of BatchNorms to fold; none for all.
        layout: what becomes of the keys.
        eps: of BatchNorms whose eps nothing tells.
        change_padding: convolutions of a traced model may pad with other values than zeros, which no file can say.
        direct_only: nothing but the convolution or linear right before a BatchNorm takes it: no other weight changes.
    """

    layers: Sequence[str] = ()
    layout: Layout = Layout.FOLDED
    eps: float | None = None
    change_padding: bool = False
    direct_only: bool = False
