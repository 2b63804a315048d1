"""Files that training frameworks wrote: bntool finds in them what the frameworks load from them.

See tests/oracles/checkpoint_layouts.py, which made the files and recorded what their frameworks find.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

import bntool
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.origin import describe_origin
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.checkpoints.tensors import read_bytes, read_numbers
from bntool.inspection.safety import SafetyVerdict, judge_safety
from tests.places import FIXTURES

FOLDER = FIXTURES / "layouts"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_reads_what_its_framework_loads(name: str) -> None:
    with open_checkpoint(FOLDER / name) as checkpoint:
        for key, tensors in EXPECTED[name].items():
            state_dict = checkpoint.state_dict(key)
            found = {
                name: [tensor.dtype.name, list(tensor.shape), hashlib.sha256(read_bytes(tensor)).hexdigest()[:16]]
                for name, tensor in state_dict.tensors.items()
            }
            assert found == tensors
            assert list(found) == list(tensors)


@pytest.mark.parametrize(
    ("name", "chosen", "layer", "eps", "origin"),
    [
        ("lightning.ckpt", "state_dict", "1", None, "Lightning 2.6.6, epoch 1, step 4, Adam state"),
        ("timm_ema.pth.tar", "state_dict", "1", None, "timm, epoch 3, SGD momentum state, EMA"),
        ("mmengine_ema.pth", "state_dict", "backbone.1", None, "mmengine, epoch 1, SGD momentum state, EMA"),
        ("fastai_model.pth", "model", "1", None, "fastai, optimizer state"),
        ("fastai_export.pkl", "model", "1", 1e-3, "fastai Learner, pickled torch.nn.modules.container.Sequential"),
        ("ultralytics.pt", "model", "0.bn", 1e-5, "pickled ultralytics.nn.tasks.ClassificationModel"),
        ("distributed", "model", "1", None, "SGD momentum state"),
    ],
)
def test_knows_what_it_is(name: str, chosen: str, layer: str, eps: float | None, origin: str) -> None:
    with open_checkpoint(FOLDER / name) as checkpoint:
        state_dict = choose_state_dict(checkpoint)
        assert state_dict.key == chosen
        norm = find_batchnorms(state_dict)[0]
        assert (norm.name, norm.eps) == (layer, eps)
        assert origin in describe_origin(checkpoint)


def test_a_loss_beside_the_model_is_no_state_dict() -> None:
    with open_checkpoint(FOLDER / "fastai_export.pkl") as checkpoint:
        assert [state_dict.key for state_dict in checkpoint.state_dicts] == ["model"]


def test_what_fastai_pickles_is_judged_by_what_it_does(tmp_path: Path) -> None:
    """An optimizer's settings lie in a list of fastcore's; an export may hold code that cloudpickle rebuilds."""
    verdicts = [
        judge_safety(open_checkpoint(FOLDER / name)).verdict for name in ("fastai_model.pth", "fastai_export.pkl")
    ]
    assert verdicts[0] is SafetyVerdict.HARMLESS
    assert verdicts[1] is not SafetyVerdict.HARMLESS
    many = b"\x80\x02}(X\x01\x00\x00\x00acfastcore.foundation\nL\nc__builtin__\nxrange\nJ\xff\xff\xff\x7f\x85R\x85Ru."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", many)
    assert judge_safety(open_checkpoint(tmp_path / "a.pt")).verdict is SafetyVerdict.SUSPICIOUS


def test_an_export_folds_in_place_and_keeps_its_learner(tmp_path: Path) -> None:
    folded = bntool.fold_checkpoint(
        FOLDER / "fastai_export.pkl", tmp_path / "o.pkl", pairs={"1": "0"}, layout="same-keys"
    )
    assert folded.plan.layers == ("1",)
    with open_checkpoint(FOLDER / "fastai_export.pkl") as before, open_checkpoint(tmp_path / "o.pkl") as after:
        assert [name.path for name in before.globals] == [name.path for name in after.globals]
        assert read_numbers(after.state_dict("model").tensors["1.running_mean"]) == (0.0,) * 4
