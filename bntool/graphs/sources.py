"""The sources of a model's graph, in the order in which they are preferred."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.errors import UsageError
from bntool.extensions import load_extensions
from bntool.graphs.declared import declare
from bntool.graphs.graph import Evidence, ModelGraph

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Knowledge:
    """All that a graph can be built from: a state dict, a live model, pairs, a file, an architecture.

    Attributes:
        state_dict: the tensors.
        model: the live model with these tensors; None without one.
        inputs: that it runs on, as :func:`bntool.graphs.traced.tracing.trace` takes them.
        pairs: from the BatchNorm to what feeds it, as declared.
        checkpoint: the file that the tensors are from; some formats hold their graph.
        architecture: the only one to recognise, as ``--arch`` names it.
        eps: of the layers, whatever a recognised architecture says.
    """

    state_dict: StateDict
    model: nn.Module | None = None
    inputs: Any = None
    pairs: Mapping[str, str] | None = None
    checkpoint: Checkpoint | None = None
    architecture: str | None = None
    eps: float | None = None


@dataclass(frozen=True)
class GraphSource:
    """One way to know who feeds whom.

    Attributes:
        evidence: what its edges are worth.
        build: gives the graph, or None where the knowledge does not suffice.
    """

    evidence: Evidence
    build: Callable[[Knowledge], ModelGraph | None]


def _declare(known: Knowledge) -> ModelGraph | None:
    if not known.pairs:
        return None
    if known.model is None:
        return declare(known.state_dict, known.pairs)
    from bntool.modules.finding import describe_producers

    return declare(known.state_dict, known.pairs, modules=describe_producers(known.model, known.pairs.values()))


def _trace(known: Knowledge) -> ModelGraph | None:
    return None if known.model is None else trace_as_named(known.state_dict, known.model, known.inputs)


def trace_as_named(state_dict: StateDict, model: nn.Module, inputs: Any) -> ModelGraph:
    """Trace a model, and call its modules as a state dict does; see :func:`~bntool.graphs.traced.tracing.trace`."""
    from bntool.graphs.traced.tracing import trace
    from bntool.modules.finding import find_name_prefix

    prefix = find_name_prefix(model, map(state_dict.strip, state_dict.tensors))
    return trace(model, inputs, prefix=prefix)


def read_stored_graph(checkpoint: Checkpoint) -> ModelGraph | None:
    """Read the graph that a file holds; None for formats that hold only tensors.

    Raises:
        RefusedError: the file is of a format that can hold one, and does not.
        CorruptFileError: the graph contradicts itself.
    """
    if not checkpoint.format.graph_reader or not checkpoint.state_dicts:
        return None
    module, _, function = checkpoint.format.graph_reader.partition(":")
    graph: ModelGraph = getattr(importlib.import_module(module), function)(checkpoint)
    return graph


def _read(known: Knowledge) -> ModelGraph | None:
    graph = read_stored_graph(known.checkpoint) if known.checkpoint is not None else None
    if graph is not None and (known.pairs or known.model is not None or known.architecture is not None):
        raise UsageError("this file holds its graph: leave out --pair, --model and --arch")
    if graph is not None and known.checkpoint is not None and known.checkpoint.format.application:
        from bntool.graphs.architectures.recognition import describe_application

        architecture = describe_application(known.checkpoint.format.application, known.state_dict)
        return dataclasses.replace(graph, evidence=Evidence.ASSUMED, architectures=(architecture,))
    return graph


def _assume(known: Knowledge) -> ModelGraph | None:
    from bntool.graphs.architectures.recognition import recognise
    from bntool.graphs.architectures.structure import assume

    architectures = recognise(known.state_dict, name=known.architecture)
    return assume(known.state_dict, architectures, eps=known.eps) if architectures else None


# a graph that is part of the file is what runs; then what was asked for by name; last what the tensors look like
SOURCES: tuple[GraphSource, ...] = (
    GraphSource(Evidence.STORED, _read),
    GraphSource(Evidence.DECLARED, _declare),
    GraphSource(Evidence.TRACED, _trace),
    GraphSource(Evidence.ASSUMED, _assume),
)


def build_graph(known: Knowledge) -> ModelGraph | None:
    """Build the graph from the first source that can give one; sources of other packages are asked last.

    Raises:
        UsageError: the file holds its graph, and something else was declared.
        ExtensionError: a package that offers a source cannot be imported.
    """
    graphs = (source.build(known) for source in SOURCES)
    found = next((graph for graph in graphs if graph is not None), None)
    if found is not None:
        return found
    others: Sequence[GraphSource] = load_extensions("bntool.graph_sources")
    return next((graph for source in others if (graph := source.build(known)) is not None), None)
