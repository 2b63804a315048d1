"""The first stages of a backbone that are frozen, per family, as mmdet 3.3.0 defines ``frozen_stages``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from bntool.errors import UsageError


class Family(Enum):
    """Backbones whose stages are known by the names of their modules."""

    RESNET = "ResNet"  # and ResNeXt, RegNet, Res2Net with a plain stem; torchvision's and timm's names are the same
    RESNET_DEEP_STEM = "ResNet with a deep stem"
    DARKNET = "Darknet"
    CSP_DARKNET = "CSPDarknet"
    MOBILENET_V2 = "MobileNetV2"


@dataclass(frozen=True)
class FrozenStages:
    """The modules that ``frozen_stages`` concerns.

    Attributes:
        family: which backbone it is.
        frozen_stages: the number given.
        root: dotted path of the backbone in the model, "" for the model itself.
        without_gradient: modules whose parameters, and those of all modules below, get no gradient.
        in_eval: modules that stay in eval mode with all modules below.
    """

    family: Family
    frozen_stages: int
    root: str
    without_gradient: tuple[str, ...]
    in_eval: tuple[str, ...]


_DARKNET_STAGES = ("conv1", *(f"conv_res_block{number}" for number in range(1, 6)))
_CSP_STAGES = ("stem", *(f"stage{number}" for number in range(1, 5)))

# modules that lie side by side at the root of a backbone of the family; the first family that matches is taken
_SIGNS: tuple[tuple[Family, tuple[str, ...]], ...] = (
    (Family.DARKNET, ("conv1.conv", "conv_res_block1.conv")),
    (Family.CSP_DARKNET, ("stem.conv", "stage1.0.conv")),
    (Family.MOBILENET_V2, ("conv1.conv", "layer1.0.depthwise_conv")),
    (Family.RESNET_DEEP_STEM, ("stem.0", "layer1.0.conv1")),
    (Family.RESNET, ("conv1", "bn1", "layer1.0.conv1")),
)


def find_frozen_stages(modules: Iterable[str], frozen_stages: int) -> FrozenStages:
    """Return the modules that are frozen with the first stages of the backbone in a model.

    ResNet, ResNeXt, RegNet: 0 is the stem, N the stem and layer1 to layerN. Darknet: N is the first N of conv1,
    conv_res_block1, ... CSPDarknet: N is the stem and stage1 to stageN. MobileNetV2: N is conv1, whose statistics go
    on, and layer1 to layerN. -1 is nothing.

    Args:
        modules: dotted paths of all modules that own tensors, and any others.
        frozen_stages: -1 or more.

    Raises:
        UsageError: no backbone of a known family, or several, or it has fewer stages.
    """
    paths = _with_parents(modules)
    family, root = _find_backbone(paths)
    if frozen_stages < -1:
        raise UsageError("frozen_stages is -1 for none, 0 for the stem, or the number of stages", value=frozen_stages)
    without_gradient, in_eval = _RULES[family](frozen_stages)
    dotted = f"{root}." if root else ""
    absent = [name for name in (*without_gradient, *in_eval) if dotted + name not in paths]
    if absent:
        raise UsageError(
            f"this {family.value} has no {absent[0]}: frozen_stages={frozen_stages} is more than it has stages",
            value=frozen_stages,
        )
    return FrozenStages(
        family=family,
        frozen_stages=frozen_stages,
        root=root,
        without_gradient=tuple(dotted + name for name in without_gradient),
        in_eval=tuple(dotted + name for name in in_eval),
    )


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Return whether a module or tensor is one of the modules or lies below one."""
    return any(name == module or not module or name.startswith(module + ".") for module in modules)


def _with_parents(modules: Iterable[str]) -> set[str]:
    paths = set()
    for module in modules:
        path = module
        while path and path not in paths:
            paths.add(path)
            path = path.rpartition(".")[0]
    return paths


def _find_backbone(paths: set[str]) -> tuple[Family, str]:
    found: dict[str, Family] = {}
    for family, signs in _SIGNS:
        for path in paths:
            if path == signs[0] or path.endswith("." + signs[0]):
                root = path.removesuffix(signs[0]).rstrip(".")
                dotted = f"{root}." if root else ""
                if root not in found and all(dotted + sign in paths for sign in signs):
                    found[root] = family
    if not found:
        families = ", ".join(family.value for family in Family)
        raise UsageError(
            f"frozen_stages needs a backbone whose stages are known ({families}); name layers with --layers instead"
        )
    outermost = [root for root in found if not any(other != root and is_within(root, (other,)) for other in found)]
    if len(outermost) > 1:
        listed = ", ".join(sorted(outermost))
        raise UsageError(f"the model has several backbones ({listed}); name layers with --layers instead")
    return found[outermost[0]], outermost[0]


def _resnet(stem: tuple[str, ...], stem_in_eval: tuple[str, ...]) -> Callable[[int], tuple[list[str], list[str]]]:
    def rule(frozen_stages: int) -> tuple[list[str], list[str]]:
        if frozen_stages < 0:
            return [], []
        layers = [f"layer{number}" for number in range(1, frozen_stages + 1)]
        return [*stem, *layers], [*stem_in_eval, *layers]

    return rule


def _first(stages: tuple[str, ...], *, beside: int) -> Callable[[int], tuple[list[str], list[str]]]:
    def rule(frozen_stages: int) -> tuple[list[str], list[str]]:
        count = frozen_stages + beside if frozen_stages >= 0 else 0
        # one that is past the end is reported as missing
        names = [stages[index] if index < len(stages) else f"stage number {index}" for index in range(count)]
        return names, names

    return rule


_RULES: dict[Family, Callable[[int], tuple[list[str], list[str]]]] = {
    Family.RESNET: _resnet(("conv1", "bn1"), ("bn1",)),
    Family.RESNET_DEEP_STEM: _resnet(("stem",), ("stem",)),
    Family.DARKNET: _first(_DARKNET_STAGES, beside=0),
    Family.CSP_DARKNET: _first(_CSP_STAGES, beside=1),
    Family.MOBILENET_V2: _resnet(("conv1",), ()),
}
