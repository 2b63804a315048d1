"""Folding a file that holds its graph, without the command line and without a record of it in the file."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.caffe_deployment import deploy, fold_prototxt
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.formats import open_checkpoint, save_checkpoint
from bntool.checkpoints.prototxt import read_prototxt
from bntool.graphs.stored import stored_graph
from bntool.operations.folding import FoldPlan, Layout, plan_fold


def fold_file(source: Path, target: Path, *, layout: str = "folded") -> FoldPlan:
    """Fold a file, and the ``.prototxt`` beside it where there is one."""
    prototxt = source.with_suffix(".prototxt")
    with open_checkpoint(source) as opened:
        net = read_prototxt(SourceFile(prototxt)) if prototxt.exists() else None
        checkpoint = opened if net is None else deploy(opened, net)
        graph = stored_graph(checkpoint)
        assert graph is not None
        plan = plan_fold(checkpoint.state_dict(""), graph, layout=Layout(layout))
        edited = apply_plan(checkpoint, plan)
        save_checkpoint(edited, target)
        if net is not None:
            target.with_suffix(".prototxt").write_text(fold_prototxt(edited, net))
    return plan
