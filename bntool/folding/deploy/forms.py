"""What models call their parallel branches, and the convolution that takes their place: a line for each code.

To add one: the children of a block that become one convolution, and its name there. Only names are said here; that the
branches read one tensor and are summed up is seen in the graph, or nothing is merged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DeployForm:
    """How blocks of one code are named.

    Attributes:
        branches: the children that become one convolution; the first one is there in every block.
        merged: the child that this is; "" where it takes the place of the block, which then has no other children.
        architectures: what names of architectures begin with; () where the names of the children say enough.
        below: the children of the first branch; () for any.
    """

    branches: tuple[str, ...]
    merged: str = ""
    architectures: tuple[str, ...] = ()
    below: tuple[str, ...] = ()


FORMS = (
    DeployForm(("conv_kxk", "conv_1x1", "conv_scale", "identity"), "reparam_conv"),  # timm: RepVGG, MobileOne
    DeployForm(("rbr_dense", "rbr_1x1", "rbr_identity"), "rbr_reparam"),  # DingXiaoH/RepVGG
    DeployForm(("rbr_conv", "rbr_scale", "rbr_skip"), "reparam_conv"),  # apple/ml-mobileone
    DeployForm(("m",), architectures=("shvit",), below=("c", "bn")),
    DeployForm(("conv1", "conv", "bn"), architectures=("repvit",)),
    DeployForm(("head", "head_dist"), architectures=("repvit",), below=("bn", "l")),
)

# modules of a convolution or linear and its BatchNorm, in either order, that become the convolution or linear: timm's
# LeViT, TinyViT, EfficientViT-M, SHViT, RepViT
_FUSED = ("levit", "tiny_vit", "efficientvit_m", "shvit", "repvit")
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
        return _join(self.module, self.form.merged) if self.form.merged else self.module

    def holds(self, name: str) -> bool:
        """Whether a tensor or module is part of a branch."""
        below = name.removeprefix(_join(self.module, ""))
        return name.startswith(_join(self.module, "")) and below.partition(".")[0] in self.form.branches


def find_blocks(names: Iterable[str], architectures: Collection[str] | None = None) -> list[Block]:
    """The blocks that names of tensors tell of; of those inside each other the outer one.

    Args:
        architectures: that it may be, e.g. ``timm:repvit_m1``; None where the code itself will tell.
    """
    children = _find_children(names)
    blocks: list[Block] = []
    for module, own in children.items():
        if any(block.holds(module) or block.module == module for block in blocks):
            continue
        for form in FORMS:
            first, *others = form.branches
            whole = not form.merged and (set(own) != {first, *others})
            below = children.get(_join(module, first), {}).keys()
            if first not in own or whole or (form.below and below != set(form.below)):
                continue
            if _may_be(form.architectures, architectures):
                blocks.append(Block(module, form))
                break
    return blocks


def find_pairs(
    names: Iterable[str], architectures: Collection[str] | None, blocks: Collection[Block]
) -> dict[str, str]:
    """From the path of each convolution or linear that takes its parent's place to that place."""
    if not _may_be(_FUSED, architectures):
        return {}
    found = {}
    for module, own in _find_children(names).items():
        producers = [child for child in own if child in _PRODUCERS]
        is_pair = len(producers) == 1 and set(own) == {_NORM, producers[0]}
        if is_pair and not any(block.holds(module) for block in blocks):
            found[_join(module, producers[0])] = module
    return found


def _may_be(starts: Collection[str], architectures: Collection[str] | None) -> bool:
    if not starts or architectures is None:
        return True
    return any(name.partition(":")[2].startswith(tuple(starts)) for name in architectures)


def _find_children(names: Iterable[str]) -> Mapping[str, dict[str, None]]:
    """The modules and parameters right below each module, outer modules first."""
    children: dict[str, dict[str, None]] = {"": {}}
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            children.setdefault(".".join(parts[:depth]), {})[parts[depth]] = None
    return dict(sorted(children.items(), key=lambda item: item[0].count(".") if item[0] else -1))


def _join(module: str, child: str) -> str:
    return f"{module}.{child}" if module else child
