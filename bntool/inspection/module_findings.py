"""Findings from pickled modules and live models, which say more than tensors: flags, eps, momentum.

What PyTorch does with them: torch.nn.modules.batchnorm, _BatchNorm.forward, torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bntool.batchnorm import BatchNorm, EpsSource, NormKind, find_class_kind
from bntool.graphs.architectures.recognition import Architecture, find_momentum
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.thresholds import DEFAULTS, Thresholds

SAID_BY_FILE = (EpsSource.MODULE, EpsSource.PROTOTXT)


def is_batch_norm_without_statistics(norm: BatchNorm) -> bool:
    """Return whether it is a BatchNorm, by its class, that has no statistics: track_running_stats=False."""
    kind = find_class_kind(norm.class_path.rpartition(".")[2])
    return norm.kind is NormKind.NORM_WITHOUT_STATISTICS and kind is not None and kind.is_batch_norm


def describe_behaviour(norm: BatchNorm) -> tuple[str, ...]:
    """Describe what PyTorch does with a module whose flags are unusual, one sentence each."""
    said = []
    tracks, has_statistics = norm.track_running_stats, norm.has_statistics
    if not has_statistics and is_batch_norm_without_statistics(norm):
        said.append("it has no running statistics and normalises by those of the batch, in eval mode, too")
    elif tracks is False:
        said.append(
            "track_running_stats was switched off: train mode uses the statistics of the batch and does not update the "
            "running ones, eval mode uses the running ones"
        )
    if norm.attributes.get("affine") is False and not norm.affine:
        said.append("it has no weight and bias: it only normalises")
    if has_statistics and tracks is not False and "momentum" in norm.attributes:
        if norm.attributes["momentum"] is None:
            said.append(
                "momentum is None: running statistics are the plain average over all batches that num_batches_tracked "
                "counts"
            )
        elif norm.momentum == 0:
            said.append("momentum is 0: running statistics never move")
        elif norm.momentum == 1:
            said.append("momentum is 1: running statistics are those of the last batch")
    return tuple(said)


class Expected(NamedTuple):
    """The settings of a layer in the architectures that a state dict may be of; empty where none is known."""

    eps: tuple[float, ...] = ()
    momentum: tuple[float, ...] = ()


def find_in_module(norm: BatchNorm, expected: Expected, thresholds: Thresholds = DEFAULTS) -> list[Finding]:
    """Return the findings of one layer from its flags.

    Args:
        expected: what the layer has in the architectures that the file may be of.
    """
    findings = []
    if is_batch_norm_without_statistics(norm):
        message = (
            "it has no running statistics (track_running_stats=False) and normalises by those of the batch, in eval "
            "mode, too: the output for one sample depends on the others"
        )
        advice = "nothing is to be done where that is meant; it can be neither folded nor frozen"
        short = "no statistics"
        findings.append(Finding(FindingCode.BATCH_STATISTICS, Severity.NOTICE, short, message, advice=advice))
    momentum = norm.momentum
    if momentum is not None and norm.has_statistics and "momentum" in norm.attributes:
        if momentum > thresholds.high_momentum or momentum < 0:
            message = (
                f"momentum is {momentum:g}: PyTorch gives the new batch that share, so that the running statistics are "
                "those of the last batches"
            )
            advice = "look at where it comes from: other frameworks call the share that is kept momentum"
            if thresholds.high_momentum < momentum < 1:
                advice += f", and what they call {momentum:g} is {1 - momentum:.3g} here"
            short, facts = f"momentum {momentum:g}", {"momentum": momentum}
            findings.append(Finding(FindingCode.MOMENTUM, Severity.WARNING, short, message, facts, advice))
        elif momentum == 0:
            message = "momentum is 0: the running statistics never move, whatever mode it is trained in"
            advice = "nothing is to be done where that is meant to keep them; else PyTorch's usual one is 0.1"
            facts = {"momentum": 0.0}
            findings.append(Finding(FindingCode.MOMENTUM, Severity.NOTICE, "momentum 0", message, facts, advice))
        elif expected.momentum and not any(math.isclose(momentum, value, rel_tol=1e-6) for value in expected.momentum):
            findings.append(_describe_other_momentum(momentum, expected.momentum))
    if norm.eps is not None and norm.eps_source in SAID_BY_FILE and norm.eps <= 0:
        message = f"eps is {norm.eps:g}: a channel whose variance is 0 is divided by 0"
        advice = "set it to what the model was trained with; PyTorch's usual one is 1e-5"
        findings.append(
            Finding(FindingCode.EPS, Severity.WARNING, f"eps {norm.eps:g}", message, {"eps": norm.eps}, advice)
        )
    elif norm.eps is not None and norm.eps_source in SAID_BY_FILE and expected.eps and norm.eps not in expected.eps:
        values = " or ".join(f"{value:g}" for value in expected.eps)
        message = f"eps is {norm.eps:g}, in the architecture whose names and shapes the tensors have it is {values}"
        advice = "set it back, if the model was trained with that: a converter or a quantisation tool may have reset it"
        found: dict[str, object] = {"eps": norm.eps, "expected": list(expected.eps)}
        findings.append(Finding(FindingCode.EPS, Severity.WARNING, f"eps {norm.eps:g}", message, found, advice))
    return findings


def _describe_other_momentum(momentum: float, expected: Sequence[float]) -> Finding:
    values = " or ".join(f"{value:.3g}" for value in expected)
    message = f"momentum is {momentum:g}, in the architecture whose names and shapes the tensors have it is {values}"
    advice = (
        "nothing is to be done where that was meant; where training goes on, the statistics follow it at another pace"
    )
    facts: dict[str, object] = {"momentum": momentum, "expected": list(expected)}
    return Finding(FindingCode.MOMENTUM, Severity.NOTICE, f"momentum {momentum:g}", message, facts, advice)


def find_expected(architectures: Sequence[Architecture], norms: Sequence[BatchNorm]) -> Mapping[str, Expected]:
    """Find what each layer has in the architectures that a state dict may be of, by layer name.

    Args:
        norms: its layers; momentum is looked up only where one says its own.
    """
    expected: dict[str, Expected] = {}
    has_momentum = any(norm.momentum is not None for norm in norms)
    for architecture in architectures:
        several = tuple(sorted(architecture.choices))
        momentum = find_momentum(architecture) if has_momentum else {}
        for layer in architecture.layers:
            eps = (architecture.eps[layer],) if layer in architecture.eps else several
            expected[layer] = Expected(eps, momentum.get(layer, ()))
    return expected
