"""Findings about BatchNorm layers of which a file does not hold weight or bias: lost, or computed by the model."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from bntool.batchnorm import AFFINE, BatchNorm
from bntool.checkpoints.checkpoint import StateDict
from bntool.graphs.architectures.recognition import recognise
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.representation import list_first

_CREATED_WITH = {"weight": 1, "bias": 0}
_MANY = 3  # layers with both, from which on the others are held against them


def report_affine(state_dict: StateDict, norms: Sequence[BatchNorm]) -> list[Finding]:
    """Return findings on layers without bias, or without weight, where most layers have both.

    PyTorch makes such layers, too (``bias=False``, from 2.13 on), as other frameworks do, whose files say so. It is a
    warning where the architecture is recognised, which has the tensor. Else nothing tells whether a layer was made so,
    and it is a notice; none where several layers are, and all of these that are called alike but for numbers
    (``layer1.0.bn3``, ``layer2.4.bn3``), which is how models are made. What the model computes is no tensor of the file
    that could be judged.

    Args:
        norms: the BatchNorm layers of the state dict.
    """
    findings = _report_computed(norms)
    stated = [n for n in norms if not n.class_path and not n.computed and any(role in n.tensors for role in AFFINE)]
    lacking = {norm.name: norm for norm in stated if not all(role in norm.tensors for role in AFFINE)}
    whole = len(stated) - len(lacking)
    if not lacking or whole < _MANY or whole <= len(lacking):
        return findings
    known = _find_known(state_dict, list(lacking.values()))
    certain = [norm for name, norm in lacking.items() if name in known]
    alike = Counter(_without_numbers(norm.name) for norm in stated)
    lacking_alike = Counter(map(_without_numbers, lacking))
    made_so = {kind for kind, count in lacking_alike.items() if count > 1 and count == alike[kind]}
    doubtful = [n for name, n in lacking.items() if name not in known and _without_numbers(name) not in made_so]
    if certain:
        against = "the architecture whose names and shapes the tensors have has it"
        findings.append(_describe(certain, whole, against)._replace(severity=Severity.WARNING))
    if doubtful:
        against = "nothing in the file tells whether that was lost, or the layer was made without"
        what = " or ".join(dict.fromkeys(map(_find_lost, doubtful)))
        left_open = f"whether the {what} of {list_first([norm.name for norm in doubtful])} was lost"
        findings.append(_describe(doubtful, whole, against)._replace(leaves_open=left_open))
    return findings


def _report_computed(norms: Sequence[BatchNorm]) -> list[Finding]:
    computed = [norm for norm in norms if norm.computed]
    if not computed:
        return []
    roles = " or ".join(dict.fromkeys(role for norm in computed for role in norm.computed))
    names = [norm.name for norm in computed]
    sources = [name for norm in computed for found in norm.computed.values() for name in found]
    message = (
        f"{roles} of {list_first(names)} is computed by the model, from {list_first(sources)}: bntool runs no model to "
        "inspect a file, and cannot say what it is"
    )
    advice = (
        "torch.nn.utils.prune.remove, parametrize.remove_parametrizations and their like write it into the layer, "
        "bntool convert --rename one that is only called otherwise; where it is to stay so, an [[ignore]] of "
        "affine-computed in bntool.toml says so to a gate"
    )
    left_open = f"the {roles} of {list_first(names)}, which the model computes"
    return [
        Finding(
            FindingCode.AFFINE_COMPUTED,
            Severity.NOTICE,
            f"{roles} computed",
            message,
            {"names": names},
            advice,
            layers=tuple(names),
            leaves_open=left_open,
        )
    ]


def _without_numbers(name: str) -> str:
    """Return a name without the numbers of stages and blocks; those of ``bn2`` and ``bn3`` tell them apart."""
    return re.sub(r"\d+(?=[^.]*\.)|(?<![^.])\d+$", "", name)


def _find_lost(norm: BatchNorm) -> str:
    return next(role for role in AFFINE if role not in norm.tensors)


def _find_known(state_dict: StateDict, lacking: Sequence[BatchNorm]) -> frozenset[str]:
    """Find the layers of an architecture that the state dict is of where the missing tensors are put in."""
    tensors = dict(state_dict.tensors)
    for norm in lacking:
        lost = _find_lost(norm)
        kept = next(norm.tensors[role] for role in AFFINE if role != lost)
        tensors[f"{state_dict.full_name(norm.name)}.{lost}"] = kept
    whole = dataclasses.replace(state_dict, tensors=tensors, stored=state_dict.tensors)
    return frozenset(layer for architecture in recognise(whole) for layer in architecture.layers)


def _describe(lacking: Sequence[BatchNorm], others: int, against: str) -> Finding:
    lost = list(dict.fromkeys(map(_find_lost, lacking)))
    names = [norm.name for norm in lacking]
    created = " and ".join(f"{role} {_CREATED_WITH[role]}" for role in lost)
    what = " or ".join(lost)
    message = (
        f"{what} of {list_first(names)} is not in the file, while {others} other layers have weight and bias; "
        f"{against}. Loaded with strict=False such a layer keeps what it is created with, {created}"
    )
    return Finding(
        FindingCode.AFFINE_MISSING,
        Severity.NOTICE,
        f"no {what}",
        message,
        {"missing": lost},
        "take it from an earlier file, or look at what it is called where the file was converted or renamed; nothing "
        "is to be done where the layer was made without",
        layers=tuple(names),
    )
