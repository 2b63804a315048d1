"""Whether loading a file with its own library could run code: the verdict, and what it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bntool.checkpoints.checkpoint import Checkpoint, GlobalTrust
from bntool.operations.findings import Finding, FindingCode, Severity


class Verdict(Enum):
    """What loading the file may do; bntool itself never loads it that way."""

    HARMLESS = "harmless"  # it holds data only, or names only what is known to build data
    UNKNOWN = "unknown"  # it names classes or functions that are not known, or carries code of its own
    SUSPICIOUS = "suspicious"  # it names what runs programs or code, or reaches files or the network


@dataclass(frozen=True)
class Safety:
    """The verdict on one file.

    Attributes:
        holds_code: the archive carries code that loading it compiles and running it executes.
        known, unknown, suspicious: the globals of its pickles, by what is known of them.
    """

    verdict: Verdict
    holds_code: bool
    known: tuple[str, ...]
    unknown: tuple[str, ...]
    suspicious: tuple[str, ...]


def judge_safety(checkpoint: Checkpoint) -> Safety:
    """The worst of what its pickles name and of what its format carries."""
    by_trust = {trust: tuple(g.path for g in checkpoint.globals if g.trust is trust) for trust in GlobalTrust}
    unknown, suspicious = by_trust[GlobalTrust.UNKNOWN], by_trust[GlobalTrust.SUSPICIOUS]
    holds_code = checkpoint.format.holds_code
    verdict = Verdict.UNKNOWN if unknown or holds_code else Verdict.HARMLESS
    if suspicious:
        verdict = Verdict.SUSPICIOUS
    return Safety(verdict, holds_code, by_trust[GlobalTrust.KNOWN], unknown, suspicious)


def find_dangers(safety: Safety) -> list[Finding]:
    """The findings that ``--fail-on`` can act on."""
    findings = []
    if safety.suspicious:
        message = (
            f"unpickling this file would use {_listed(safety.suspicious)}, which can run code: "
            "do not load it with torch.load(weights_only=False) unless you trust where it comes from"
        )
        facts = {"globals": list(safety.suspicious)}
        findings.append(Finding(FindingCode.SUSPICIOUS_GLOBAL, Severity.WARNING, "suspicious", message, facts))
    if safety.unknown:
        message = (
            f"unpickling this file would import {_listed(safety.unknown)}, of which nothing is known: "
            "torch.load needs weights_only=False for it, and then runs what it finds under these names"
        )
        facts = {"globals": list(safety.unknown)}
        findings.append(Finding(FindingCode.UNKNOWN_GLOBAL, Severity.NOTICE, "unknown global", message, facts))
    if safety.holds_code:
        message = "this archive carries code, which runs when it is loaded or called: load it if you trust its origin"
        findings.append(Finding(FindingCode.HOLDS_CODE, Severity.NOTICE, "holds code", message))
    return findings


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
