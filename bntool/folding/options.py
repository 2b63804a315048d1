"""The choices of folding, apart from the code that folds."""

from __future__ import annotations

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
