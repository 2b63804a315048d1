"""Functions of a model in which something is normalised, written out where they are called.

Two calls of a function share its nodes, and cannot be changed apart. Written out, each has nodes of its own: a model
without these functions, which computes the same, as ``onnx.inliner.inline_local_functions`` makes it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bntool.checkpoints.containers.protobufs.reading import Buffer, Field, Message
from bntool.checkpoints.containers.protobufs.writing import Content, Edits, Piece, embed, size_of, unused_name
from bntool.checkpoints.files import ByteSource
from bntool.checkpoints.onnx.graph import (
    ATTRIBUTES,
    BODY,
    DEFAULTS,
    FORMALS,
    FUNCTION_OPSETS,
    GRAPH_INPUTS,
    GRAPH_OUTPUTS,
    INITIALIZERS,
    INPUTS,
    MAX_CALLS,
    MAX_FUNCTION_DEPTH,
    NAME,
    NODE_NAME,
    NODES,
    OPERATOR,
    OPSETS,
    OUTPUTS,
    REFERENCE,
    RESULTS,
    SPARSE_INITIALIZERS,
    STANDARD_DOMAINS,
    SUBGRAPH,
    SUBGRAPHS,
    VALUE_INFO,
    OnnxGraph,
    find_normalising,
    key_of_call,
)
from bntool.errors import UnsafeFileError

_MOST_NODES = 200_000  # that the calls of all functions become
_TENSOR_NAME, _SPARSE_VALUES = 8, 1
_WITHOUT_MEASURE = "the functions of the model call each other without measure"


class PiecedSource:
    """Pieces of a source and new bytes, one after the other."""

    def __init__(self, content: Content, source: ByteSource) -> None:
        self._source = source
        self._pieces: list[bytes | tuple[int, int]] = []  # new bytes, or where a range of the source begins and ends
        self._starts: list[int] = []
        self.size = 0
        for piece in content:
            if isinstance(piece, Field) and self._pieces:
                last = self._pieces[-1]
                if isinstance(last, tuple) and last[1] == piece.start:
                    self._pieces[-1] = (last[0], piece.end)
                    self.size += piece.end - piece.start
                    continue
            assert isinstance(piece, bytes | Field)
            self._starts.append(self.size)
            self._pieces.append(piece if isinstance(piece, bytes) else (piece.start, piece.end))
            self.size += size_of((piece,))

    def read(self, offset: int, length: int) -> bytes:
        """See :class:`~bntool.checkpoints.files.ByteSource`."""
        parts, number, end = [], bisect_right(self._starts, offset) - 1, offset + length
        while offset < end:
            piece, inside = self._pieces[number], offset - self._starts[number]
            if isinstance(piece, bytes):
                part = piece[inside : inside + end - offset]
            else:
                first = piece[0] + inside
                part = self._source.read(first, min(end - offset, piece[1] - first))
            parts.append(part)
            offset += len(part)
            number += 1
        return b"".join(parts)


def inline_functions(model: Message, graphs: Sequence[OnnxGraph]) -> Message | None:
    """Return the model with every call of such a function written out; None where there is none, or one cannot be.

    It cannot where a function is written for another version of ONNX's operators than the model.

    Args:
        graphs: the main graph and those nested in it.

    Raises:
        UnsafeFileError: functions that call each other without measure.
    """
    functions = find_normalising(model)
    calls = [(graph, node) for graph in graphs for node in graph.nodes if key_of_call(node.message) in functions]
    if not calls or not _have_one_version(model, functions.values()):
        return None
    taken = {name for g in graphs for name in (*g.inputs, *g.initializers, *g.computed)}
    taken |= {node.name for g in graphs for node in g.nodes}
    inlining, edits = _Inlining(functions, taken), Edits()
    for graph, node in calls:
        nodes = inlining.expand(node.message, _Scope())
        edits.replace(graph.message, node.field, *(piece for one in nodes for piece in embed(NODES, *one)))
    _remove_functions(model, functions.values(), edits)
    source = PiecedSource(edits.render(model), model.buffer.source)
    return Message(Buffer(source), 0, source.size)


def _have_one_version(model: Message, functions: Iterable[Message]) -> bool:
    """Return whether functions are written for the operators of the model."""
    versions = _versions(model, OPSETS)
    for function in functions:
        for domain, version in _versions(function, FUNCTION_OPSETS).items():
            if versions.setdefault(domain, version) != version:
                return False
    return True


def _versions(message: Message, number: int) -> dict[str, int]:
    found = ((entry.text(1), entry.integer(2)) for entry in message.messages(number))
    return {"" if domain in STANDARD_DOMAINS else domain: version for domain, version in found}


def _remove_functions(model: Message, functions: Iterable[Message], edits: Edits) -> None:
    """Remove the functions, which nothing calls any more, and declare the domains that they needed."""
    known = _versions(model, OPSETS)
    for function in functions:
        assert function.parent is not None
        edits.replace(model, function.parent[1])
        for entry in function.messages(FUNCTION_OPSETS):
            if entry.text(1) not in known and entry.text(1) not in STANDARD_DOMAINS:
                known[entry.text(1)] = entry.integer(2)
                edits.append(model, *embed(OPSETS, *entry.fields))


@dataclass
class _Scope:
    """The names that the nodes of a function see in one call of it; those of the model itself see everything as it is.

    Attributes:
        call: the name of the call, or of the one around it; None outside of functions.
        names: what values are called where the function is written out.
        given: the attributes that it is called with, without their names.
        depth: how many functions are around.
    """

    call: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    given: Mapping[str, Content] = field(default_factory=dict)
    depth: int = 0


class _Inlining:
    """Writes out calls, with names that nothing else has."""

    def __init__(self, functions: Mapping[tuple[str, ...], Message], taken: set[str]) -> None:
        self._functions, self._taken = functions, taken
        self._calls = self._nodes = 0

    def expand(self, node: Message, scope: _Scope) -> list[Content]:
        """Return the nodes that take the place of one: itself, or those of the function that it calls."""
        function = self._functions.get(key_of_call(node))
        if function is None:
            self._nodes += 1
            if self._nodes > _MOST_NODES:
                raise UnsafeFileError(_WITHOUT_MEASURE)
            return [self._rewrite(node, scope)]
        self._calls += 1
        if scope.depth > MAX_FUNCTION_DEPTH or self._calls > MAX_CALLS:
            raise UnsafeFileError(_WITHOUT_MEASURE)
        outputs = [self._name(name, scope) for name in node.texts(OUTPUTS)]
        call = scope.call or node.text(NODE_NAME) or next(filter(None, outputs), "")
        given = {one.text(NAME): one for one in function.messages(DEFAULTS)}
        attributes = {name: self._attribute(one, _Scope()) for name, one in given.items()}
        for one in node.messages(ATTRIBUTES):
            value = self._attribute(one, scope)
            if value is not None:
                attributes[one.text(NAME)] = value
        inner = _Scope(call, given={n: v for n, v in attributes.items() if v is not None}, depth=scope.depth + 1)
        actual = [self._name(name, scope) for name in node.texts(INPUTS)]
        formals = function.texts(FORMALS)
        inner.names.update(zip(formals, (*actual, *[""] * len(formals)), strict=False))
        copies: list[tuple[str, str]] = []
        for result, output in zip(function.texts(RESULTS), outputs, strict=False):
            if output and result in inner.names:  # an input, or what another result is, too
                copies.append((inner.names[result], output))
            elif output:
                inner.names[result] = output
        nodes = [one for body in function.messages(BODY) for one in self.expand(body, inner)]
        return nodes + [_copy(source, target) for source, target in copies]

    def _name(self, name: str, scope: _Scope) -> str:
        if not name or scope.call is None:
            return name
        if name not in scope.names:
            scope.names[name] = self._unused(f"{scope.call}/{name}")
        return scope.names[name]

    def _unused(self, wanted: str) -> str:
        name = unused_name(wanted, self._taken)
        self._taken.add(name)
        return name

    def _rewrite(self, node: Message, scope: _Scope) -> Content:
        """Return a node with the names and attributes that hold where it is written out."""
        pieces: list[Piece] = []
        for one in node.fields:
            if one.number in (INPUTS, OUTPUTS):
                pieces += _text(one.number, self._name(node.text_of(one), scope))
            elif one.number == ATTRIBUTES:
                attribute = node.message_of(one)
                value = self._attribute(attribute, scope)
                if value is not None:
                    pieces += embed(ATTRIBUTES, *_text(NAME, attribute.text(NAME)), *value)
            elif one.number != NODE_NAME or scope.call is None:
                pieces.append(one)
        if scope.call is not None:
            own = node.text(NODE_NAME) or next(filter(None, node.texts(OUTPUTS)), "")
            pieces += _text(NODE_NAME, self._unused(f"{scope.call}/{own}"))
        return tuple(pieces)

    def _attribute(self, attribute: Message, scope: _Scope) -> Content | None:
        """Return the value of an attribute; None of one that refers to an argument that is not given."""
        if attribute.last(REFERENCE) is not None:
            return scope.given.get(attribute.text(REFERENCE))
        pieces: list[Piece] = []
        for one in attribute.fields:
            if one.number in (SUBGRAPH, SUBGRAPHS):
                pieces += embed(one.number, *self._graph(attribute.message_of(one), scope))
            elif one.number != NAME:
                pieces.append(one)
        return tuple(pieces)

    def _graph(self, graph: Message, scope: _Scope) -> Content:
        """Return a nested graph; what it says of values between nodes is left out."""
        pieces: list[Piece] = []
        for one in graph.fields:
            if one.number == NODES:
                for node in self.expand(graph.message_of(one), scope):
                    pieces += embed(NODES, *node)
            elif one.number in (GRAPH_INPUTS, GRAPH_OUTPUTS):
                pieces += embed(one.number, *self._renamed(graph.message_of(one), 1, scope))
            elif one.number == INITIALIZERS:
                pieces += embed(one.number, *self._renamed(graph.message_of(one), _TENSOR_NAME, scope))
            elif one.number == SPARSE_INITIALIZERS:
                pieces += embed(one.number, *self._sparse(graph.message_of(one), scope))
            elif one.number != VALUE_INFO:
                pieces.append(one)
        return tuple(pieces)

    def _sparse(self, message: Message, scope: _Scope) -> Content:
        pieces: list[Piece] = []
        for one in message.fields:
            if one.number == _SPARSE_VALUES:
                pieces += embed(one.number, *self._renamed(message.message_of(one), _TENSOR_NAME, scope))
            else:
                pieces.append(one)
        return tuple(pieces)

    def _renamed(self, message: Message, number: int, scope: _Scope) -> Content:
        """Return a message in which a field of names holds those that hold where it is written out."""
        pieces: list[Piece] = []
        for one in message.fields:
            pieces += _text(number, self._name(message.text_of(one), scope)) if one.number == number else (one,)
        return tuple(pieces)


def _text(number: int, text: str) -> tuple[bytes, ...]:
    return (b"".join(piece for piece in embed(number, text.encode()) if isinstance(piece, bytes)),)


def _copy(source: str, target: str) -> Content:
    return (*_text(INPUTS, source), *_text(OUTPUTS, target), *_text(OPERATOR, "Identity"))
