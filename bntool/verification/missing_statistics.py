"""BatchNorms whose statistics a state dict does not hold, as far as their other tensors tell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from bntool.batchnorm import BUFFERS, COUNTER, STATISTICS, BatchNorm, NormKind
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import NotUnderstood, StateDict
from bntool.checkpoints.files import quote
from bntool.graphs.architectures.recognition import recognise
from bntool.representation import list_first

_NAMED = r"(?i)(?:^|[._\d])(?:bn|batch_?norm)"  # in the name of a layer
_OF_OTHERS = r"(?i)(?:^|[._\d])(?:gn|ln|(?:group|layer|rms)_?norm)(?:[._\d]|$)"
_CONVOLUTION = 3  # dimensions of a weight from which on it is one


@dataclass(frozen=True)
class MissingStatistics:
    """Layers without their statistics, by name.

    Attributes:
        halves: have a part of them.
        likely: have weight and bias, and are BatchNorms by their names or shapes.
        possible: have weight and bias behind a convolution, and may be BatchNorms; none where some are likely.
        is_recognised: the shapes are those of a known architecture.
    """

    halves: tuple[str, ...] = ()
    likely: tuple[str, ...] = ()
    possible: tuple[str, ...] = ()
    is_recognised: bool = False


def find_missing_statistics(
    state_dict: StateDict, norms: Sequence[BatchNorm], *, not_understood: Collection[str] = ()
) -> MissingStatistics:
    """Find BatchNorms without running_mean or running_var, and norms without both that may be BatchNorms.

    What a LayerNorm has, weight and bias, a BatchNorm has, too, where only the parameters were saved. It is taken for
    one where its name says so or where its architecture is recognised; it may be one where a convolution of as many
    channels stands before most of such layers, unless their names say that they are GroupNorms or LayerNorms.

    Args:
        norms: all normalisation layers of the state dict.
        not_understood: layers of which something could not be read: what is not known of them may be there.
    """
    halves = tuple(name for name in _find_halves(state_dict) if name not in not_understood)
    without = [norm for norm in norms if norm.kind is NormKind.NORM_WITHOUT_STATISTICS and not norm.class_path]
    doubtful = [norm for norm in without if not re.search(_OF_OTHERS, norm.name)]
    behind = set(_find_behind_convolutions(state_dict, doubtful))
    named = [norm.name for norm in doubtful if re.search(_NAMED, norm.name)]
    likely = [norm.name for norm in doubtful if named and (norm.name in behind or norm.name in named)]
    if not doubtful or (not likely and 2 * len(behind) < len(doubtful)):
        return MissingStatistics(halves)
    recognised = _find_recognised(state_dict, doubtful)
    likely = [norm.name for norm in doubtful if norm.name in likely or norm.name in recognised]
    possible = () if likely else tuple(sorted(behind))
    return MissingStatistics(halves, tuple(likely), possible, bool(recognised))


def describe_absence(state_dict: StateDict, not_understood: Sequence[NotUnderstood] = ()) -> str:
    """Say that a state dict has no BatchNorm layer, and what may be one all the same.

    Args:
        not_understood: what may be a BatchNorm in the file and could not be read.
    """
    none = "the state dict has no BatchNorm layer"
    if not_understood:
        return f"{none}; {quote(not_understood[0].name)} may be one, and could not be read: {not_understood[0].reason}"
    missing = find_missing_statistics(state_dict, list(find_norms(state_dict)))
    names = missing.likely or missing.possible or missing.halves
    if not names:
        return none
    verb = "may be one" if len(names) == 1 else "may be some"
    return (
        f"{none} with statistics; {list_first(names)} {verb} without, as where only the parameters were saved: "
        "bntool recalibrate gives a file its statistics from data"
    )


def _find_halves(state_dict: StateDict) -> Iterator[str]:
    for name, tensor in state_dict.tensors.items():
        if not name.endswith(BUFFERS):
            continue
        layer, _, leaf = name.rpartition(".")
        dotted = f"{layer}." if layer else ""
        if leaf == COUNTER:
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
