"""Converted files in the FrozenBatchNorm2d of torchvision and of timm: they load strictly and compute the same."""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import nn

REQUIREMENTS = ["torch==2.13.0", "torchvision==0.28.0", "timm", "typer>=0.26,<0.29"]


def main() -> int:
    """Convert a BatchNorm2d with each eps and hold what the frozen layers compute against it, in float64."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a binary for another build of torch: only its presence is wanted
        from tests.oracles.freezing_frameworks import stand_in_for_vision_operators

        stand_in_for_vision_operators()
    from timm.layers import FrozenBatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    from bntool.cli.main import main as bntool

    torch.manual_seed(0)
    layers = {
        "torchvision": lambda eps: FrozenBatchNorm2d(8, eps=eps),
        "timm": lambda eps: FrozenBatchNormAct2d(8, eps=eps, apply_act=False),
    }
    failures = 0
    for kind, build in layers.items():
        for eps, target in ((1e-5, 1e-5), (1e-3, 1e-5), (1e-3, 1e-3)):
            reference = nn.Sequential(nn.BatchNorm2d(8, eps=eps))
            for _ in range(3):
                reference(torch.randn(4, 8, 5, 5) * 3 + 1)
            nn.init.normal_(reference[0].weight)
            nn.init.normal_(reference[0].bias)
            frozen = nn.Sequential(build(target))
            with tempfile.TemporaryDirectory() as folder:
                torch.save(reference.state_dict(), f"{folder}/a.pt")
                arguments = ["--eps", str(eps), "--target-eps", str(target), "--for", kind, "--quiet"]
                code = bntool(
                    ["convert", f"{folder}/a.pt", "--to", "frozen-batchnorm", "-o", f"{folder}/b.pt", *arguments]
                )
                frozen.load_state_dict(torch.load(f"{folder}/b.pt"), strict=True)
            x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
            error = (frozen.double()(x) - reference.double().eval()(x)).abs().max().item()
            failures += code != 0 or not error < 1e-6
            print(f"{kind}, eps {eps:g} to {target:g}: largest difference {error:.1e}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
