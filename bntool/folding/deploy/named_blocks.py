"""Blocks that names and shapes of a bare file tell of, where nothing else does: RepVGG's, also in YOLOv6 and YOLOv7.

Its tensors fix all but the stride, which is the same for both convolutions: a convolution of an odd kernel and one of
one tap, each with its BatchNorm, and the BatchNorm of the tensor itself where that has as many channels. Of the code is
assumed what https://github.com/DingXiaoH/RepVGG does: the three are summed up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bntool.batchnorm import AFFINE, ROLES, VECTORS, NormKind
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import StateDict
from bntool.folding.deploy.forms import NAMED, Block, find_blocks
from bntool.graphs.graph import Edge, Evidence, ModelGraph, Node, NodeKind


def assume_blocks(state_dict: StateDict) -> ModelGraph | None:
    """Build the graph of these blocks, each by itself; None where there are none, or shapes contradict one."""
    names = [state_dict.strip(name) for name in state_dict.tensors]
    found = [block for block in find_blocks(names) if block.form is NAMED]
    shapes = {name: tuple(state_dict.tensor(name).shape) for name in names}
    norms = {norm.name: norm.eps for norm in find_norms(state_dict) if norm.kind is NormKind.BATCH_NORM}
    graph = _Graph(shapes, norms)
    return graph.finish() if found and all(graph.add_block(block) for block in found) else None


@dataclass
class _Graph:
    shapes: dict[str, tuple[int, ...]]
    norms: dict[str, float | None]
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    def add_block(self, block: Block) -> bool:
        """Add a block if its tensors have the shapes of one; return whether they have."""
        inside = [name for name in self.shapes if block.holds(name)]
        weights = [name for name in inside if name.endswith(".weight") and len(self.shapes[name]) == 4]
        norms = [layer for layer in self.norms if block.holds(layer)]
        identity = f"{block.module}.{block.form.branches[-1]}".removeprefix(".")
        identical = identity in norms
        layers = [*(weight.removesuffix(".weight") for weight in weights), *norms]
        # what stands beside these, as pruning's weight_orig, says that more is computed than they are
        known = {f"{layer}.{role}" for layer in layers for role in ROLES}
        # and so does a parameter of the block itself, as a factor of a branch
        start = f"{block.module}." if block.module else ""
        has_own = bool(start) and any(name.startswith(start) and "." not in name[len(start) :] for name in self.shapes)
        if len(weights) != 2 or len(norms) != 2 + identical or not known.issuperset(inside) or has_own:
            return False
        dense, point = sorted((self.shapes[weight] for weight in weights), key=lambda shape: -shape[2])
        outputs, inputs, *kernel = dense
        fits = kernel[0] == kernel[1] and kernel[0] % 2 == 1 and point == (outputs, inputs, 1, 1)
        counts = {size for layer in norms for size in self.shapes[f"{layer}.running_var"]}
        if not fits or counts != {outputs} or (identical and outputs % inputs):
            return False
        groups = outputs // inputs if identical else 1  # they matter beside the tensor itself
        source = self.add_node(NodeKind.OTHER, f"what {block.module or 'it'} reads", channels=inputs * groups)
        total = None
        for weight in weights:
            layer = weight.removesuffix(".weight")
            beside = [one for one in norms if one != identity and _is_beside(one, layer, block)]
            if len(beside) != 1:
                return False
            facts = {"groups": groups, "centred": True, "strides": (1, 1), "padded": True}
            parameters = {role: f"{layer}.{role}" for role in AFFINE if f"{layer}.{role}" in self.shapes}
            read = self.add_node(NodeKind.CONVOLUTION, layer, source, channels=outputs, parameters=parameters, **facts)
            total = self.sum_up(block, total, self.add_norm(beside[0], read))
        if identical:
            total = self.sum_up(block, total, self.add_norm(identity, source))
        self.add_node(NodeKind.OTHER, f"what reads {block.module or 'it'}", total, channels=outputs)
        return True

    def add_norm(self, layer: str, read: Node) -> Node:
        parameters = {role: f"{layer}.{role}" for role in VECTORS if f"{layer}.{role}" in self.shapes}
        eps = self.norms[layer]
        return self.add_node(NodeKind.BATCH_NORM, layer, read, channels=read.channels, parameters=parameters, eps=eps)

    def sum_up(self, block: Block, total: Node | None, branch: Node) -> Node:
        if total is None:
            return branch
        return self.add_node(NodeKind.ADD, block.module, total, branch, channels=branch.channels)

    def add_node(self, kind: NodeKind, layer: str, *sources: Node | None, **facts: object) -> Node:
        node = Node(len(self.nodes), kind, layer, layer=layer, **facts)  # type: ignore[arg-type]
        self.nodes.append(node)
        for port, source in enumerate(sources):
            if source is not None:
                channels = range(source.channels)
                self.edges.append(Edge(source.index, node.index, port, channels, channels, Evidence.ASSUMED))
        return node

    def finish(self) -> ModelGraph:
        uses = {name: frozenset((node.index,)) for node in self.nodes for name in node.parameters.values()}
        return ModelGraph(
            tuple(self.nodes), tuple(self.edges), uses, evidence=Evidence.ASSUMED, complete=False, readers_known=False
        )


def _is_beside(norm: str, convolution: str, block: Block) -> bool:
    """Return whether both lie in one branch."""
    start = len(block.module) + 1 if block.module else 0
    return norm[start:].partition(".")[0] == convolution[start:].partition(".")[0]
