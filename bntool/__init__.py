"""Inspect, recalibrate, freeze and fold Batch Normalization in checkpoints.

Everything public is re-exported here and imported when it is first used: ``import bntool`` imports neither torch nor
numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bntool.progress import show_by
from bntool.representation import draw_html_by
from bntool.version import __version__

if TYPE_CHECKING:
    from bntool.averaging.checkpoint import average_checkpoints as average_checkpoints
    from bntool.batchnorm import BatchNorm as BatchNorm
    from bntool.batchnorm import scale_and_shift as scale_and_shift
    from bntool.checkpoints.application import apply_plan as apply_plan
    from bntool.checkpoints.batchnorms import find_batchnorms as find_batchnorms
    from bntool.checkpoints.checkpoint import Checkpoint as Checkpoint
    from bntool.checkpoints.checkpoint import StateDict as StateDict
    from bntool.checkpoints.formats import open_checkpoint as open_checkpoint
    from bntool.checkpoints.saving import save_checkpoint as save_checkpoint
    from bntool.checkpoints.state_dicts import choose_state_dict as choose_state_dict
    from bntool.comparison.checkpoint import diff as diff
    from bntool.conversion.checkpoint import convert as convert
    from bntool.errors import BntoolError as BntoolError
    from bntool.folding.checkpoint import fold_checkpoint as fold_checkpoint
    from bntool.folding.live import fold as fold
    from bntool.folding.loading import load_folded as load_folded
    from bntool.freezing.checkpoint import freeze_checkpoint as freeze_checkpoint
    from bntool.freezing.live import apply_freeze as apply_freeze
    from bntool.freezing.live import freeze as freeze
    from bntool.freezing.live import frozen as frozen
    from bntool.freezing.live import unfreeze as unfreeze
    from bntool.inspection.checkpoint import inspect as inspect
    from bntool.inspection.run import inspect_run as inspect_run
    from bntool.plan import Plan as Plan
    from bntool.recalibration.checkpoint import recalibrate_checkpoint as recalibrate_checkpoint
    from bntool.recalibration.live import recalibrate as recalibrate
    from bntool.recalibration.merging import merge_statistics as merge_statistics

# public name -> module that defines it
_PUBLIC = {
    "BatchNorm": "bntool.batchnorm",
    "BntoolError": "bntool.errors",
    "Checkpoint": "bntool.checkpoints.checkpoint",
    "Plan": "bntool.plan",
    "StateDict": "bntool.checkpoints.checkpoint",
    "apply_freeze": "bntool.freezing.live",
    "average_checkpoints": "bntool.averaging.checkpoint",
    "apply_plan": "bntool.checkpoints.application",
    "choose_state_dict": "bntool.checkpoints.state_dicts",
    "convert": "bntool.conversion.checkpoint",
    "diff": "bntool.comparison.checkpoint",
    "find_batchnorms": "bntool.checkpoints.batchnorms",
    "fold": "bntool.folding.live",
    "fold_checkpoint": "bntool.folding.checkpoint",
    "freeze": "bntool.freezing.live",
    "freeze_checkpoint": "bntool.freezing.checkpoint",
    "frozen": "bntool.freezing.live",
    "inspect": "bntool.inspection.checkpoint",
    "inspect_run": "bntool.inspection.run",
    "load_folded": "bntool.folding.loading",
    "merge_statistics": "bntool.recalibration.merging",
    "open_checkpoint": "bntool.checkpoints.formats",
    "recalibrate": "bntool.recalibration.live",
    "recalibrate_checkpoint": "bntool.recalibration.checkpoint",
    "save_checkpoint": "bntool.checkpoints.saving",
    "scale_and_shift": "bntool.batchnorm",
    "unfreeze": "bntool.freezing.live",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 the keys are strings


def _draw_html(value: Any) -> str | None:
    """Draw a result as HTML. Results lie below what draws them; both meet here."""
    drawn: str | None = importlib.import_module("bntool.reports.page.notebook").draw(value)
    return drawn


def _show_progress(progress: Any) -> None:
    """Show how far a call is in a notebook; called for every step."""
    importlib.import_module("bntool.reports.notebook_progress").show(progress)


draw_html_by(_draw_html)
show_by(_show_progress)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bntool' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
