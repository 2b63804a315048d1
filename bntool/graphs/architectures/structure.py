"""The structure of a recognised architecture, as the catalogue says: assumed, for keys and shapes prove no forward.

A structure is text, a line for each call that matters for folding, in order of execution: kind, layer, and what it
reads. Channels are not written where the tensors' shapes say them.

    C layer1.0.conv1  a convolution that pads (c: one that does not, t: transposed, l: linear)
    b ..bn1           a BatchNorm (B: with activation, p: a part of its module) that reads the line before; each dot
                      in front stands for a part of the name in the line before: this is layer1.0.bn1
    Cg ..conv2        a digit gives its groups, g: as many as make its weight square
    + .0 5 1          an addition (m: max-pool, a: average) of the fifth line before and the line before
    r:relu_ act 1     an activation (s: linear map of each channel, g: gate, h: bias, k: addition of a constant)
    b norm 4,1        reads several as one, one after the other (concatenated)
    c conv 2[16-32]   reads some channels; ``[16-32>0-16]`` says as which, ``*`` that every one meets every one
    x:relu_ act 1     anything else; an input ``-`` is one that does not matter
    i -               the model's input (o: its output); ``-`` is the model itself
    {...}             last: whatever is unusual, as JSON; "readers": all that channel transforms need to know is here

Behind the kind: ``~`` (no place for a bias; a BatchNorm: normalises by batch statistics), ``^`` (a convolution whose
outputs lie where its inputs do), ``/`` and a digit (the stride of a convolution that can be merged with others; ``/1``
says what ``^`` does, too), ``=N`` (channels), ``!`` (here the forward looks at its data).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bntool.batchnorm import VECTORS
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.ties import find_tied
from bntool.errors import RefusedError
from bntool.graphs.architectures.catalogue import Catalogue, load_catalogue
from bntool.graphs.architectures.recognition import Architecture
from bntool.graphs.graph import Edge, Evidence, ModelGraph, Node, NodeKind, Owner, shorten

KINDS = {
    "c": NodeKind.CONVOLUTION,
    "C": NodeKind.CONVOLUTION,
    "t": NodeKind.CONV_TRANSPOSE,
    "l": NodeKind.LINEAR,
    "b": NodeKind.BATCH_NORM,
    "B": NodeKind.BATCH_NORM,
    "p": NodeKind.BATCH_NORM,
    "+": NodeKind.ADD,
    "m": NodeKind.MAX_POOL,
    "a": NodeKind.AVERAGE,
    "r": NodeKind.ACTIVATION,
    "s": NodeKind.CHANNELWISE,
    "g": NodeKind.GATE,
    "h": NodeKind.BIAS,
    "k": NodeKind.CONSTANT_SUM,
    "w": NodeKind.MATMUL,
    "i": NodeKind.INPUT,
    "o": NodeKind.OUTPUT,
    "x": NodeKind.OTHER,
}
OWNERS = {"b": Owner.WHOLE, "B": Owner.WITH_ACTIVATION, "p": Owner.PART}
_HEAD = re.compile(r"([a-zA-Z+])(~?)(\^?)(?:/(\d))?(g|\d*)(?:=(\d+))?(!?)(?::(.*))?")
_SEGMENT = re.compile(r"(\d+)(?:\[([^]>]*)(?:>([^]]*))?\])?(\*?)")

_LISTED = 3
# what a module around may have a look at; nobody looks between a convolution and its BatchNorm
_UNREAD = (NodeKind.INPUT, NodeKind.OUTPUT, NodeKind.OTHER)


def assume(
    state_dict: StateDict,
    architectures: Sequence[Architecture],
    *,
    eps: float | None = None,
    catalogue: Catalogue | None = None,
) -> ModelGraph:
    """Return the graph of all architectures that were recognised in a state dict.

    Where there is more than one architecture, or something is missing, what surrounds a part may read every output of
    it but those of convolutions and linears that feed a BatchNorm.

    Args:
        eps: of the BatchNorms, whatever the architectures say; a file that says its own wins.

    Raises:
        RefusedError: an architecture may be one of several that fold differently.
    """
    stated = {norm.name: norm.eps for norm in find_norms(state_dict) if norm.eps is not None}
    shapes = {state_dict.strip(name): tuple(tensor.shape) for name, tensor in state_dict.tensors.items()}
    reader = _Reader(shapes)
    for architecture in architectures:
        _check(architecture, eps=eps)
        known = {layer: architecture.eps.get(layer) if eps is None else eps for layer in architecture.layers}
        text = (catalogue or load_catalogue()).structure(architecture.structures[0])
        reader.read_structure(text, root=architecture.root, eps={**known, **stated})
        if not architecture.whole:
            reader.surround()
    whole = len(architectures) == 1 and architectures[0].whole
    graph = reader.finish()
    shared = {
        name for first, others in graph.aliases.items() for name in (first, *others)
    }  # as the architecture has it
    tied = graph.tied | find_tied(state_dict, graph.uses.keys() - shared)
    return dataclasses.replace(graph, tied=tied, architectures=tuple(architectures), complete=whole)


def _check(architecture: Architecture, *, eps: float | None) -> None:
    choices = " or ".join(
        f"{value:g} ({', '.join(names[:_LISTED])}{', ...' * (len(names) > _LISTED)})"
        for value, names in sorted(architecture.choices.items())
    )
    if len(architecture.structures) > 1:
        also = f" and whose eps is {choices}" if choices else ""
        raise RefusedError(
            f"names and shapes fit {architecture.title}, whose forwards differ{also}: say which one it is with "
            "--arch NAME"
        )
    if choices and eps is None:
        which = "--arch NAME or --eps X" if len(architecture.names) > 1 else "--eps X"
        raise RefusedError(
            f"names and shapes fit {architecture.title}, and do not say which eps its layers have: {choices}; "
            f"say so with {which}"
        )


def read_structure(text: str, shapes: Mapping[str, tuple[int, ...]], *, eps: Mapping[str, float | None]) -> ModelGraph:
    """Return the graph that one structure describes.

    Args:
        text: see the top of this module.
        shapes: of the tensors, by name.
        eps: of the BatchNorms, by layer.
    """
    reader = _Reader(shapes)
    reader.read_structure(text, root="", eps=eps)
    return reader.finish()


@dataclass
class _Reader:
    shapes: Mapping[str, tuple[int, ...]]
    root: str = ""
    eps: Mapping[str, float | None] = field(default_factory=dict)
    unusual: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0  # index of the first node of this structure
    before: list[str] = field(default_factory=list)  # parts of the last name
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    uses: dict[str, set[int]] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    branches_at: int | None = None
    readers_known: bool = True

    def read_structure(self, text: str, *, root: str, eps: Mapping[str, float | None]) -> None:
        *lines, last = text.split("\n")
        self.root, self.eps, self.first, self.before = root, eps, len(self.nodes), []
        self.unusual = json.loads(last) if last.startswith("{") else {}
        self.readers_known = self.readers_known and bool(self.unusual.get("readers"))
        for line in lines if self.unusual else (*lines, last):
            self.read(line)
        for node in self.nodes[self.first :]:
            for name in node.parameters.values():
                self.uses.setdefault(name, set()).add(node.index)
        for name, users in self.unusual.get("uses", {}).items():
            self.uses[root + name] = {self.first + user for user in users}
        for name, others in self.unusual.get("aliases", {}).items():
            self.aliases[root + name] = tuple(root + other for other in others)
        self.tied.update(root + name for name in self.unusual.get("tied", ()))

    def surround(self) -> None:
        """Let one more node read what the last structure computes."""
        index = len(self.nodes)
        readers: dict[int, set[NodeKind]] = {}
        for edge in self.edges:
            readers.setdefault(edge.source, set()).add(self.nodes[edge.target].kind)
        hidden = {source for source, kinds in readers.items() if kinds == {NodeKind.BATCH_NORM}}
        readable = [
            node
            for node in self.nodes[self.first :]
            if node.kind not in _UNREAD and not (node.kind.is_producer and node.index in hidden)
        ]
        self.nodes.append(Node(index, NodeKind.OTHER, "whatever surrounds it", channels=1))
        for port, node in enumerate(readable):
            self.edges.append(Edge(node.index, index, port, range(node.channels), None, Evidence.ASSUMED))

    def read(self, line: str) -> None:
        first, layer, *ports = line.split(" ")
        match = _HEAD.fullmatch(first)
        assert match is not None, line
        letter, mark, centred, stride, groups, channels, branches, operator = match.groups()
        kind, layer, index = KINDS[letter], self.read_layer(layer), len(self.nodes)
        if branches:
            self.branches_at = index
        ports = ["1"] if kind is NodeKind.BATCH_NORM and not ports else ports
        reads = [self.read_port(index, kind, number, port) for number, port in enumerate(ports)]
        facts: dict[str, Any] = {"channels": (reads[0] if reads else 0) or 1}
        if kind.is_producer or kind is NodeKind.BATCH_NORM:
            facts |= self.describe_layer(kind, layer, groups)
        if channels:
            facts["channels"] = int(channels)
        if kind is NodeKind.BATCH_NORM:
            facts |= {"eps": self.eps.get(layer), "owner": OWNERS[letter], "training": bool(mark)}
        elif kind.is_producer:
            takes_bias = not mark and "bias" not in facts["parameters"]
            facts |= {"padded": letter in "Ct", "has_bias_slot": takes_bias}
            facts |= {"centred": bool(centred) or stride == "1", "strides": self.spread(stride, facts["parameters"])}
        unusual = self.unusual.get("layers", {}).get(str(index - self.first), {})
        if not kind.is_producer and kind is not NodeKind.BATCH_NORM and "parameters" in unusual:
            facts["parameters"] = {role: self.root + name for role, name in unusual["parameters"].items()}
        if "factors" in unusual:
            facts["factors"] = tuple(unusual["factors"])
        self.nodes.append(Node(index, kind, f"aten.{operator or kind.value}", layer, **facts))

    def spread(self, stride: str | None, parameters: Mapping[str, str]) -> tuple[int, ...]:
        """Return a stride along each axis of a kernel."""
        shape = self.shapes.get(parameters.get("weight", ""), ())
        return () if stride is None else (int(stride),) * len(shape[2:])

    def read_layer(self, text: str) -> str:
        if text == "-":
            return self.root.removesuffix(".")
        name = text.lstrip(".")
        self.before = [*self.before[: len(text) - len(name)], *name.split(".")]
        return self.root + ".".join(self.before)

    def describe_layer(self, kind: NodeKind, layer: str, groups: str) -> dict[str, Any]:
        unusual = self.unusual.get("layers", {}).get(str(len(self.nodes) - self.first), {})
        parameters = {role: f"{layer}.{role}".removeprefix(".") for role in VECTORS}
        parameters = {role: name for role, name in parameters.items() if name in self.shapes}
        if "parameters" in unusual:
            parameters = {role: self.root + name for role, name in unusual["parameters"].items()}
        facts: dict[str, Any] = {"parameters": parameters}
        if "computed" in unusual:
            computed = unusual["computed"].items()
            facts["computed"] = {role: tuple(self.root + name for name in names) for role, names in computed}
        name = parameters.get("running_mean" if kind is NodeKind.BATCH_NORM else "weight")
        shape = self.shapes.get(name or "", (1, 1))  # a weight that no state dict holds
        if kind.is_producer:
            number = shape[0] // shape[1] if groups == "g" else int(groups or 1)
            facts["groups"] = number
            last = kind is NodeKind.MATMUL
            facts["channels"] = (
                shape[-1] if last else shape[1] * number if kind is NodeKind.CONV_TRANSPOSE else shape[0]
            )
        else:
            facts["channels"] = shape[0]
        return facts

    def read_port(self, index: int, kind: NodeKind, port: int, text: str) -> int:
        """Return the edges into one input of a node; how many channels it has."""
        start = 0
        for segment in text.split(",") if text != "-" else ():
            match = _SEGMENT.fullmatch(segment)
            assert match is not None, text
            distance, some, others, meets_all = match.groups()
            source = self.nodes[index - int(distance)]
            sources = parse_runs(some) if some is not None else range(source.channels)
            targets: Sequence[int] | None = parse_runs(others) if others else range(start, start + len(sources))
            if meets_all or kind in (NodeKind.OTHER, NodeKind.OUTPUT):
                targets = None
            self.edges.append(Edge(source.index, index, port, sources, targets, Evidence.ASSUMED))
            start += len(sources)
        return start

    def finish(self) -> ModelGraph:
        return ModelGraph(
            tuple(self.nodes),
            tuple(self.edges),
            uses={name: frozenset(users) for name, users in self.uses.items()},
            aliases=self.aliases,
            tied=frozenset(self.tied),
            evidence=Evidence.ASSUMED,
            readers_known=self.readers_known,
            branches_at=self.branches_at,
        )


def parse_runs(text: str) -> Sequence[int]:
    """Parse ``0-4+8`` as 0, 1, 2, 3, 8; ``3x5`` is 3 five times."""
    numbers: list[int] = []
    for run in text.split("+"):
        if "-" in run:
            first, _, end = run.partition("-")
            numbers.extend(range(int(first), int(end)))
        elif "x" in run:
            number, _, count = run.partition("x")
            numbers.extend([int(number)] * int(count))
        else:
            numbers.append(int(run))
    return shorten(tuple(numbers))
