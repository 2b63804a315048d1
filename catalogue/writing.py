"""From observed architectures to ``catalogue.bin``."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from bntool.batchnorm import VECTORS
from bntool.graphs.architectures.catalogue import BLOCK, MAGIC
from bntool.graphs.architectures.structure import KINDS, OWNERS
from bntool.graphs.graph import Edge, ModelGraph, Node, NodeKind
from bntool.names import join_name

Shapes = Mapping[str, tuple[int, ...]]


def write_structure(graph: ModelGraph, shapes: Shapes) -> str:
    """A reduced graph as the text that :func:`bntool.graphs.architectures.structure.read_structure` reads."""
    sources = {edge.source for edge in graph.edges}
    lines: list[str] = []
    before = ""
    for node in graph.nodes:
        head = _head(node, shapes)
        matters = node.index in sources or node.kind is NodeKind.BATCH_NORM
        if matters and _channels(graph, node, shapes) != node.channels:
            head += f"={node.channels}"
        if node.index == graph.branches_at:
            head += "!"
        in_place = node.kind is NodeKind.ADD and node.operator.endswith("_")
        if node.kind.is_called_by_operator or in_place:
            head += ":" + node.operator.removeprefix("aten.")
        ports = _ports(graph, node)
        if node.kind is NodeKind.BATCH_NORM and ports == ["1"]:
            ports = []
        lines.append(" ".join([head, _layer(node.layer, before), *ports]))
        before = node.layer or before
    unusual = {key: value for key, value in _unusual(graph, shapes).items() if value}
    lines.append(json.dumps({**unusual, "readers": 1}, separators=(",", ":")))
    return "\n".join(lines)


def _unusual(graph: ModelGraph, shapes: Shapes) -> dict[str, Any]:
    """What a line has no place for."""
    layers: dict[str, dict[str, Any]] = {}
    uses: dict[str, set[int]] = {}
    for node in graph.nodes:
        for name in node.parameters.values():
            uses.setdefault(name, set()).add(node.index)
        if node.factors:
            layers.setdefault(str(node.index), {})["factors"] = list(node.factors)
        if node.kind in (NodeKind.BIAS, NodeKind.CHANNELWISE) and node.parameters:
            layers.setdefault(str(node.index), {})["parameters"] = dict(node.parameters)
        if node.kind is not NodeKind.BATCH_NORM and not node.kind.is_producer:
            continue
        names = {role: join_name(node.layer, role) for role in VECTORS}
        if dict(node.parameters) != {role: name for role, name in names.items() if name in shapes}:
            layers.setdefault(str(node.index), {})["parameters"] = dict(node.parameters)
        if node.computed:
            computed = {role: list(sources) for role, sources in node.computed.items()}
            layers.setdefault(str(node.index), {})["computed"] = computed
    return {
        "layers": layers,
        "uses": {
            name: sorted(users) for name, users in graph.uses.items() if name not in uses or set(users) != uses[name]
        },
        "tied": sorted(graph.tied),
        "aliases": {name: list(others) for name, others in graph.aliases.items()},
    }


def _layer(name: str, before: str) -> str:
    """The name of a layer, with a dot for each part that is as in the one before."""
    if not name:
        return "-"
    parts = name.split(".")
    same = 0
    for part, other in zip(parts[:-1], before.split(".")[:-1], strict=False):
        if part != other:
            break
        same += 1
    return "." * same + ".".join(parts[same:])


def _head(node: Node, shapes: Shapes) -> str:
    if node.kind is NodeKind.BATCH_NORM:
        letter = next(letter for letter, owner in OWNERS.items() if owner is node.owner)
        return letter + "~" * node.training
    letter = next(letter for letter, kind in KINDS.items() if kind is node.kind)
    if not node.kind.is_producer:
        return letter
    if node.kind is NodeKind.CONVOLUTION and node.padded:
        letter = "C"
    if not node.has_bias_slot and "bias" not in node.parameters:
        letter += "~"
    if len(set(node.strides)) == 1 and node.strides[0] < 10:
        letter += f"/{node.strides[0]}"
    elif node.centred:
        letter += "^"
    if node.groups != 1:
        shape = shapes.get(node.parameters.get("weight", ""), (1, 1))
        letter += "g" if node.groups == shape[0] // shape[1] else str(node.groups)
    return letter


def _channels(graph: ModelGraph, node: Node, shapes: Shapes) -> int:
    """What the reader will take for the number of channels if nothing is written."""
    if node.kind is NodeKind.BATCH_NORM or node.kind.is_producer:
        role = "running_mean" if node.kind is NodeKind.BATCH_NORM else "weight"
        return node.channels if node.parameters.get(role) in shapes else 1
    return sum(len(edge.sources) for edge in graph.inputs(node) if edge.port == 0) or 1


def _ports(graph: ModelGraph, node: Node) -> list[str]:
    edges = graph.inputs(node)
    numbers = sorted({edge.port for edge in edges})
    if node.kind not in (NodeKind.OTHER, NodeKind.OUTPUT):  # where it does not matter which one
        numbers = list(range(max(numbers, default=-1) + 1))
    texts = []
    for number in numbers:
        start, segments = 0, []
        for edge in (edge for edge in edges if edge.port == number):
            segments.append(_segment(edge, node, graph.nodes[edge.source].channels, start))
            start += len(edge.sources)
        texts.append(",".join(segments) or "-")
    return texts


def _segment(edge: Edge, node: Node, channels: int, start: int) -> str:
    text = str(edge.target - edge.source)
    sources = list(edge.sources)
    some = sources != list(range(channels))
    targets = list(edge.targets) if edge.targets is not None else None
    has_channels = node.kind not in (NodeKind.OTHER, NodeKind.OUTPUT)
    if targets is not None and has_channels and targets != list(range(start, start + len(sources))):
        return f"{text}[{format_runs(sources)}>{format_runs(targets)}]"
    if some:
        text += f"[{format_runs(sources)}]"
    if targets is None and has_channels:
        text += "*"
    return text


def format_runs(numbers: Sequence[int]) -> str:
    """The inverse of :func:`bntool.graphs.architectures.structure.parse_runs`."""
    runs: list[str] = []
    position = 0
    while position < len(numbers):
        first = numbers[position]
        ascending = equal = 1
        while position + ascending < len(numbers) and numbers[position + ascending] == first + ascending:
            ascending += 1
        while position + equal < len(numbers) and numbers[position + equal] == first:
            equal += 1
        if ascending > 1:
            runs.append(f"{first}-{first + ascending}")
        else:
            runs.append(f"{first}x{equal}" if equal > 1 else str(first))
        position += max(ascending, equal)
    return "+".join(runs)


def pack(index: Mapping[str, Any], structures: Sequence[str]) -> bytes:
    """The bytes of the file."""
    together = [structures[start : start + BLOCK] for start in range(0, len(structures), BLOCK)]
    blocks = [json.dumps(index, separators=(",", ":")), *("\0".join(texts) for texts in together)]
    compressed = [zlib.compress(block.encode(), 9) for block in blocks]
    head = " ".join([MAGIC, *(str(len(block)) for block in compressed)])
    return head.encode() + b"\n" + b"".join(compressed)
