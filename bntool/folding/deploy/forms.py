"""The names that models give their parallel branches, and the convolution that takes their place: a line for each code.

To add one: the children of a block that become one convolution, and its name there. Only names are said here; that the
branches read one tensor and are summed up is seen in the graph, or nothing is merged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from bntool.names import join_name


@dataclass(frozen=True)
class DeployForm:
    """The names of the blocks of one code.

    Attributes:
        branches: the children that become one convolution.
        merged: the path of it in the block; "" where it takes the place of the block, which then has no other children.
        architectures: what names of architectures begin with; () where the names of the children say enough.
        below: the children of the first branch; () for any.
        needs: how many of the branches, from the first one on, are there in every block.
    """

    branches: tuple[str, ...]
    merged: str = ""
    architectures: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    needs: int = 1


_YOLO = ("yolo",)  # none of the catalogue: these names are common, and only the model's own code tells
# DingXiaoH/RepVGG, YOLOv6, YOLOv7: the one whose tensors tell all that is needed
NAMED = DeployForm(("rbr_dense", "rbr_1x1", "rbr_identity"), "rbr_reparam")
FORMS = (
    DeployForm(("conv_kxk", "conv_1x1", "conv_scale", "identity"), "reparam_conv"),  # timm: RepVGG, MobileOne
    NAMED,
    DeployForm(("rbr_conv", "rbr_scale", "rbr_skip"), "reparam_conv"),  # apple/ml-mobileone
    # timm: FastViT
    DeployForm(("mixer", "norm", "layer_scale"), "reparam_conv", below=("conv_kxk", "conv_scale", "identity")),
    DeployForm(("large_conv", "small_conv"), "reparam_conv"),
    DeployForm(("pos_enc",), "reparam_conv", architectures=("fastvit",)),
    # timm: RepGhost; GhostNetV3; PP-LCNetV2
    DeployForm(("fusion_bn", "cheap_operation", "fusion_conv"), "cheap_operation", needs=2),
    DeployForm(("primary_rpr_conv", "primary_rpr_scale", "primary_rpr_skip"), "primary_conv.0"),
    DeployForm(("cheap_rpr_conv", "cheap_rpr_scale", "cheap_rpr_skip"), "cheap_operation.0"),
    DeployForm(("dw_rpr_conv", "dw_rpr_scale", "dw_rpr_skip"), "conv_dw"),
    DeployForm(("dw_conv_list",), "dw_conv"),
    # ultralytics: RepConv; RepVGGDW
    DeployForm(("conv1", "conv2", "bn"), "conv", architectures=_YOLO, below=("conv", "bn"), needs=2),
    DeployForm(("conv1", "conv"), "conv", architectures=_YOLO, below=("conv", "bn"), needs=2),
    # timm: SHViT; iFormer; RepViT
    DeployForm(("m",), architectures=("shvit",), below=("c", "bn")),
    DeployForm(("cpe",), architectures=("iformer",)),
    DeployForm(("conv1", "conv", "bn"), architectures=("repvit",), needs=3),
    DeployForm(("head", "head_dist"), architectures=("repvit", "iformer"), below=("bn", "l")),
)

# modules of a convolution or linear and its BatchNorm, in either order, that become the convolution or linear: timm's
# LeViT, TinyViT, EfficientViT-M, SHViT, RepViT, iFormer
_FUSED = ("levit", "tiny_vit", "efficientvit_m", "shvit", "repvit", "iformer")
# timm's FastViT, RepGhost, GhostNetV3, PP-LCNetV2, whose deploy forms have a BatchNorm wherever there are no branches
_KEEPING = ("fastvit", "repghost", "ghostnetv3", "lcnetv2")
_PRODUCERS = ("conv", "linear", "c", "l")
_NORM = "bn"


@dataclass(frozen=True)
class Block:
    """A module whose branches become one convolution.

    Attributes:
        module: its path, without the prefix of the state dict.
        form: how its children are named.
    """

    module: str
    form: DeployForm

    @property
    def merged(self) -> str:
        """The path of the convolution."""
        return join_name(self.module, self.form.merged) if self.form.merged else self.module

    def holds(self, name: str) -> bool:
        """Return whether a tensor or module is part of a branch."""
        start = f"{self.module}." if self.module else ""
        below = name.removeprefix(start)
        return name.startswith(start) and below.partition(".")[0] in self.form.branches


def find_blocks(
    names: Iterable[str],
    architectures: Collection[str] | None = None,
    *,
    deployed: Collection[str] | None = None,
) -> list[Block]:
    """Return the blocks that names of tensors tell of; of those inside each other the outer one.

    Args:
        architectures: that it may be, e.g. ``timm:repvit_m1``; None where the code itself will tell.
        deployed: names of the tensors of the deploy model, where its code has made it.
    """
    children = _find_children(names)
    blocks: list[Block] = []
    for module, own in children.items():
        if any(block.holds(module) for block in blocks):
            continue
        for form in FORMS:
            block = Block(module, form)
            if deployed is not None and f"{block.merged}.weight" not in deployed:
                continue
            others = set(own) - set(form.branches)
            below = children.get(join_name(module, form.branches[0]), {}).keys()
            if not own.keys() >= set(form.branches[: form.needs]) or (others and not form.merged):
                continue
            if form.below and not below <= set(form.below):
                continue
            if any(found.holds(join_name(module, branch)) for found in blocks for branch in form.branches):
                continue
            if deployed is not None or _may_be(form.architectures, architectures):
                blocks.append(block)
    return blocks


def find_pairs(
    names: Iterable[str],
    architectures: Collection[str] | None,
    blocks: Collection[Block],
    *,
    deployed: Collection[str] | None = None,
) -> dict[str, str]:
    """Map the path of each convolution or linear that takes its parent's place to that place.

    Args:
        architectures, deployed: as above.
    """
    if deployed is None and not _may_be(_FUSED, architectures):
        return {}
    found = {}
    for module, own in _find_children(names).items():
        producers = [child for child in own if child in _PRODUCERS]
        is_pair = len(producers) == 1 and set(own) == {_NORM, producers[0]}
        is_made = deployed is None or f"{module}.weight" in deployed
        if is_pair and is_made and not any(block.holds(module) for block in blocks):
            found[join_name(module, producers[0])] = module
    return found


def keeps_batchnorms(architectures: Collection[str]) -> bool:
    """Return whether the deploy form of one of these has a BatchNorm wherever there are no branches."""
    return _may_be(_KEEPING, architectures)


def _may_be(starts: Collection[str], architectures: Collection[str] | None) -> bool:
    if not starts or architectures is None:
        return True
    return any(name.partition(":")[2].startswith(tuple(starts)) for name in architectures)


def _find_children(names: Iterable[str]) -> Mapping[str, dict[str, None]]:
    """Return the modules and parameters right below each module, outer modules first."""
    children: dict[str, dict[str, None]] = {"": {}}
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            children.setdefault(".".join(parts[:depth]), {})[parts[depth]] = None
    return dict(sorted(children.items(), key=lambda item: item[0].count(".") if item[0] else -1))
