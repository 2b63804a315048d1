"""What mmdet 3.3.0 freezes, backbone by backbone; written to tests/fixtures/mmdet_freezing.json.

Without an argument it holds the recorded file against mmdet; with --record it writes the file.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types

from tests.places import FIXTURES

REQUIREMENTS = ["torch==2.13.0", "mmdet==3.3.0", "mmcv-lite==2.1.0", "mmengine"]
RECORDED = FIXTURES / "mmdet_freezing.json"


def stand_in_for_compiled_operators() -> None:
    """mmcv-lite has no mmcv.ops; mmdet imports names from it that backbones of these kinds never use."""

    class Operators(types.ModuleType):
        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
            wanted = name == "mmcv.ops" or name.startswith("mmcv.ops.")
            return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

        def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
            return Operators(spec.name)

        def exec_module(self, module: types.ModuleType) -> None:
            pass

    sys.meta_path.insert(0, Finder())


def main() -> int:
    """Derive the cases; hold them against the recorded ones, or record them."""
    stand_in_for_compiled_operators()
    from mmdet.models.backbones import CSPDarknet, Darknet, MobileNetV2, RegNet, ResNet, ResNeXt

    cases = []

    def add(title, build, *, backbone, frozen_stages, norm_eval, norm_requires_grad=True, sync=False, **options):
        norm = {"type": "SyncBN" if sync else "BN", "requires_grad": norm_requires_grad}
        model = build(frozen_stages=frozen_stages, norm_eval=norm_eval, norm_cfg=norm, **options)
        model.train(True)
        cases.append(
            {
                "title": title,
                "backbone": backbone,
                "frozen_stages": frozen_stages,
                "norm_eval": norm_eval,
                "norm_requires_grad": norm_requires_grad,
                "sync": sync,
                "keys": list(model.state_dict()) if backbone != "ResNet-50" else [],
                "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
                "eval_modules": [name for name, module in model.named_modules() if not module.training],
            }
        )

    resnet = {"depth": 50, "backbone": "ResNet-50", "base_channels": 2, "stem_channels": 2}
    add("norm_eval, stage 1", ResNet, frozen_stages=1, norm_eval=True, **resnet)
    add("norm_eval, stage 1, norm frozen", ResNet, frozen_stages=1, norm_eval=True, norm_requires_grad=False, **resnet)
    add("SyncBN, stage 1", ResNet, frozen_stages=1, norm_eval=False, sync=True, **resnet)
    add("SyncBN, nothing", ResNet, frozen_stages=-1, norm_eval=False, sync=True, **resnet)
    add("norm_eval, stem", ResNet, frozen_stages=0, norm_eval=True, **resnet)
    add("stage 2", ResNet, frozen_stages=2, norm_eval=False, **resnet)
    add("norm_eval, stage 4", ResNet, frozen_stages=4, norm_eval=True, **resnet)
    small = {"depth": 50, "base_channels": 2, "stem_channels": 4}
    for stages in (0, 1):
        add(f"deep stem {stages}", ResNet, backbone="ResNet, deep stem", frozen_stages=stages, norm_eval=False,
            deep_stem=True, **small)  # fmt: skip
        add(f"ResNeXt {stages}", ResNeXt, backbone="ResNeXt", frozen_stages=stages, norm_eval=False, groups=2,
            base_width=4, depth=50)  # fmt: skip
        add(f"RegNet {stages}", RegNet, backbone="RegNet", frozen_stages=stages, norm_eval=False,
            arch="regnetx_400mf")  # fmt: skip
        add(f"Darknet {stages}", Darknet, backbone="Darknet", frozen_stages=stages, norm_eval=False, depth=53)
        add(f"CSPDarknet {stages}", CSPDarknet, backbone="CSPDarknet", frozen_stages=stages, norm_eval=False,
            widen_factor=0.125, deepen_factor=0.33)  # fmt: skip
        add(f"MobileNetV2 {stages}", MobileNetV2, backbone="MobileNetV2", frozen_stages=stages, norm_eval=False,
            widen_factor=0.25)  # fmt: skip
    document = json.dumps({"mmdet": "3.3.0", "cases": cases})
    if "--record" in sys.argv:
        RECORDED.write_text(document + "\n")
        return 0
    same = json.loads(RECORDED.read_text())["cases"] == json.loads(document)["cases"]
    print(f"{len(cases)} cases: {'as recorded' if same else 'NOT as recorded'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
