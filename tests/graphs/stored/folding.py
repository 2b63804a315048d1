"""Folding and freezing files that hold their graph, without the command line and without a record of it in them."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.caffe.deployment import deploy, edit_prototxt
from bntool.checkpoints.caffe.prototxt import read_prototxt
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.planning import FoldPlan, plan_fold
from bntool.freezing.checkpoint import plan_freeze
from bntool.freezing.options import FreezeForm
from bntool.graphs.sources import read_stored_graph


def fold_file(source: Path, target: Path, *, layout: str = "folded", eps: float | None = None) -> FoldPlan:
    """Fold a file, and the ``.prototxt`` beside it where there is one."""
    prototxt = source.with_suffix(".prototxt")
    with open_checkpoint(source) as opened:
        net = read_prototxt(SourceFile(prototxt)) if prototxt.exists() else None
        checkpoint = opened if net is None else deploy(opened, net)
        graph = read_stored_graph(checkpoint)
        assert graph is not None
        plan = plan_fold(checkpoint.state_dict(""), graph, FoldOptions(layout=Layout(layout), eps=eps))
        edited = apply_plan(checkpoint, plan)
        save_checkpoint(edited, target)
        if net is not None:
            target.with_suffix(".prototxt").write_text(edit_prototxt(edited, net))
    return plan


def freeze_net(source: Path, target: Path, *, form: str = "policy") -> None:
    """Freeze a Caffe model with the ``.prototxt`` beside it."""
    with open_checkpoint(source) as opened:
        net = read_prototxt(SourceFile(source.with_suffix(".prototxt")))
        checkpoint = deploy(opened, net)
        plan = plan_freeze(checkpoint, requires_grad=False, form=FreezeForm(form)).plan
        edited = apply_plan(checkpoint, plan)
        save_checkpoint(edited, target)
        target.with_suffix(".prototxt").write_text(edit_prototxt(edited, net))
