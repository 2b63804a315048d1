"""BatchNorm layers whose statistics a file does not hold, as far as their other tensors tell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence

from bntool.batchnorm import STATISTICS, BatchNorm, NormKind
from bntool.checkpoints.checkpoint import StateDict
from bntool.graphs.architectures.recognition import recognise
from bntool.inspection.findings import Finding, FindingCode, Severity

_NAMED = r"(?i)(?:^|[._\d])(?:bn|batch_?norm)"  # in the name of a layer
_OF_OTHERS = r"(?i)(?:^|[._\d])(?:gn|ln|(?:group|layer|rms)_?norm)(?:[._\d]|$)"
_COUNTER = "num_batches_tracked"
_HALVES = (*STATISTICS, _COUNTER)
_WAY_OUT = (
    "an [[ignore]] of statistics-missing in bntool.toml says so to a gate, and a file of the whole module "
    "(torch.save(model)) says it by itself"
)
_CONVOLUTION = 3  # dimensions of a weight from which on it is one
_LISTED = 3


def find_missing_statistics(
    state_dict: StateDict, norms: Sequence[BatchNorm], *, not_understood: Collection[str] = ()
) -> list[Finding]:
    """Find BatchNorms without running_mean or running_var, and norms without both that may be BatchNorms.

    What a LayerNorm has, weight and bias, a BatchNorm has, too, where only the parameters were saved. It is taken for
    one where its name says so or where its architecture is recognised; it may be one where a convolution of as many
    channels stands before most of such layers, unless their names say that they are GroupNorms or LayerNorms.

    Args:
        norms: all normalisation layers of the state dict.
        not_understood: layers of which something could not be read: what is not known of them may be there.
    """
    findings = []
    halves = [name for name in _find_halves(state_dict) if name not in not_understood]
    if halves:
        message = f"a part of the statistics of {_list(halves)} is missing: a BatchNorm has {' and '.join(STATISTICS)}"
        findings.append(_make(Severity.WARNING, message, halves))
    without = [norm for norm in norms if norm.kind is NormKind.NORM_WITHOUT_STATISTICS and not norm.class_path]
    doubtful = [norm for norm in without if not re.search(_OF_OTHERS, norm.name)]
    if not doubtful:
        return findings
    behind = set(_find_behind_convolutions(state_dict, doubtful))
    named = [norm.name for norm in doubtful if re.search(_NAMED, norm.name)]
    likely = [norm.name for norm in doubtful if named and (norm.name in behind or norm.name in named)]
    if not likely and 2 * len(behind) < len(doubtful):
        return findings
    recognised = _find_recognised(state_dict, doubtful)
    likely = [norm.name for norm in doubtful if norm.name in likely or norm.name in recognised]
    if likely:
        layers = "1 layer has" if len(likely) == 1 else f"{len(likely)} layers have"
        message = f"{layers} weight and bias without statistics ({_list(likely)}): BatchNorms by their names" + (
            " and shapes" if recognised else ""
        )
        findings.append(_make(Severity.WARNING, message, likely))
    else:
        count = len(behind)
        message = (
            f"{_list(sorted(behind))}: weight and bias behind a convolution, without statistics: may be a BatchNorm "
            "without its statistics, or a GroupNorm or LayerNorm, which have none"
        )
        left_open = f"{count} layer{'s' * (count > 1)} that may be a BatchNorm without its statistics"
        finding = _make(Severity.NOTICE, message, sorted(behind))
        advice = f"{finding.advice}. If they are GroupNorms or LayerNorms, {_WAY_OUT}"
        findings.append(finding._replace(leaves_open=left_open, advice=advice))
    return findings


def describe_missing(names: Sequence[str], other: str) -> Finding:
    """Return layers that have statistics in another copy of the model and none here.

    Args:
        other: the copy that has them.
    """
    message = f"{len(names)} layers ({_list(names)}) have no statistics here, those of {other} have"
    return _make(Severity.WARNING, message, names)


def _make(severity: Severity, message: str, layers: Sequence[str]) -> Finding:
    return Finding(
        FindingCode.STATISTICS_MISSING,
        severity,
        "statistics missing",
        message,
        advice="save model.state_dict(), which has the buffers; named_parameters() has none. bntool recalibrate gives "
        "a file its statistics from data",
        layers=tuple(layers),
    )


def _find_halves(state_dict: StateDict) -> Iterator[str]:
    for name, tensor in state_dict.tensors.items():
        if not name.endswith(_HALVES):
            continue
        layer, _, leaf = name.rpartition(".")
        dotted = f"{layer}." if layer else ""
        if leaf == _COUNTER:
            others = [f"{dotted}{role}" in state_dict.tensors for role in (*STATISTICS, "running_std")]
            is_half = not any(others) and f"{dotted}weight" in state_dict.tensors
        elif leaf in STATISTICS and len(tensor.shape) == 1:
            other = STATISTICS[1 - STATISTICS.index(leaf)]
            known = (other, "running_std", "v")
            is_half = not any(f"{dotted}{role}" in state_dict.tensors for role in known)
            is_half = is_half and f"{dotted}weight" in state_dict.tensors
        else:
            continue
        if is_half:
            yield state_dict.strip(layer)


def _find_behind_convolutions(state_dict: StateDict, norms: Sequence[BatchNorm]) -> Iterator[str]:
    """Yield the norms before whose weight the weight of a convolution with as many channels stands, and perhaps its
    bias.
    """
    channels = {norm.name: norm.num_features for norm in norms}
    before: tuple[int, ...] = ()
    for name, tensor in state_dict.tensors.items():
        layer, _, leaf = state_dict.strip(name).rpartition(".")
        if leaf == "weight" and layer in channels:
            if len(before) >= _CONVOLUTION and channels[layer] in before[:2]:
                yield layer
            before = ()
        elif len(tensor.shape) > 1:
            before = tuple(tensor.shape)


def _find_recognised(state_dict: StateDict, norms: Sequence[BatchNorm]) -> frozenset[str]:
    """Find the norms that are BatchNorms in an architecture that the state dict would be of, if it had their
    statistics.
    """
    dotted = {norm.name: state_dict.full_name(norm.name) for norm in norms}
    statistics = {
        f"{full}.{role}": norm.tensors["weight"] for norm in norms for role in STATISTICS if (full := dotted[norm.name])
    }
    whole = dataclasses.replace(state_dict, tensors={**state_dict.tensors, **statistics}, stored=state_dict.tensors)
    return frozenset(layer for architecture in recognise(whole) for layer in architecture.layers)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
