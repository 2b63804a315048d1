"""What models call their parallel branches, and the convolution that takes their place: a line for each code.

To add one: the children of a block that become one convolution, and its name there. Only names are said here; that the
branches read one tensor and are summed up is seen in the graph, or nothing is merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class DeployForm:
    """How blocks of one code are named.

    Attributes:
        branches: the children that become one convolution; the first one is there in every block.
        merged: the child that this is.
    """

    branches: tuple[str, ...]
    merged: str


FORMS = (
    DeployForm(("conv_kxk", "conv_1x1", "conv_scale", "identity"), "reparam_conv"),  # timm: RepVGG, MobileOne
    DeployForm(("rbr_dense", "rbr_1x1", "rbr_identity"), "rbr_reparam"),  # DingXiaoH/RepVGG
    DeployForm(("rbr_conv", "rbr_scale", "rbr_skip"), "reparam_conv"),  # apple/ml-mobileone
)


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
        return _join(self.module, self.form.merged)

    def holds(self, name: str) -> bool:
        """Whether a tensor or module is part of a branch."""
        below = name.removeprefix(_join(self.module, ""))
        return name.startswith(_join(self.module, "")) and below.partition(".")[0] in self.form.branches


def find_blocks(names: Iterable[str]) -> Iterator[Block]:
    """The blocks that names of tensors tell of, in their order."""
    found: dict[str, Block] = {}
    for name in names:
        parts = name.split(".")
        for form in FORMS:
            if form.branches[0] in parts:
                module = ".".join(parts[: parts.index(form.branches[0])])
                found.setdefault(module, Block(module, form))
    yield from found.values()


def _join(module: str, child: str) -> str:
    return f"{module}.{child}" if module else child
