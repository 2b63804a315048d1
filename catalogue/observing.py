"""Tracing the architectures of torchvision and timm, on the meta device: no weights, no arithmetic."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool.errors import BntoolError
from bntool.graphs.architectures.catalogue import Scope
from bntool.graphs.graph import ModelGraph, NodeKind
from bntool.graphs.traced.inputs import guess_shapes
from bntool.graphs.traced.tracing import trace
from bntool.modules.finding import find_batchnorm_modules
from catalogue.checking import Verdict, compare
from catalogue.reduction import reduce_graph
from catalogue.writing import write_structure
from tests.benchmarks.zoo_models import list_architectures

_COUNTER = "num_batches_tracked"
_TRIES = 7
_LARGEST = 200_000_000  # parameters of a model that is traced with real tensors
_ON_CPU = (2, 3, 96, 96)


@dataclass(frozen=True)
class Observation:
    """What was seen of one architecture.

    Attributes:
        name: as ``--arch`` takes it.
        shapes: of its state dict, without counters.
        eps: by layer.
        structure: who feeds whom, as text; "" where it has no BatchNorm or does not run.
        scope: the tensors that its BatchNorms depend on.
        verdict: whether the structure decides as the trace did.
        problem: why there is no structure.
        momentum: by layer; without those that are the plain average over all batches.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    eps: dict[str, float]
    structure: str = ""
    scope: Scope | None = None
    verdict: Verdict | None = None
    problem: str = ""
    momentum: dict[str, float] = field(default_factory=dict)


def observe_all(patterns: Sequence[str] = (), *, keep: Path | None = None) -> Iterator[Observation]:
    """Every architecture, or those whose name contains one of the patterns.

    Args:
        keep: a folder for observations, so that a run that was stopped goes on where it was.
    """
    models = list_architectures()
    add_stand_ins()
    for name, make in sorted(models.items()):
        if patterns and not any(pattern in name for pattern in patterns):
            continue
        path = None if keep is None else keep / f"{name.replace(':', '--')}.pickle"
        if path is not None and path.exists():
            yield pickle.loads(path.read_bytes())
            continue
        observation = observe(name, make)
        if path is not None:
            path.write_bytes(pickle.dumps(observation))
        yield observation


def observe(name: str, make: Callable[[], nn.Module]) -> Observation:
    """Build it, and trace it where it has BatchNorm."""
    model = build_on_meta(make)
    modules = find_batchnorm_modules(model)
    values: dict[str, dict[str, float | None]] = {
        name: {layer: getattr(module, name) for layer, module in modules.items()} for name in ("eps", "momentum")
    }
    eps, momentum = (
        {layer: float(value) for layer, value in values[name].items() if value is not None}
        for name in ("eps", "momentum")
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if not key.endswith(_COUNTER)}
    if not eps:
        return Observation(name, shapes, eps)
    graph, problem = trace_model(make, model)
    seen = Observation(name, shapes, eps, problem=problem) if graph is None else describe(name, graph, shapes, eps)
    return replace(seen, momentum=momentum)


def build_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The model without elements."""
    try:
        with torch.device("meta"):
            return make().eval()
    except (NotImplementedError, ValueError, RuntimeError):  # it looks at elements while it is built
        return make().eval().to("meta")


def trace_model(make: Callable[[], nn.Module], model: nn.Module) -> tuple[ModelGraph | None, str]:
    """The graph of a model, traced on the CPU where its forward looks at elements; or why there is none."""
    graph, problem = _trace(model, [*guess_shapes(model)])
    if graph is None and sum(parameter.numel() for parameter in model.parameters()) < _LARGEST:
        model = make().eval()
        transform: Any = getattr(model, "transform", None)
        if transform is not None:  # detectors scale images up, which only costs time
            transform.min_size = (_ON_CPU[-1],)
        graph, problem = _trace(model, [_ON_CPU, *guess_shapes(model)])
    return graph, problem


def describe(name: str, graph: ModelGraph, shapes: dict[str, tuple[int, ...]], eps: dict[str, float]) -> Observation:
    """What the catalogue will hold of an architecture, and whether that decides as its trace does."""
    structure = write_structure(reduce_graph(graph, name), shapes)
    verdict = compare(graph, structure, shapes, eps, name=name)
    return Observation(name, shapes, eps, structure, find_scope(graph, shapes), verdict)


def find_scope(graph: ModelGraph, shapes: Mapping[str, tuple[int, ...]]) -> Scope:
    """What the BatchNorms depend on: their tensors and those of everything before them."""
    before = {node.index for calls in graph.batchnorms.values() for node in calls}
    for node in reversed(graph.nodes):
        if node.index in before:
            before |= {edge.source for edge in graph.inputs(node)}
    names = {name for first, users in graph.uses.items() if users & before for name in graph.names_of(first)}
    names &= shapes.keys()
    children = {name.partition(".")[0] for name in names}
    left_out = {name for name in shapes if name.partition(".")[0] in children} - names
    given = _find_given(graph)
    stems = {
        node.parameters["weight"]
        for node in graph.nodes
        if node.kind is NodeKind.CONVOLUTION and node.groups == 1 and node.parameters.get("weight") in names
        if all(edge.source in given for edge in graph.inputs(node))
    }
    return Scope(tuple(sorted(children)), frozenset(left_out), frozenset(stems))


def _find_given(graph: ModelGraph) -> set[int]:
    """The model's inputs, and what is made of them without parameters, such as a padded image."""
    reading = set().union(*graph.uses.values())
    given: set[int] = set()
    for node in graph.nodes:
        sources = [edge.source for edge in graph.inputs(node)]
        absorbs = node.kind.is_producer or node.kind is NodeKind.BATCH_NORM
        plain = not absorbs and node.index not in reading and sources
        if node.kind is NodeKind.INPUT or (plain and given.issuperset(sources)):
            given.add(node.index)
    return given


def _trace(model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> tuple[ModelGraph | None, str]:
    problem = ""
    place = next(model.parameters()).device
    for shape in list(dict.fromkeys(shapes))[:_TRIES]:
        try:
            return trace(model, torch.randn(shape, device=place)), ""
        except (BntoolError, NotImplementedError) as error:
            problem = problem or f"{list(shape)}: {' '.join(str(error).split())[:200]}"
    return None, problem


def add_stand_ins() -> None:
    """Let detectors run where the compiled operations of torchvision are missing.

    Nothing after these is folded whatever they answer: the forward has looked at its data by then.
    """
    import torchvision

    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", _keep_some, "CPU")
    library.impl("roi_align", _pool_nothing, "CPU")
    torchvision.extension._has_ops = lambda: True
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []  # they end with the last reference


def _keep_some(_boxes: torch.Tensor, scores: torch.Tensor, _threshold: float) -> torch.Tensor:
    return scores.argsort(descending=True)[:10]


def _pool_nothing(
    data: torch.Tensor, boxes: torch.Tensor, _scale: float, height: int, width: int, *_: object
) -> torch.Tensor:
    return data.new_zeros(len(boxes), data.shape[1], height, width)
