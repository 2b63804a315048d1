"""Declared graphs: pairs of names that the user gives, checked against the shapes of their tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from bntool.batchnorm import AFFINE, VECTORS, BatchNorm
from bntool.checkpoints.batchnorms import find_computed, find_norms, find_unexplained, group_tensors
from bntool.checkpoints.checkpoint import ModuleInfo, StateDict
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.tensors import Tensor, count_elements
from bntool.checkpoints.ties import find_tied
from bntool.errors import RefusedError, UsageError
from bntool.graphs.graph import Edge, Evidence, ModelGraph, Node, NodeKind, check_lengths

_TRANSPOSED_WORD = re.compile(r"deconv|transpose|tconv|(?:^|[._])up(?:_?conv|sample)?\d*$", re.IGNORECASE)
_NORM_WORD = re.compile(r"(?:batch_?norm|norm|bn)", re.IGNORECASE)


def as_pairs(pairs: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """Return pairs as a mapping from each BatchNorm to its producer, whether they are given so or as texts.

    Raises:
        UsageError: as :func:`parse_pairs`.
    """
    if isinstance(pairs, Mapping):
        return dict(pairs)
    return parse_pairs([pairs] if isinstance(pairs, str) else pairs or ())


def parse_pairs(texts: Sequence[str]) -> dict[str, str]:
    """Read ``["conv1=bn1"]``, or lines of such pairs, as a mapping from each BatchNorm to its producer.

    Raises:
        UsageError: a pair is malformed, or a name occurs twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        if not isinstance(text, str):  # from a library's caller
            raise UsageError(f"{text!r} is no text of the form PRODUCER=BATCHNORM, e.g. conv1=bn1")
    for line in (line.strip() for text in texts for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        producer, equals, batchnorm = (part.strip() for part in line.partition("="))
        if not (producer and equals and batchnorm):
            raise UsageError(f"--pair {line!r} is not of the form PRODUCER=BATCHNORM, e.g. layer1.0.conv1=layer1.0.bn1")
        if batchnorm in pairs or producer in pairs.values():
            raise UsageError(f"--pair {line!r}: one of the layers is in another pair already")
        pairs[batchnorm] = producer
    return pairs


def read_pairs(texts: Sequence[str]) -> dict[str, str]:
    """Read pairs as ``--pair`` takes them: ``conv1=bn1``, or ``@FILE`` with one on each line; ``#`` starts a comment
    line.

    Raises:
        UsageError: as :func:`parse_pairs`, or the file is not UTF-8 text.
        UnreadableFileError: the file cannot be read.
    """
    return parse_pairs([_read_text(text[1:]) if text.startswith("@") else text for text in texts])


def _read_text(path: str) -> str:
    with SourceFile(path) as file:
        try:
            return file.read(0, file.size).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError("a file of pairs is UTF-8 text with PRODUCER=BATCHNORM on each line", path=path) from error


def suggest_pairs(state_dict: StateDict) -> dict[str, str]:
    """Suggest pairs by names and channels, from each BatchNorm to its producer, for a person to read."""
    pairs: dict[str, str] = {}
    for norm in find_norms(state_dict):
        if not norm.kind.is_batch_norm:
            continue
        for name in _likely_names(norm.name):
            full = state_dict.full_name(f"{name}.weight")
            shape = tuple(state_dict.tensors[full].shape) if full in state_dict.tensors else ()
            is_one = len(shape) >= 2 and shape[0] == norm.num_features and not _may_be_transposed(name, shape)
            if is_one and name not in pairs.values():
                pairs[norm.name] = name
                break
    return pairs


def _likely_names(batchnorm: str) -> Iterator[str]:
    """Yield names that usually precede a BatchNorm of this name: ``block.conv1`` before ``block.bn1``."""
    path, dot, leaf = batchnorm.rpartition(".")
    if leaf.isdigit():
        yield f"{path}{dot}{int(leaf) - 1}"
    elif _NORM_WORD.search(leaf):
        for word in ("conv", "Conv", "fc", "linear", ""):
            other = _NORM_WORD.sub(word, leaf, count=1)
            yield from (f"{path}{dot}{name}" for name in (other, other.strip("_")) if name)


def declare(
    state_dict: StateDict, pairs: Mapping[str, str], *, modules: Mapping[str, ModuleInfo] | None = None
) -> ModelGraph:
    """Build a graph that holds nothing but the pairs; each pair is checked against the shapes of its tensors.

    A weight of three or more dimensions counts as a convolution's, unless the file says what the module is; it is
    refused where name or kernel are rather those of a transposed one, whose channels would fit as well. Its output
    channels are on the first axis, or on the last one where only that fits.

    Args:
        pairs: from the BatchNorm to what feeds it.
        modules: what a live model tells of what feeds them, by name; else the file tells it, or nothing does.

    Raises:
        UsageError: a layer is not in the state dict.
        RefusedError: shapes say that a pair cannot be.
        CorruptFileError: vectors of one layer differ in length.
    """
    norms = {norm.name: norm for norm in find_norms(state_dict)}
    groups = group_tensors(state_dict)
    names = sorted(groups)
    nodes: list[Node] = []
    edges: list[Edge] = []
    uses: dict[str, frozenset[int]] = {}
    for batchnorm, producer in pairs.items():
        norm = norms.get(batchnorm)
        if norm is None or not norm.kind.is_batch_norm:
            what = f"; it is a {norm.kind.value}" if norm is not None else ""
            raise UsageError(f"the state dict has no BatchNorm of that name{what}", tensor=batchnorm)
        told = (modules or {}).get(producer) or state_dict.modules.get(state_dict.prefix + producer)
        source = _producer(len(nodes), state_dict, producer, norm, told)
        target = _batchnorm(len(nodes) + 1, norm)
        computed = find_computed(producer, groups)
        source = dataclasses.replace(source, computed=computed) if computed else source
        if modules is None:  # else the outputs are compared
            source = _note_unexplained(source, groups, norms, names=names)
            target = _note_unexplained(target, groups, norms, names=names)
        nodes += [source, target]
        channels = range(source.channels)
        edges.append(Edge(source.index, target.index, 0, channels, channels, Evidence.DECLARED))
        for node in (source, target):
            vectors = [
                state_dict.tensor(name) for role, name in node.parameters.items() if node is target or role == "bias"
            ]
            check_lengths(node.layer, [node.channels, *(count_elements(vector.shape) for vector in vectors)])
            uses.update({name: frozenset((node.index,)) for name in node.parameters.values()})
    tied = find_tied(state_dict, uses)
    return ModelGraph(
        tuple(nodes),
        tuple(edges),
        uses=uses,
        tied=tied,
        evidence=Evidence.DECLARED,
        complete=False,
        readers_known=False,
    )


def _note_unexplained(
    node: Node, groups: Mapping[str, Mapping[str, Tensor]], norms: Collection[str], *, names: Sequence[str]
) -> Node:
    computed = {name for names in node.computed.values() for name in names}
    found = find_unexplained(node.layer, groups, norms, names=names)
    return (
        dataclasses.replace(node, unexplained=tuple(name for name in found if name not in computed)) if found else node
    )


def _producer(index: int, state_dict: StateDict, layer: str, norm: BatchNorm, module: ModuleInfo | None) -> Node:
    names = {role: f"{layer}.{role}" for role in AFFINE}
    present = {role: name for role, name in names.items() if state_dict.full_name(name) in state_dict.tensors}
    if "weight" not in present:
        raise UsageError("the state dict has no layer of that name with a weight", tensor=layer)
    shape = tuple(state_dict.tensor(present["weight"]).shape)
    class_name = module.class_path.rpartition(".")[2] if module is not None else ""
    transposed = "ConvTranspose" in class_name
    groups = module.attributes.get("groups", 1) if module is not None else 1
    if len(shape) < 2:
        raise RefusedError(f"a weight of shape {list(shape)} belongs to no convolution or linear", tensor=layer)
    channels = shape[1] * groups if transposed else shape[0]
    kind = NodeKind.CONV_TRANSPOSE if transposed else NodeKind.LINEAR if len(shape) == 2 else NodeKind.CONVOLUTION
    if module is None and channels != norm.num_features == shape[-1]:  # (..., in, out), as spconv 1 and matmul have it
        kind, channels = NodeKind.MATMUL, shape[-1]
    if channels != norm.num_features:
        advice = " (a transposed convolution needs --model)" if module is None else ""
        raise RefusedError(
            f"its weight {list(shape)} gives {channels} channels, {norm.name} has {norm.num_features}: "
            f"they cannot be a pair{advice}",
            tensor=layer,
        )
    if module is None and _may_be_transposed(layer, shape):
        raise RefusedError(
            f"its weight {list(shape)} may be that of a convolution or of a transposed one, whose output channels lie "
            "on the second axis: nothing in the file tells which; give --model",
            tensor=layer,
        )
    return Node(
        index, kind, layer, layer=layer, parameters=present, channels=channels, groups=groups, class_name=class_name
    )


def _may_be_transposed(layer: str, shape: tuple[int, ...]) -> bool:
    """Return whether a weight fits both ways, and has a name or kernel as transposed convolutions have it.

    An even kernel has no middle, which convolutions that keep the size of an image need.
    """
    kernel = shape[2:]
    if not kernel:
        return False
    if _TRANSPOSED_WORD.search(layer):
        return shape[1] > 1 and shape[0] % shape[1] == 0  # also in groups
    return shape[0] == shape[1] and all(extent % 2 == 0 for extent in kernel)


def _batchnorm(index: int, norm: BatchNorm) -> Node:
    names = {role: norm.name_of(role) for role in VECTORS if role in norm.tensors}
    return Node(
        index,
        NodeKind.BATCH_NORM,
        norm.name,
        layer=norm.name,
        parameters=names,
        computed=norm.computed,
        channels=norm.num_features or 0,
        eps=norm.eps,
        class_name=norm.class_path.rpartition(".")[2],
    )
