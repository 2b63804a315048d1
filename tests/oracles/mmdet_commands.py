"""``bntool fold``, ``recalibrate`` and ``freeze`` on mmdet 3.3.0's own configs, as a user would run them.

RetinaNet and Faster R-CNN with a ResNet-50; mmcv-lite has no compiled operators, so the two that Faster R-CNN calls
have stand-ins here. Exits 1 where something is not as it should be.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tests.oracles.mmdet_freezing import stand_in_for_compiled_operators
from tests.programs import copy_user_code

REQUIREMENTS = [
    "torch==2.13.0", "mmdet==3.3.0", "mmcv-lite==2.1.0", "mmengine==0.10.7", "setuptools", "typer>=0.26,<0.29"
]  # fmt: skip

MODELS = {
    "retinanet/retinanet_r50_fpn_1x_coco.py": ("--input-shape", "1,3,64,64"),
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": ("--data", "mmdet_samples.py:batches"),
}


def stand_in_for_what_faster_rcnn_calls() -> None:
    import mmcv.ops
    import torch
    import torch.nn.functional as F
    from torch import nn

    class RoIAlign(nn.Module):
        """One bilinear sample for each bin."""

        def __init__(self, output_size, spatial_scale: float = 1.0, **_options) -> None:
            super().__init__()
            self.output_size = output_size if isinstance(output_size, tuple) else (output_size, output_size)
            self.spatial_scale = spatial_scale

        def forward(self, features, regions):
            found = [features.new_zeros(0, features.shape[1], *self.output_size)]
            for region in regions:
                left, top, right, bottom = region[1:] * self.spatial_scale
                y = torch.linspace(0, 1, self.output_size[0]).to(region) * (bottom - top) + top
                x = torch.linspace(0, 1, self.output_size[1]).to(region) * (right - left) + left
                rows, columns = torch.meshgrid(
                    y * 2 / features.shape[2] - 1, x * 2 / features.shape[3] - 1, indexing="ij"
                )
                grid = torch.stack([columns, rows], -1)[None]
                found.append(F.grid_sample(features[int(region[0])][None], grid, align_corners=False))
            return torch.cat(found)

    def batched_nms(boxes, scores, _classes, _options, class_agnostic=False):
        kept = scores.argsort(descending=True)[:20]
        return torch.cat([boxes[kept], scores[kept, None]], 1), kept

    mmcv.ops.RoIAlign, mmcv.ops.batched_nms = RoIAlign, batched_nms
    import mmdet.models.dense_heads.rpn_head

    mmdet.models.dense_heads.rpn_head.batched_nms = batched_nms


def main() -> int:
    """Run all commands on all models."""
    stand_in_for_compiled_operators()
    stand_in_for_what_faster_rcnn_calls()
    import mmdet
    import torch

    from bntool import load_folded
    from bntool.cli.main import main as bntool
    from bntool.models.loading import load_model

    def run(*arguments: str) -> dict:
        keep = os.dup(1)
        with tempfile.TemporaryFile() as printed:
            sys.stdout.flush()
            os.dup2(printed.fileno(), 1)
            code = bntool([*arguments, "--json"])
            sys.stdout.flush()
            os.dup2(keep, 1)
            printed.seek(0)
            (facts,) = json.loads(printed.read())["files"]
        assert code == 0, facts
        return facts

    configs = Path(mmdet.__file__).parent / ".mim" / "configs"
    for config, inputs in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            copy_user_code("mmdet_samples", Path())
            spec, bare = f"mmdet:{configs / config}", {"model.backbone.init_cfg": "None"}
            torch.save({"meta": {}, "state_dict": load_model(spec, arguments=bare).state_dict()}, "epoch_1.pth")
            model = ("--model", spec, "--model-arg", "model.backbone.init_cfg=None")
            folded = run("fold", "epoch_1.pth", "-o", "folded.pth", *model, *inputs)
            assert len(folded["folds"]) == 53, folded["folds"]
            assert not folded["skips"], folded["skips"]
            assert folded["verification"]["exact"] < 1e-12
            left = load_folded(load_model(spec, arguments=bare), "folded.pth")
            assert not [name for name in left.state_dict() if name.endswith("running_mean")]
            trained = ("--model-arg", "model.backbone.norm_eval=False", "--data", "mmdet_samples.py:batches")
            again = run("recalibrate", "epoch_1.pth", "-o", "again.pth", *model, *trained, "--method", "pooled")
            frozen = run("freeze", "epoch_1.pth", "-o", "frozen.pth", "--frozen-stages", "1")
            print(
                config, len(folded["folds"]), f"{folded['verification']['exact']:.1e}", sorted(again)[:3], len(frozen)
            )
            os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
