"""Our preprocessing against torchvision's and timm's own transforms, pixel by pixel, for all their architectures.

With --record, what they make of a few images is written to tests/fixtures/preprocessing.json, for the quick tests.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from PIL import Image

from bntool.data.pixels import read_image
from bntool.data.preprocessing import Preprocessing, parse_preprocessing
from bntool.data.presets import find_model_preset
from tests.benchmarks.zoo_models import import_torchvision
from tests.data.sample_images import SIZES, make_image
from tests.places import FIXTURES

REQUIREMENTS = ["torch==2.13.0", "torchvision==0.28.0", "timm", "numpy", "Pillow", "typer>=0.26,<0.29"]
RECORDED = FIXTURES / "preprocessing.json"
KEPT = {
    "torchvision:resnet18",
    "torchvision:vit_b_16",
    "torchvision:inception_v3",
    "torchvision:fcn_resnet50",
    "timm:resnet50",
    "timm:resnetv2_50x1_bit",
    "timm:efficientnet_b0",
    "timm:vit_base_patch16_siglip_224",
}


def prepare(path: Path, steps: Preprocessing) -> torch.Tensor:
    return steps.normalize(read_image(path, steps).unsqueeze(0))[0]


def references():
    """Spec, our steps, and the package's own transform, for every architecture of both."""
    import timm
    import torchvision

    for name in torchvision.models.list_models():
        weights = torchvision.models.get_model_weights(name).DEFAULT
        steps = find_model_preset(f"torchvision:{name}", torch.nn.Identity())
        yield f"torchvision:{name}", steps, weights.transforms()
    for name in timm.list_models(pretrained=True):
        carrier = torch.nn.Identity()
        carrier.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
        config = timm.data.resolve_data_config({}, model=carrier)
        yield f"timm:{name}", find_model_preset(f"timm:{name}", carrier), timm.data.create_transform(**config)


def main() -> int:
    warnings.simplefilter("ignore")
    import_torchvision()
    recorded, without, differing, same = {}, [], [], 0
    seen: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for size in SIZES:
            paths.append(Path(folder, f"{size[0]}.png"))
            make_image(size).save(paths[-1])
        for spec, steps, transform in references():
            if steps is None:
                without.append(spec)
                continue
            assert parse_preprocessing(steps.describe()) == steps, spec
            key = f"{steps.describe()} {transform}"
            if key not in seen:
                pairs = [(prepare(path, steps), transform(Image.open(path).convert("RGB"))) for path in paths]
                fits = all(ours.shape == theirs.shape for ours, theirs in pairs)
                seen[key] = max(float((a - b).abs().max()) for a, b in pairs) if fits else float("inf")
            if spec.partition(".")[0] in KEPT and spec.partition(".")[0] not in recorded:
                answers = [transform(Image.open(path).convert("RGB")).double() for path in paths]
                recorded[spec.partition(".")[0]] = {
                    "steps": steps.describe(),
                    "answers": [
                        {"shape": list(t.shape), "mean": t.mean((1, 2)).tolist(), "corner": t[:, :3, :3].tolist()}
                        for t in answers
                    ],
                }
            if seen[key]:
                differing.append(f"{spec} {seen[key]:.2e}")
            else:
                same += 1
    print(f"{same} architectures: every pixel the same, with {len(seen)} different transforms")
    print(f"{len(differing)} differ: {', '.join(differing[:20])}")
    print(f"{len(without)} without a preset: {', '.join(without[:12])} ...")
    if "--record" in sys.argv:
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    return 1 if differing or json.loads(RECORDED.read_text()) != json.loads(json.dumps(recorded)) else 0


if __name__ == "__main__":
    sys.exit(main())
