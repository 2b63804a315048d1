"""Judging whether loading a file with its own library could run code: the verdict, and what it rests on."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from bntool.checkpoints.checkpoint import Checkpoint, GlobalTrust, Loader
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.representation import list_first


class SafetyVerdict(Enum):
    """The verdict on loading the file with its library; bntool itself never loads it that way."""

    HARMLESS = "harmless"  # it holds data only, or names only what is known to build data
    UNKNOWN = "unknown"  # it names classes or functions that are not known, or carries code of its own
    SUSPICIOUS = "suspicious"  # it names what runs programs or code, or reaches files or the network


_LONGEST = 120  # characters of a name in a finding


class Safety(NamedTuple):
    """The verdict on one file.

    Attributes:
        holds_code: the archive carries code that loading it compiles and running it executes.
        known, unknown, suspicious: the globals of its pickles or its configuration, by what is known of them.
        loader: what would run them.
    """

    verdict: SafetyVerdict
    holds_code: bool
    known: tuple[str, ...]
    unknown: tuple[str, ...]
    suspicious: tuple[str, ...]
    loader: Loader = Loader.TORCH


def judge_safety(checkpoint: Checkpoint) -> Safety:
    """Judge a file by the worst thing that its pickles name or that its format carries."""
    by_trust = {trust: tuple(g.path for g in checkpoint.globals if g.trust is trust) for trust in GlobalTrust}
    unknown, suspicious = by_trust[GlobalTrust.UNKNOWN], by_trust[GlobalTrust.SUSPICIOUS]
    holds_code = checkpoint.format.holds_code
    verdict = SafetyVerdict.UNKNOWN if unknown or holds_code else SafetyVerdict.HARMLESS
    if suspicious:
        verdict = SafetyVerdict.SUSPICIOUS
    return Safety(verdict, holds_code, by_trust[GlobalTrust.KNOWN], unknown, suspicious, checkpoint.format.loader)


def find_dangers(safety: Safety) -> list[Finding]:
    """Return the findings that ``--fail-on`` can act on."""
    findings = []
    if safety.suspicious:
        message = _warn(safety.loader, _listed(safety.suspicious))
        facts = {"globals": list(safety.suspicious)}
        findings.append(Finding(FindingCode.SUSPICIOUS_GLOBAL, Severity.WARNING, "suspicious global", message, facts))
    if safety.unknown:
        message = _explain(safety.loader, _listed(safety.unknown))
        facts = {"globals": list(safety.unknown)}
        findings.append(Finding(FindingCode.UNKNOWN_GLOBAL, Severity.NOTICE, "unknown global", message, facts))
    if safety.holds_code:
        message = "this archive carries code, which runs when it is loaded or called: load it if you trust its origin"
        findings.append(Finding(FindingCode.HOLDS_CODE, Severity.NOTICE, "holds code", message))
    return findings


def _listed(names: tuple[str, ...]) -> str:
    return list_first([name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in names])


def _warn(loader: Loader, names: str) -> str:
    """Describe names that run programs or code."""
    return _WARNINGS.get(loader, _WARNING).format(names=names)


def _explain(loader: Loader, names: str) -> str:
    """Describe names of which nothing is known."""
    return _EXPLANATIONS.get(loader, _EXPLANATION).format(names=names)


_TRUST = "unless you trust where it comes from"
_WARNING = f"loading this file would run code, by {{names}}: do not load it {_TRUST}"
_EXPLANATION = "loading this file would import {names}, of which nothing is known"
_WARNINGS = {
    Loader.TORCH: (
        "unpickling this file would use {names}, which can run code or reach files: "
        f"do not load it with torch.load(weights_only=False) {_TRUST}"
    ),
    Loader.KERAS: (
        "loading this file would run code that it holds or reach files, by {names}: do not load it with "
        f"safe_mode=False, with Keras before 3.12 or with Keras 2 at all, {_TRUST}"
    ),
    Loader.TENSORFLOW: (
        f"the graph of this SavedModel runs code or writes files, by {{names}}: do not load and call it {_TRUST}"
    ),
    Loader.CAFFE: f"the net of this model runs code or writes files, by {{names}}: do not load it in Caffe {_TRUST}",
    Loader.ONNX_RUNTIME: (
        f"the graph of this model runs code by {{names}}, where the runtime has them: do not run it there {_TRUST}"
    ),
    Loader.NUMPY: (
        "unpickling objects of this archive would use {names}, which can run code or reach files: numpy.load refuses "
        f"them, do not tell it allow_pickle=True {_TRUST}"
    ),
}
_EXPLANATIONS = {
    Loader.TORCH: (
        "unpickling this file would import {names}, of which nothing is known: "
        "torch.load needs weights_only=False for it, and then runs what it finds under these names"
    ),
    Loader.KERAS: (
        "loading this file would import {names}, of which nothing is known: keras.models.load_model runs what "
        "it finds under these names, or what custom_objects gives it"
    ),
    Loader.TENSORFLOW: "calling this SavedModel would use {names}, which read files, or of which nothing is known",
    Loader.CAFFE: "this model is run by {names}, of which nothing is known",
    Loader.ONNX_RUNTIME: "running this model would use {names}, of which nothing is known here",
    Loader.NUMPY: (
        "unpickling objects of this archive would import {names}, of which nothing is known: numpy.load refuses them "
        "unless it is told allow_pickle=True"
    ),
}
